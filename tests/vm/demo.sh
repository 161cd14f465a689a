#!/bin/bash
# The main job, on a real kernel: a file is served, attached as a block device, partitioned,
# formatted, mounted and filled; what is read back must be what was written. Runs as root in
# the virtual machine (`make demo`).
set -Eeuo pipefail

device=/dev/nbd0
port=10809
work=$(mktemp -d /tmp/demo-XXXXXX)
image=$work/disk.img
mount_point=$work/mnt
server=

say() { printf '\n# %s\n' "$*"; }
show() { printf '$ %s\n' "$*"; }
run() {
    show "$@"
    "$@"
}
stop_server() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
}
trap stop_server EXIT
trap 'echo "demo: FAILED at line $LINENO" >&2' ERR

say "A file of 256 MiB, and a server for it"
run truncate -s 256M "$image"
show "nbdlink serve -f raw $image --port $port &"
nbdlink serve -f raw "$image" --port "$port" &
server=$!
for _ in {1..300}; do
    (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null && break
    kill -0 "$server" || { echo "demo: the server ended" >&2; exit 1; }
    sleep 0.1
done

say "The file becomes a block device"
run nbdlink attach "localhost:$port" "$device"
run nbdlink list

say "A partition with a file system on it"
show "sfdisk $device <<< 'label: gpt / type=linux'"
printf 'label: gpt\ntype=linux\n' | sfdisk --quiet "$device"
run udevadm wait --timeout=60 "${device}p1"
run mkfs.ext4 -q "${device}p1"
run mkdir "$mount_point"
run mount "${device}p1" "$mount_point"

say "Real files, and 32 MiB of noise"
source=$work/source
mkdir "$source"
cp -r nbdlink tests pyproject.toml "$source"
head -c 32M /dev/urandom >"$source/noise"
(cd "$source" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$work/sums"
run cp -r "$source" "$mount_point/files"
run df -h "$mount_point"
run sync -f "$mount_point"
run umount "$mount_point"

say "Nothing of it is in memory any more; read it back and compare"
run blockdev --flushbufs "$device"
show "echo 3 > /proc/sys/vm/drop_caches"
echo 3 >/proc/sys/vm/drop_caches
run mount "${device}p1" "$mount_point"
show "cd $mount_point/files && sha256sum --check --quiet $work/sums"
(cd "$mount_point/files" && sha256sum --check --quiet "$work/sums")
run diff -r "$source" "$mount_point/files"
run umount "$mount_point"

say "The device goes, the server goes"
run nbdlink detach "$device"
[ "$(cat "/sys/block/${device##*/}/size")" = 0 ]
run kill "$server"
wait "$server" || [ $? -eq 143 ]
server=

say "And the same is in the server's file"
read -r start sectors < <(partx --noheadings --raw --output START,SECTORS --nr 1 "$image")
run dd if="$image" of="$work/partition" bs=512 skip="$start" count="$sectors" conv=sparse status=none
run e2fsck -f -n "$work/partition"
mkdir "$work/extracted"
show "debugfs -R 'rdump /files $work/extracted' $work/partition"
debugfs -R "rdump /files $work/extracted" "$work/partition" 2>"$work/debugfs" ||
    { cat "$work/debugfs" >&2; exit 1; }
run diff -r "$source" "$work/extracted/files"

files=$(wc -l <"$work/sums")
mib=$(($(du -s --block-size=1M --apparent-size "$source" | cut -f1)))
printf '\ndemo: all %d files (%d MiB) came back the same, on kernel %s\n' \
    "$files" "$mib" "$(uname -r)"
