#!/run/vm/busybox sh
# Run the job in the guest that has been brought up, tell the host how it ended, and power off.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
busybox() { /run/vm/busybox "$@"; }
. /run/vm/job/ports.sh

# Pipes in between, as a port has one opener only, and programs may open /dev/stdout again.
busybox mkfifo /run/vm/out /run/vm/err
/usr/bin/cat /run/vm/out >"$out" &
out_relay=$!
/usr/bin/cat /run/vm/err >"$err" &
err_relay=$!

echo ready >"$ctl"
busybox setsid /run/vm/job/command <"$in" >/run/vm/out 2>/run/vm/err
status=$?

# The relays end with the last writer. A daemon that the job left behind may be one: then what
# the job wrote itself has long been passed on when the time is up.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    busybox kill -0 $out_relay || busybox kill -0 $err_relay || break
    busybox usleep 100000
done 2>/dev/null
# Not a plain sync: it would wait for a block device whose server is gone.
while IFS= read -r directory; do
    /usr/bin/timeout 30 sync -f "$directory"
done </run/vm/job/rw
echo "exit $status" >"$ctl"
busybox poweroff -n -f
