#!/run/vm/busybox sh
# The first program in the root that is to have systemd: leave of this machine's configuration
# what a small server would start, lay the files of --tree over it, and become systemd.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
busybox() { /run/vm/busybox "$@"; }
share=version=9p2000.L,trans=virtio,msize=512000
. /run/vm/job/ports.sh

busybox mount -t 9p -o "ro,cache=loose,$share" modules "/lib/modules/$(busybox uname -r)" ||
    die mount the kernel modules
number=0
while IFS= read -r directory; do
    busybox mkdir -p "$directory"
    busybox mount -t 9p -o "rw,cache=mmap,$share" "rw$number" "$directory" ||
        die mount "$directory"
    number=$((number + 1))
done </run/vm/job/rw

# What is enabled, generated or preset on this machine is nothing to the guest.
cd /etc && busybox rm -rf systemd/system udev/rules.d fstab init.d nbdlink* nbdtab modules-load.d
busybox mkdir -p systemd/system/multi-user.target.wants udev/rules.d
echo nbdlink-vm >hostname
# Found, they make systemd believe that it is in a container.
busybox rm -f /.dockerenv /run/.containerenv
# Without one this would be a first boot, at which units are preset.
echo 6e62646c696e6b2d766d2d7379737465 >machine-id
cd /lib/systemd || die find systemd
for generator in system-generators/*; do
    [ "$generator" = system-generators/systemd-fstab-generator ] || busybox rm -f "$generator"
done
# To look at all units that are installed here would take half of the time to boot.
busybox mkdir /run/vm/units
(cd system && busybox cp -a *.target *.slice modprobe@.service systemd-journald* systemd-udev* \
    systemd-tmpfiles-setup.service systemd-poweroff.service systemd-reboot.service \
    systemd-halt.service /run/vm/units/) || die find the units of systemd
busybox mount -o bind /run/vm/units system || die leave out the other units
keep() {
    folder=system/$1.target.wants
    shift
    busybox rm -rf "$folder"
    busybox mkdir -p "$folder"
    for unit; do
        busybox ln -s "../$unit" "$folder/$unit"
    done
}
keep sysinit systemd-journald.service systemd-udevd.service systemd-udev-trigger.service \
    systemd-tmpfiles-setup.service
keep sockets systemd-journald.socket systemd-journald-dev-log.socket systemd-udevd-control.socket \
    systemd-udevd-kernel.socket
keep multi-user
keep timers
keep local-fs
busybox ln -s /lib/systemd/system/remote-fs.target /etc/systemd/system/multi-user.target.wants/
busybox mkdir -p /run/systemd/system/systemd-udev-trigger.service.d \
    /run/systemd/journald.conf.d /run/systemd/system/systemd-tmpfiles-setup.service.d
# The root is what it is.
busybox ln -s /dev/null /run/systemd/system/systemd-remount-fs.service
# A coldplug of everything takes seconds; of these it must be real.
cat >/run/systemd/system/systemd-udev-trigger.service.d/vm.conf <<'END'
[Service]
ExecStart=
ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --prioritized-subsystem=block
END
cat >/run/systemd/system/systemd-tmpfiles-setup.service.d/vm.conf <<'END'
[Service]
ExecStart=
ExecStart=systemd-tmpfiles --create --boot --prefix=/run --prefix=/tmp
END
cat >/run/systemd/journald.conf.d/vm.conf <<'END'
[Journal]
Storage=volatile
Audit=no
ForwardToKMsg=yes
MaxLevelKMsg=info
END
cat >/run/systemd/system/vm-job.service <<'END'
[Unit]
Description=The job of the virtual machine
After=multi-user.target remote-fs.target
[Service]
Type=exec
ExecStart=/run/vm/job/job.sh
LimitNOFILE=1024:524288
KillMode=process
StandardOutput=journal
StandardError=journal
END
cat >/run/systemd/system/vm.target <<'END'
[Unit]
Requires=multi-user.target
Wants=vm-job.service
AllowIsolate=yes
END

if [ -e /run/vm/job/tree ]; then
    busybox mkdir /run/vm/tree
    busybox mount -t 9p -o "ro,$share" tree /run/vm/tree || die mount the tree
    busybox cp -a /run/vm/tree/. / || die lay the tree over the files
    busybox umount /run/vm/tree
fi

busybox mkdir -p /dev/shm
busybox ip link set lo up || die bring up the loopback interface
# What systemd says goes to the kernel's log, and that to the console: at a power-off nothing
# else is left to be read.
echo on >/proc/sys/kernel/printk_devkmsg
busybox dmesg -n 7
exec /lib/systemd/systemd --unit=vm.target --log-target=kmsg --show-status=no
