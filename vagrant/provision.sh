#!/bin/sh
# Install the Debian packages of one group:
#
#     provision.sh demo|kernel|machine|deb|test|bench
#
# demo   what `make demo` takes: a virtual machine and the tools to make a file system
# kernel demo, and the programs of others that the tests speak to
# machine
#        kernel, and the modules that nbdlink runs with, for the machines of the Vagrantfile
# deb    what builds and checks the Debian package
# test   kernel and deb, and what looks at pages, completions and machines
# bench  test, and a compiler for the programs that benchmarks compare with, one of which is a
#        plugin for nbdkit
#
# Nothing happens when all of it is there. Exit status: 0 done, 1 it failed, 2 no such group,
# 3 packages are missing and there is no way to become root.
set -eu

demo="python3-venv qemu-system-x86 seabios busybox-static kmod udev e2fsprogs fdisk mount"
kernel="qemu-utils nbdkit nbd-server nbd-client libnbd-bin python3-libnbd fio iproute2 procps strace"
# For systemd-socket-activate, with which a server is started by its first client.
kernel="$kernel systemd"
# Without this nbdinfo (1.14) prints random bytes where it tells the content.
kernel="$kernel file"
# To break connections off on their way.
kernel="$kernel nftables"
# To ask for metrics as others do.
kernel="$kernel curl"
# To ask another TLS library, and as a client and server of plain TLS.
kernel="$kernel openssl"
# For disks that fail and grow.
kernel="$kernel dmsetup"
deb="build-essential debhelper debootstrap dh-python lintian pybuild-plugin-pyproject"
deb="$deb python3-all python3-setuptools"
# The Debian package runs with these.
modules="python3-openssl python3-pyroute2 python3-pyudev python3-rich"
# With which pip installs nbdlink there without fetching anything.
machine="$modules python3-setuptools python3-wheel"
# Manual pages are set by both, and completions tried in these shells.
test="$modules man-db mandoc fish zsh"
# For `vagrant validate`.
test="$test vagrant vagrant-libvirt"
bench="gcc libc6-dev nbdkit-plugin-dev"

case ${1-} in
demo) packages=$demo ;;
kernel) packages="$demo $kernel" ;;
machine) packages="$demo $kernel $machine" ;;
deb) packages=$deb ;;
test) packages="$demo $kernel $deb $test" ;;
bench) packages="$demo $kernel $bench" ;;
*)
    echo "usage: $0 demo|kernel|machine|deb|test|bench" >&2
    exit 2
    ;;
esac

missing=
for package in $packages; do
    # A package that is unknown to dpkg makes it fail, one that was removed has another state.
    case $(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true) in
    ii*) ;;
    *) missing="$missing $package" ;;
    esac
done
# The kernels of the virtual machine are fetched with `apt-get download`, which takes lists.
lists=$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' 2>/dev/null | head -n 1)
if [ -z "$missing" ] && [ -n "$lists" ]; then
    exit 0
fi

if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "provision: missing packages:${missing:- apt lists}; run \`$0 $1\` as root" >&2
        exit 3
    fi
    # Without a terminal sudo would wait for a password that nobody can give.
    ask=
    [ -t 0 ] || ask=-n
    if ! sudo $ask true; then
        echo "provision: missing packages:${missing:- apt lists}; sudo refuses," \
            "run \`$0 $1\` as root" >&2
        exit 3
    fi
    exec sudo "$0" "$1"
fi

# Where nobody watches, what apt says is shown only if it fails.
if [ -t 1 ]; then
    aloud() { "$@"; }
else
    log=$(mktemp)
    aloud() {
        "$@" >"$log" 2>&1 || {
            cat "$log" >&2
            return 1
        }
    }
fi
policy=/usr/sbin/policy-rc.d
made_policy=
clean_up() {
    [ -z "${log-}" ] || rm -f "$log"
    [ -z "$made_policy" ] || rm -f "$policy"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

export DEBIAN_FRONTEND=noninteractive
# Wait for another apt, such as unattended-upgrades, instead of giving up.
apt() { aloud apt-get -o DPkg::Lock::Timeout=600 "$@"; }

echo "provision: updating the package lists"
apt update
[ -n "$missing" ] || exit 0

# No package may start a daemon on this machine: the tests start their own, on their own ports.
if [ ! -e "$policy" ]; then
    made_policy=yes
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
echo "provision: installing$missing"
# shellcheck disable=SC2086  # a list of words
apt install -y --no-install-recommends $missing
case " $missing " in
# Nor at the next boot, where it would take the port that `nbdlink serve` listens on.
*" nbd-server "*) update-rc.d nbd-server disable >/dev/null 2>&1 || true ;;
esac
