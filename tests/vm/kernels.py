"""Stock Debian kernels, taken from the archive by apt and unpacked into the cache folder.

A series is known by its number ("6.1", "6.12") and stands for the package that Debian's meta
package of that series depends on today. Nothing is installed on this machine.

`python -m tests.vm.kernels [SERIES ...]` fetches them and prints where they are.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import UnavailableError, VMError, program, show

META_PACKAGES = {"6.1": "linux-image-amd64", "6.12": "linux-image-6.12-amd64"}

# Most of an unpacked 6.1 kernel is drivers for hardware that no virtual machine has.
_USELESS_MODULES = (
    "drivers/gpu",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "sound",
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel.

    Attributes:
        series: the number it is known by here.
        release: what `uname -r` says in it.
        image: the file to boot.
        modules: the directory that becomes /lib/modules/RELEASE.
    """

    series: str
    release: str
    image: Path
    modules: Path


@dataclass(frozen=True, slots=True)
class _Candidate:
    package: str
    version: str
    size: int

    @property
    def folder(self) -> str:
        return f"{self.package}_{self.version}"


def cache_folder() -> Path:
    """The folder for what is fetched once: $NBDLINK_CACHE, else nbdlink in the user's cache."""
    if named := os.environ.get("NBDLINK_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nbdlink"


def get(series: str) -> Kernel:
    """The kernel of a series as the archive has it now, fetched if need be.

    Without the archive the newest one in the cache serves.

    Raises:
        VMError: the series is unknown, or it is neither in the cache nor to be had.
    """
    if series not in META_PACKAGES:
        raise VMError(f"no kernel series {series!r}", hint=f"there is {', '.join(META_PACKAGES)}")
    machine = os.uname().machine
    if machine != "x86_64":
        raise UnavailableError(f"the kernels here are for x86_64, this machine is {machine}")
    home = cache_folder() / "kernels" / series
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VMError(
            f"cannot make the cache folder {home}: {error.strerror}",
            hint="set NBDLINK_CACHE to a folder that can be written",
        ) from error
    try:
        return _kernel(series, _current(META_PACKAGES[series], home))
    except VMError as error:
        cached = _newest(home)
        if cached is None:
            raise
        show.say(f"{error}; taking {cached.name} from the cache")
        return _kernel(series, cached)


def _current(meta_package: str, home: Path) -> Path:
    try:
        return _fetch(_candidate(meta_package), home)
    except VMError as error:
        if os.geteuid() != 0:
            raise
        # The lists may be missing, or name a file that the archive has replaced.
        show.say(f"{error}; updating apt's lists")
        _run("apt-get", "-q", "update")
        return _fetch(_candidate(meta_package), home)


def _kernel(series: str, folder: Path) -> Kernel:
    images = sorted((folder / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise VMError(f"{folder} holds no kernel", hint=f"remove {folder} and try again")
    release = images[0].name.removeprefix("vmlinuz-")
    return Kernel(series, release, images[0], _modules(folder, release))


def _modules(folder: Path, release: str) -> Path:
    # Debian moves modules to /usr/lib in later releases.
    for lib in ("lib", "usr/lib"):
        modules = folder / lib / "modules" / release
        if modules.is_dir():
            return modules
    raise VMError(f"{folder} holds no modules for {release}", hint=f"remove {folder} and try again")


def _newest(home: Path) -> Path | None:
    folders = [entry for entry in home.iterdir() if entry.is_dir() and entry.name[0] != "."]
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def _run(*command: str) -> str:
    # /usr/sbin is where depmod lives, and not in the PATH of an ordinary user.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    environment = {**os.environ, "LC_ALL": "C", "PATH": path}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise UnavailableError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise VMError(f"`{' '.join(command)}` failed", detail=done.stderr)
    return done.stdout


def _candidate(meta_package: str) -> _Candidate:
    try:
        meta = _run("apt-cache", "show", "--no-all-versions", meta_package)
        found = re.search(r"^Depends:.*?(linux-image-\S+) \(= ([^)]+)\)", meta, re.MULTILINE)
        if not found:
            raise VMError(f"{meta_package} depends on no kernel")
        package, version = found.groups()
        text = _run("apt-cache", "show", f"{package}={version}")
        size = re.search(r"^Size: (\d+)$", text, re.MULTILINE)
    except VMError as error:
        raise UnavailableError(
            f"apt knows no package {meta_package}",
            hint="`apt-get update` as root; Debian 12 with its security archive has it",
            detail=error.detail,
        ) from error
    return _Candidate(package, version, int(size[1]) if size else 0)


def _fetch(candidate: _Candidate, home: Path) -> Path:
    folder = home / candidate.folder
    if folder.exists():
        return folder
    with _locked(home):
        if folder.exists():  # somebody else was faster
            return folder
        for left_over in home.glob(".new-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=home) as work:
            download, tree = Path(work) / "download", Path(work) / "tree"
            download.mkdir()
            _download(candidate, download)
            with show.waiting(f"unpacking {candidate.package}"):
                _unpack(next(download.glob("*.deb")), tree)
            tree.rename(folder)
    return folder


def _download(candidate: _Candidate, folder: Path) -> None:
    # As root apt would drop to the user _apt, who cannot write into the cache folder.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"]
    command += [f"{candidate.package}={candidate.version}"]
    with (
        show.downloading(f"downloading {candidate.package}", candidate.size) as tell,
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as apt,
    ):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    apt.wait(0.2)
                    break
                tell(sum(file.stat().st_size for file in folder.iterdir()))
        except BaseException:
            apt.terminate()
            raise
        if apt.returncode:
            log.seek(0)
            raise UnavailableError(f"cannot download {candidate.package}", detail=log.read())


def _unpack(package: Path, tree: Path) -> None:
    _run("dpkg", "-x", str(package), str(tree))
    release = next((tree / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
    modules = _modules(tree, release)
    shutil.rmtree(tree / "usr" / "share", ignore_errors=True)
    for name in _USELESS_MODULES:
        shutil.rmtree(modules / "kernel" / name, ignore_errors=True)
    base = modules.parents[2]
    _run("depmod", "-b", str(base), release)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    with (home / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with show.waiting(f"another process is filling {home}"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Fetch kernels and print where they are."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.kernels", description=main.__doc__)
    parser.add_argument("series", nargs="*", help="(default: all)", choices=[*META_PACKAGES, []])
    wanted = parser.parse_args().series or META_PACKAGES

    def fetch() -> int:
        for series in wanted:
            print(get(series).image)
        return 0

    return program.reported(fetch)


if __name__ == "__main__":
    sys.exit(main())
