#!/bin/busybox sh
# The first program in the guest: make a root out of the host's files and go there.
#
# Everything of the host is read-only (QEMU exports it so); a writable layer in memory lies
# over it. cache=loose is right because nobody else changes these files while the guest runs,
# and it makes reading many small files (Python) several times faster.

busybox() { /bin/busybox "$@"; }
die() {
    echo "vm: cannot $*" >/dev/console
    busybox poweroff -n -f
}

busybox mkdir -p /proc /sys /lower /layer /root
busybox mount -t proc proc /proc || die mount /proc
busybox mount -t sysfs sysfs /sys || die mount /sys
busybox mount -t devtmpfs devtmpfs /dev || die mount /dev

for module in $(busybox cat /modules/order); do
    busybox insmod "/modules/$module" || die load "$module"
done

share=version=9p2000.L,trans=virtio,msize=512000
if [ -e /job/probe ]; then
    echo "vm: the kernel runs" >/dev/console
    busybox poweroff -n -f
fi
busybox mount -t 9p -o "ro,cache=loose,$share" root /lower || die mount the root
busybox mount -t tmpfs -o size=90% layer /layer || die mount the writable layer
busybox mkdir /layer/upper /layer/work
busybox mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work \
    root /root || die lay the writable layer over the root

for place in proc sys dev run; do
    busybox mkdir -p "/root/$place"
done
busybox mount -t tmpfs -o mode=755 run /root/run || die mount /run
busybox mkdir -p /root/run/vm
busybox cp -r /job /bin/busybox /root/run/vm/

# /lib may be a link, here an absolute one too, so it is followed inside the new root.
modules="/lib/modules/$(busybox uname -r)"
busybox chroot /root /run/vm/busybox mkdir -p "$modules"
busybox mount --move /proc /root/proc
busybox mount --move /sys /root/sys
busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /run/vm/job/guest.sh
