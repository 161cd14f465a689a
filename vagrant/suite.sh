#!/bin/sh
# On the machine `client`, as root: use the disk of the other machine, and run the kernel suite.
#
#     sudo /nbdlink/vagrant/suite.sh [PYTEST-ARGUMENT ...]
set -eu

cd /nbdlink
modprobe nbd
mkdir -p /mnt/data
device=$(nbdlink attach --name data -C 4 --dead-timeout 300 nbd://store1/data)
trap 'umount /mnt/data 2>/dev/null || true; nbdlink detach --force data 2>/dev/null || true' EXIT
echo "the other machine's disk is $device"
mkfs.ext4 -q "$device"
mount "$device" /mnt/data
cp -r nbdlink tests /mnt/data
sync -f /mnt/data
nbdlink list
umount /mnt/data
e2fsck -fn "$device"
# Read again, past every cache.
nbdlink detach data
device=$(nbdlink attach --name data nbd://store1/data)
mount -o ro "$device" /mnt/data
# Running Python adds bytecode to the originals.
diff -r -x __pycache__ nbdlink /mnt/data/nbdlink
diff -r -x __pycache__ tests /mnt/data/tests
umount /mnt/data
nbdlink detach data
trap - EXIT
echo "the other machine's disk has kept all that was written"

# These detach every device that they find, which this variable allows.
NBDLINK_THROWAWAY_MACHINE=1 .venv/bin/python -m pytest -m kernel -o testpaths=tests/kernel "$@"
