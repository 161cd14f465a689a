"""ext4 on a device with four channels whose server is cut off, and what is left of it.

Two kinds of cuts. Some kill the server, with a supervisor that has the device go on: what was
written until then is in the image. More are made of one run of which the server has kept a record
(`tests/server/recording.py`): at any moment of it the power fails, and what no flush has covered
may be lost. After each the journal is replayed in a copy, the file system must have nothing that
is wrong, and every file that had been synced must be there.

`python -m tests.kernel.crash --help` does it for as long as one likes, on a machine that may be
thrown away. A run that was kept with `--record` can be cut on any machine, which is much faster
than in an emulated one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pickle
import random
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import Final, NamedTuple

from nbdlink.link import record
from nbdlink.link.attach import attach
from nbdlink.server import serve_in_thread
from nbdlink.storage.raw import RawStorage
from nbdlink.storage.writebehind import WriteBehind
from tests.server.recording import Flush, Promise, Recording, Write, cut

from .conftest import PATIENCE, free_all, until
from .faults import SIZE, world

CHANNELS = 4
_NOISE: Final = 6
"""Files that come and go without being synced."""
_PAGES: Final = 400
"""Synced files that are kept; there is room for a thousand."""


class Diary:
    """Writes files to a file system, each with a name of its own, and notes which are synced.

    Beside them others are written, renamed, cut short and removed, so that there is something
    to be lost.

    Attributes:
        count: how many have been synced.
        synced: the digests by name of those that are still there.
        failed: what a system call failed with, or None.
    """

    def __init__(self, folder: Path, seed: int = 1, note=lambda what: None) -> None:
        """Prepare.

        Args:
            folder: where the file system is mounted.
            seed: for names and data.
            note: called with what has just been synced: its name and digest, or None for the
                digest of a file that is about to be removed.
        """
        self._folder, self._note = folder, note
        self._dice = random.Random(seed)
        self._stopping = False
        self.count = 0
        self.synced: dict[str, str] = {}
        self.failed: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        (self._folder / "diary").mkdir()
        (self._folder / "noise").mkdir()
        os.sync()
        self._thread.start()
        return self

    def grows(self, count: int):
        """Wait until so many more files have been synced."""
        goal = self.count + count
        until(lambda: self.failed or self.count >= goal, PATIENCE * 2)
        assert self.failed is None, self.failed

    def stop(self):
        self._stopping = True
        self._thread.join(PATIENCE * 2)
        assert not self._thread.is_alive(), "a system call does not end"
        assert self.failed is None, self.failed

    def _run(self):
        try:
            while not self._stopping:
                self._make_noise()
                self._write_page()
                if len(self.synced) > _PAGES:
                    self._remove_page()
        except OSError as error:
            self.failed = error

    def _write_page(self):
        name = f"{self.count:05}"
        data = self._dice.randbytes(self._dice.randrange(1, 24 << 10))
        with (self._folder / "diary" / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(self._folder / "diary", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self.synced[name] = hashlib.sha256(data).hexdigest()
        self._note({name: self.synced[name]})
        self.count += 1

    def _remove_page(self):
        name = next(iter(self.synced))
        del self.synced[name]
        self._note({name: None})
        (self._folder / "diary" / name).unlink()

    def _make_noise(self):
        paths = [self._folder / "noise" / f"{number}" for number in range(_NOISE)]
        path, other = self._dice.sample(paths, 2)
        path.write_bytes(self._dice.randbytes(self._dice.randrange(64 << 10)))
        match self._dice.randrange(4):
            case 0:
                path.rename(other)
            case 1:
                os.truncate(path, self._dice.randrange(4 << 10))
            case 2:
                other.unlink(missing_ok=True)


def run(*words, allowed=(0,)):
    """Run a program; give what it printed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    said = f"{done.stdout}{done.stderr}"
    assert done.returncode in allowed, f"{words[0]}: status {done.returncode}: {said}"
    return said


def make_file_system(path):
    """Make an ext4 of which nothing is done later, in the background."""
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    run("/sbin/mkfs.ext4", "-q", "-F", "-E", options, path)


def verify(image: Path, promised: dict[str, str | None], folder: Path):
    """Replay the journal of an image, and look for what is wrong in it and what is missing.

    Raises:
        AssertionError: something is.
    """
    run("/sbin/e2fsck", "-p", image, allowed=(0, 1))  # which cannot mend what is wrong
    run("/sbin/e2fsck", "-f", "-n", image)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run("/sbin/debugfs", "-R", f"rdump /diary {name}", image)
        found = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in Path(name).glob("diary/*")  # none, if the power failed before there was it
        }
    missing = {name for name, digest in promised.items() if digest and found.get(name) != digest}
    assert not missing, f"of {len(promised)} synced files are lost or wrong: {sorted(missing)}"


@contextlib.contextmanager
def mounted(device, folder: Path):
    """Mount a device; whatever state it is in, it is not mounted afterwards."""
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "errors=remount-ro", device, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


# Servers that are killed.


def kill_servers(folder: Path, kills: int, seed: int = 1) -> int:
    """Kill the server so often while files are written; give how many files were synced.

    Raises:
        AssertionError: the file system, or a synced file, did not survive.
    """
    with world(folder, connections=CHANNELS, seed=seed) as here:
        make_file_system(here.device)
        with mounted(here.device, folder / "mnt") as mountpoint:
            diary = Diary(mountpoint, seed).start()
            for _ in range(kills):
                diary.grows(1)
                here.pause(0.3)
                before = dict(diary.synced)
                here.server.kill()
                # Without those that were about to be removed meanwhile.
                promised = {name: before[name] for name in before.keys() & diary.synced.keys()}
                copy = folder / "copy.img"
                run("cp", "--sparse=always", here.server.image, copy)
                here.server.start()
                verify(copy, promised, folder)
            diary.grows(1)
            diary.stop()
            run("umount", mountpoint)
            run("/sbin/e2fsck", "-f", "-n", here.device)
            return diary.count


# Power that fails.


class Run(NamedTuple):
    """What the server wrote down while files were written, and what was there before."""

    base: bytes
    log: list[Write | Flush | Promise]


def record_run(folder: Path, files: int, seed: int = 1, memory: int = 4 << 20) -> Run:
    """Have so many files be synced, and write down what reaches the disk.

    Args:
        folder: for the image.
        files: how many are synced.
        seed: for them.
        memory: of write-behind, which the server does in this.
    """
    image = folder / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    make_file_system(image)
    base = image.read_bytes()
    recording = Recording(RawStorage.open(image))
    with serve_in_thread({"": WriteBehind(recording, memory)}) as service:
        try:
            device = attach(service.uri(), connections=CHANNELS)
            with mounted(device.path, folder / "mnt") as mountpoint:
                diary = Diary(mountpoint, seed, recording.promise).start()
                diary.grows(files)
                diary.stop()
                run("umount", mountpoint)
        finally:
            free_all()
    return Run(base, recording.log)


def cut_power(recorded: Run, cuts: int, folder: Path, seed: int = 1) -> None:
    """Have the power fail so often in a run that was written down; that takes no kernel.

    Raises:
        AssertionError: the file system, or a synced file, would not have survived.
    """
    dice, (base, log) = random.Random(seed), recorded
    copy = folder / "copy.img"
    for at in [len(log), *dice.choices(range(len(log) + 1), k=cuts - 1)]:
        disk, promised = cut(base, log, at, dice)
        copy.write_bytes(disk)
        try:
            verify(copy, promised, folder)
        except AssertionError as error:
            raise AssertionError(f"cut after {at} of {len(log)} entries: {error}") from None


def main() -> int:
    """Run it; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kernel.crash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, help="of the server (20)")
    parser.add_argument("--cuts", type=int, default=300, help="of the power, in one run (300)")
    parser.add_argument("--files", type=int, default=100, help="synced in that run (100)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16))
    parser.add_argument("--record", metavar="FILE", type=Path, help="keep that run here")
    parser.add_argument(
        "--replay", metavar="FILE", type=Path, help="cut the power in a run that was kept, no more"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    begun = time.monotonic()

    def say(what):
        print(f"{what}; {time.monotonic() - begun:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        record.DIRECTORY = folder / "run"
        try:
            if options.replay is None and options.kills:
                count = kill_servers(folder, options.kills, options.seed)
                say(f"{options.kills} servers killed: nothing of {count} synced files lost")
            if options.replay is None:
                recorded = record_run(folder, options.files, options.seed)
                say(f"{len(recorded.log)} entries recorded")
            else:
                recorded = Run(*pickle.loads(zlib.decompress(options.replay.read_bytes())))
            if options.record is not None:
                options.record.write_bytes(zlib.compress(pickle.dumps(tuple(recorded))))
            if options.cuts:
                cut_power(recorded, options.cuts, folder, options.seed)
                say(f"{options.cuts} power cuts: nothing lost")
        except AssertionError as error:
            print(f"WRONG: {error}", flush=True)
            os._exit(1)  # a thread may hang in the kernel
    return 0


if __name__ == "__main__":
    sys.exit(main())
