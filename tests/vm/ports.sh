# Sourced by the guest's scripts: the virtio ports that lead to the host, and how to give up.
#
# out and err carry the job's bytes as they are, in its standard input where it has one; ctl
# carries lines to `boot`: "ready", "exit N", "fail TEXT".

in=/dev/null
for port in /sys/class/virtio-ports/*; do
    case $(busybox cat "$port/name") in
    in) in=/dev/${port##*/} ;;
    out) out=/dev/${port##*/} ;;
    err) err=/dev/${port##*/} ;;
    ctl) ctl=/dev/${port##*/} ;;
    esac
done
die() {
    echo "fail cannot $*" >"$ctl"
    busybox poweroff -n -f
}
