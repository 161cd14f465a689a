"""QEMU's command line, and the question whether it can use KVM here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import UnavailableError, initramfs, show
from .kernels import Kernel, cache_folder

_HERE = Path(__file__).parent
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KVM_TRIAL_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Accelerator:
    """How the guest's instructions are run.

    Attributes:
        name: for people.
        options: for QEMU.
        slow: whether time limits have to be wide.
    """

    name: str
    options: tuple[str, ...]
    slow: bool


KVM = Accelerator("KVM", ("-accel", "kvm", "-cpu", "host"), slow=False)

# Of the processor models this one is the fastest to emulate: with AVX and SMAP, as in "max",
# memory functions and every entry into the kernel take about 1.5 times longer. It lacks
# rdrand, without which the guest waits a second for its first random number.
TCG = Accelerator(
    "software emulation", ("-accel", "tcg,thread=multi", "-cpu", "Westmere,+rdrand"), slow=True
)


def accelerator(kernel: Kernel) -> Accelerator:
    """KVM if a guest has been seen to run with it since this machine was booted, else TCG.

    A /dev/kvm that lets itself be opened proves nothing: inside some virtual machines a guest
    is then refused, or hangs. So the kernel is booted with it once, and what came of that is
    kept in the cache folder.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    record = cache_folder() / "kvm.json"
    boot = _BOOT_ID.read_text().strip()
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        known = {}
    if known.get("boot") != boot:
        with show.waiting("trying whether KVM works here"):
            known = {"boot": boot, "works": _kvm_runs(kernel)}
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(known))
    return KVM if known["works"] else TCG


def _kvm_runs(kernel: Kernel) -> bool:
    with tempfile.TemporaryDirectory(prefix="nbdlink-vm-") as work:
        console = Path(work) / "console"
        initrd = Path(work) / "initrd"
        init = (_HERE / "stage1.sh").read_bytes()
        initrd.write_bytes(initramfs.build(kernel, {"/init": init, "/job/probe": b""}))
        line = command(kernel, KVM, initrd=initrd, console=console, memory="256M", cpus=1)
        try:
            subprocess.run(
                line,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_KVM_TRIAL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return False
        return console.exists() and b"vm: the kernel runs" in console.read_bytes()


def command(
    kernel: Kernel,
    accel: Accelerator,
    *,
    initrd: Path,
    console: Path,
    memory: str,
    cpus: int,
    shares: Sequence[tuple[str, Path, bool]] = (),
    ports: Sequence[tuple[str, int]] = (),
) -> list[str]:
    """The command that runs a guest until it powers off or panics.

    It kills the guest when the thread that starts it ends, however that comes about.

    Args:
        kernel: what to boot.
        accel: how to run it.
        initrd: the initramfs, a file.
        console: the file to put what the kernel says.
        memory: the guest's, as QEMU writes it.
        cpus: how many.
        shares: 9p exports: tag, directory, whether the guest may write.
        ports: virtio ports: name, descriptor of a connected socket that QEMU inherits.

    Raises:
        UnavailableError: QEMU is not installed.
    """
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise UnavailableError(
            "qemu-system-x86_64 is not installed", hint="install the package qemu-system-x86"
        )
    kernel_line = [
        # Until the kernel has its serial driver, and quiet from then on but for warnings.
        "earlyprintk=ttyS0 console=ttyS0 quiet loglevel=5",
        # A panic or an oops ends QEMU (-no-reboot).
        "panic=-1 oops=panic",
        # Under emulation these cost up to a factor of ten in system calls, and guard nothing.
        "mitigations=off init_on_alloc=0",
    ]
    line = ["setpriv", "--pdeathsig", "KILL", "--", qemu]
    line += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    line += ["-machine", "q35", *accel.options, "-smp", str(cpus), "-m", memory]
    line += ["-kernel", str(kernel.image), "-initrd", str(initrd)]
    line += ["-append", " ".join(kernel_line)]
    line += ["-chardev", f"file,id=console,path={_quoted(console)}", "-serial", "chardev:console"]
    for tag, directory, writable in shares:
        access = "off" if writable else "on"
        # Without remap, files on two file systems of the host may share an inode number.
        options = f"security_model=none,readonly={access},multidevs=remap"
        line += ["-fsdev", f"local,id={tag},path={_quoted(directory)},{options}"]
        line += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    line += ["-device", "virtio-serial-pci"]
    for name, descriptor in ports:
        line += ["-chardev", f"socket,id={name},fd={descriptor}"]
        line += ["-device", f"virtserialport,name={name},chardev={name}"]
    return line


def _quoted(path: Path) -> str:
    return str(path).replace(",", ",,")
