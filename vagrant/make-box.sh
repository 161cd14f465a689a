#!/bin/sh
# Make a Vagrant box for libvirt out of Debian packages, and of the few that pip brings to them:
#
#     make-box.sh OUTPUT.box
#
# It is Debian 12 with its stock kernel, and with what provision.sh and environment.sh install, which
# would take half an hour in a machine without KVM. There is no boot loader in it: its own
# Vagrantfile has libvirt start the kernel. Needs root, debootstrap, e2fsprogs, python3-venv and
# qemu-utils, and 5 GB.
set -eu

if [ $# -ne 1 ] || [ "$(id -u)" -ne 0 ]; then
    echo "usage, as root: $0 OUTPUT.box" >&2
    exit 2
fi
box=$(realpath "$1")
here=$(dirname "$(realpath "$0")")
# Beside the box, as /tmp may be in memory.
work=$(mktemp -d "$(dirname "$box")/.box-XXXXXX")
root=$work/root
clean_up() {
    for place in proc sys dev; do
        ! mountpoint -q "$root/$place" || umount -R -l "$root/$place"
    done
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

mirror=$(sed -n 's/^URIs: *//p; s/^deb [^ ]*\(http[^ ]*\) .*/\1/p' \
    /etc/apt/sources.list /etc/apt/sources.list.d/debian.* 2>/dev/null | head -n 1)
debootstrap --variant=minbase --include="ca-certificates,ifupdown,iproute2,isc-dhcp-client,\
kmod,openssh-server,python3,rsync,sudo,systemd-sysv,udev" bookworm "$root" ${mirror:+"$mirror"}

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
# An initial file system for every machine, not just for the one that makes the box.
chroot "$root" env DEBIAN_FRONTEND=noninteractive sh -c '
    apt-get update
    apt-get install -y --no-install-recommends initramfs-tools zstd
    echo MODULES=most >>/etc/initramfs-tools/initramfs.conf
    apt-get install -y --no-install-recommends linux-image-amd64'
install -m 755 "$here/provision.sh" "$root/root/provision.sh"
chroot "$root" /root/provision.sh machine
rm "$root/root/provision.sh"
chroot "$root" apt-get clean

# Fetched from here, where pip knows its way.
python3 -m venv "$work/pip"
"$work/pip/bin/python" -m pip download --quiet --disable-pip-version-check --python-version 3.11 \
    --only-binary :all: --dest "$root/root/wheels" -r "$here/requirements.txt"
install -D -t "$root/nbdlink/vagrant" "$here/requirements.txt" "$here/environment.sh"
chroot "$root" env PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_FIND_LINKS=/root/wheels \
    /nbdlink/vagrant/environment.sh
chroot "$root" /nbdlink/.venv/bin/python -m compileall -q /nbdlink/.venv
rm -r "$root/root/wheels"

# The user, the key and the rights that Vagrant expects of a box.
chroot "$root" useradd --create-home --shell /bin/bash vagrant
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
install -d -m 700 "$root/home/vagrant/.ssh"
cat >"$root/home/vagrant/.ssh/authorized_keys" <<'KEY'
ssh-rsa AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzIw+niNltGEFHzD8+v1I2YJ6oXevct1YeS0o9HZyN1Q9qgCgzUFtdOKLv6IedplqoPkcmF0aYet2PkEDo3MlTBckFXPITAMzF8dJSIFo9D8HfdOV0IAdx4O7PtixWKn5y2hMNG0zQPyUecp4pzC6kivAIhyfHilFR61RGL+GPXQ2MWZWFYbAGjyiYJnAmCP3NOTd0jMZEnDkbUvxhMmBYSdETk1rRgm+R4LOzFUGaHqHDLKLX+FIPKcF96hrucXzcWyLbIbEgE98OHlnVYCzRdK8jlqm8tehUc9c9WhQ== vagrant insecure public key
KEY
chmod 600 "$root/home/vagrant/.ssh/authorized_keys"
chroot "$root" chown -R vagrant: /home/vagrant/.ssh
echo box >"$root/etc/hostname"
echo '127.0.0.1 localhost' >"$root/etc/hosts"
echo '/dev/vda / ext4 errors=remount-ro 0 1' >"$root/etc/fstab"
printf 'auto lo\niface lo inet loopback\n\nallow-hotplug eth0\niface eth0 inet dhcp\n' \
    >"$root/etc/network/interfaces"
rm -f "$root/etc/machine-id" "$root/etc/resolv.conf"
: >"$root/etc/machine-id"

umount -R -l "$root/proc" "$root/sys" "$root/dev"
cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
cp "$root"/boot/initrd.img-* "$work/initrd.img"
size=8
mke2fs -q -t ext4 -L root -d "$root" "$work/disk.raw" "${size}G"
qemu-img convert -c -O qcow2 -o compression_type=zstd "$work/disk.raw" "$work/box.img"
printf '{"provider": "libvirt", "format": "qcow2", "virtual_size": %s}\n' "$size" \
    >"$work/metadata.json"
cat >"$work/Vagrantfile" <<'RUBY'
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |libvirt|
    libvirt.kernel = File.expand_path("../vmlinuz", __FILE__)
    libvirt.initrd = File.expand_path("../initrd.img", __FILE__)
    libvirt.cmd_line = "root=/dev/vda rw net.ifnames=0 console=ttyS0"
  end
end
RUBY
tar -C "$work" -cf "$box" metadata.json Vagrantfile vmlinuz initrd.img box.img
echo "$box"
