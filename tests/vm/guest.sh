#!/run/vm/busybox sh
# Process 1 of the guest: bring up what programs expect, then go on as job.sh.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
busybox() { /run/vm/busybox "$@"; }
share=version=9p2000.L,trans=virtio,msize=512000
. /run/vm/job/ports.sh

busybox mkdir -p /dev/pts /dev/shm /run/lock /run/udev
busybox mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
busybox mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm || die mount /dev/shm
busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup
busybox mount -t debugfs debugfs /sys/kernel/debug
busybox mount -t tracefs tracefs /sys/kernel/tracing
busybox ln -sf /proc/self/fd /dev/fd
busybox ln -sf /proc/self/fd/0 /dev/stdin
busybox ln -sf /proc/self/fd/1 /dev/stdout
busybox ln -sf /proc/self/fd/2 /dev/stderr
busybox mount -t 9p -o "ro,cache=loose,$share" modules "/lib/modules/$(busybox uname -r)" ||
    die mount the kernel modules
busybox hostname nbdlink-vm
busybox ip link set lo up || die bring up the loopback interface
# As systemd does: room for those who ask, the old limit for those who do not.
ulimit -n 524288
ulimit -S -n 1024

# These show on the host what the job writes, so here the host's view must be the guest's.
number=0
while IFS= read -r directory; do
    busybox mkdir -p "$directory"
    busybox mount -t 9p -o "rw,cache=mmap,$share" "rw$number" "$directory" ||
        die mount "$directory"
    number=$((number + 1))
done </run/vm/job/rw

# No coldplug: it takes seconds, and nothing in this machine is waiting for it. From here on
# every new device goes through udevd.
/usr/lib/systemd/systemd-udevd --daemon || die start udevd
busybox modprobe nbd || die load the module nbd
udevadm settle || die wait for udevd

exec /run/vm/job/job.sh
