"""Programs that use a device while something happens to it: fio, and a file system."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import threading

from .conftest import PATIENCE, until


class Fio:
    """fio, which writes, reads and compares, again and again until it is stopped.

    Attributes:
        rounds: how often it has come to its end.
        said: what it said when it failed, or None.
    """

    def __init__(self, device, offset, size, jobs=2):
        """Prepare.

        Args:
            device: path of the device.
            offset: bytes before the area that it may write to.
            size: bytes of that area.
            jobs: how many share it.
        """
        each = size // jobs
        self._words = ["fio", "--name=faults", f"--filename={device}", f"--numjobs={jobs}"]
        self._words += [f"--offset={offset}", f"--size={each}", f"--offset_increment={each}"]
        self._words += ["--direct=1", "--ioengine=libaio", "--iodepth=8", "--bs=16k"]
        self._words += ["--rw=randwrite", "--randrepeat=0", "--verify=crc32c", "--verify_fatal=1"]
        self._words += ["--verify_backlog=16", "--thread", "--group_reporting"]
        self.rounds, self.said = 0, None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def moves_on(self):
        """Wait until it has come through a round that it began after now."""
        goal = self.rounds + 2
        until(lambda: self.said or self.rounds >= goal, PATIENCE * 2)
        assert self.said is None, self.said

    def check(self):
        """Stop it after a whole round; nothing may have been wrong in any."""
        self._stopping = True
        self._thread.join(PATIENCE * 2)
        assert not self._thread.is_alive(), "fio does not end"
        assert self.said is None, self.said
        assert self.rounds

    def _run(self):
        while not self._stopping and self.said is None:
            done = subprocess.run(self._words, capture_output=True, text=True)
            if done.returncode:
                self.said = f"fio: status {done.returncode}: {done.stderr}{done.stdout}"
            else:
                self.rounds += 1


class FileSystem:
    """ext4 on a device, on which files are written, synced, renamed and removed.

    Attributes:
        failed: what a system call failed with, or None.
        synced: how many files have been.
    """

    def __init__(self, device, folder, seed=1):
        self._device, self._folder = device, folder
        self._dice = random.Random(seed)
        self._digests = {}
        self._stopping = False
        self.failed, self.synced = None, 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        _run("/sbin/mkfs.ext4", "-q", "-F", self._device)
        self._folder.mkdir(exist_ok=True)
        _run("mount", "-o", "errors=remount-ro", self._device, self._folder)
        self._thread.start()
        return self

    def moves_on(self):
        """Wait until a file has been written and synced from now on."""
        goal = self.synced + 2
        until(lambda: self.failed or self.synced >= goal, PATIENCE * 2)
        assert self.failed is None, self.failed

    def stop(self):
        """End the writing; can be called again."""
        self._stopping = True
        self._thread.join(PATIENCE * 2)
        assert not self._thread.is_alive(), "a system call does not end"

    def check(self):
        """Compare all files, after a new mount, and have the file system checked."""
        self.stop()
        assert self.failed is None, self.failed
        _run("umount", self._folder)
        # Not read-only: the first mount must not have left anything to repair either.
        _run("/sbin/e2fsck", "-f", "-n", self._device)
        _run("mount", "-o", "ro", self._device, self._folder)
        found = {
            path.name: hashlib.sha256(path.read_bytes()).digest()
            for path in self._folder.iterdir()
            if path.is_file()
        }
        _run("umount", self._folder)
        assert found == self._digests

    def unmount(self):
        """Leave nothing behind, whatever state it is in."""
        self._stopping = True
        subprocess.run(["umount", "-l", str(self._folder)], capture_output=True, check=False)

    def _run(self):
        try:
            while not self._stopping:
                self._step()
        except OSError as error:
            self.failed = error

    def _step(self):
        name = f"file-{self._dice.randrange(40)}"
        path = self._folder / name
        if self._digests and self._dice.random() < 0.1:
            path.unlink(missing_ok=True)
            self._digests.pop(name, None)
        else:
            data = self._dice.randbytes(self._dice.randrange(1, 96 << 10))
            new = path.with_name(".new")
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
            self._digests[name] = hashlib.sha256(data).digest()
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.synced += 1


def _run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}"
