"""A shell into which a page's commands are typed, on a machine that is as the page has it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.certificates import Authority

from .blocks import Command

# The machine of the documents: a network and an /etc of its own, in which all servers are here.
_MACHINE = """
set -e
ip link set lo up
world=$1; shift
mount -t tmpfs none "$world"
mkdir "$world/etc" "$world/real" "$world/home"
mount --rbind /etc "$world/real"
for each in "$world"/real/* "$world"/real/.[!.]*; do
    case ${each##*/} in
        hosts | nbdlink.toml | nbdlink.d | nbdtab) ;;
        *) ln -s "$each" "$world/etc/" ;;
    esac
done
echo '127.0.0.1 localhost store1 store2' >"$world/etc/hosts"
mount --bind "$world/etc" /etc
mkdir "$world/srv"
mount --bind "$world/srv" /srv
cd "$world/home"
export HOME=$PWD
exec "$@"
"""

# Functions for the commands that stay: their output goes to a file, and they are waited for. The
# next of them ends the one before, as a reader would.
_PRELUDE = r"""
exec 2>&1
_stay() {
    _end
    local log=$1
    eval "exec $2" >"$log" 2>&1 &
    _stays=$!
    until grep -qs '://.* is ' "$log" || [ -n "$(ss -Hltn 'sport = :10809')" ]; do
        kill -0 $_stays 2>/dev/null || { cat "$log"; return 1; }
        sleep 0.05
    done
    cat "$log"
}
_end() { [ -z "$_stays" ] || { kill $_stays 2>/dev/null; wait $_stays 2>/dev/null; _stays=; }; }
trap _end EXIT
"""

_STAYS = re.compile(r"^nbdlink (serve|qemu-nbd|supervise)\b(?!.*--fork)(?!.*--attach)")
_SECONDS = 300


def _pki(folder: Path) -> None:
    """Make `pki` as nbdlink-tls(7) tells: with the files of a server and of a client."""
    authority = Authority("store")
    server = authority.issue("store1", names=("store1", "store2", "localhost"))
    authority.write_directory(
        folder / "pki", server=server, client=authority.issue("web1", role="client")
    )


def _image(*words: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", *words], check=True, timeout=60)


# The host store1 of the documents: it has a disk with a partition on it.
_STORE1 = """
truncate -s 64M store1.img
printf 'label: gpt\ntype=linux\n' | sfdisk --quiet store1.img
mkfs.ext4 -q -E offset=$((2048 * 512)) store1.img 60M
_stay store1.log 'nbdlink serve -f raw data=store1.img'
"""

PREPARATIONS: dict[str, Callable[[Path], None] | str] = {
    "store1": _STORE1,
    "pki": _pki,
    "disk.img": lambda folder: _image("-f", "raw", str(folder / "disk.img"), "64M"),
    "debian.qcow2": lambda folder: _image("-f", "qcow2", str(folder / "debian.qcow2"), "64M"),
    "windows.vhdx": lambda folder: _image("-f", "vhdx", str(folder / "windows.vhdx"), "64M"),
}


def stays(command: str) -> bool:
    """Tell whether a command is a server, which stays until the next one is started."""
    return bool(_STAYS.search(command.partition("#")[0]))


class Shell:
    """One bash, as root of the documents' machine."""

    def __init__(self, folder: Path, *, network: bool) -> None:
        """Start it.

        Args:
            folder: an empty one, for all that it needs.
            network: whether the machine has a network of its own; devices need the real one.
        """
        user = "" if os.geteuid() == 0 else "r"
        unshare = ["unshare", f"-m{'n' if network else ''}{user}"]
        self.folder = folder
        world = folder / "world"
        world.mkdir()
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "COLUMNS": "80",
            "LC_ALL": "C.UTF-8",
            "NBDLINK_RUNTIME_DIRECTORY": str(folder / "run"),
        }
        self._process = subprocess.Popen(
            [*unshare, "sh", "-c", _MACHINE, "sh", str(world), "bash", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            bufsize=1,
        )
        self._count = 0
        status, said = self._type(_PRELUDE)
        assert status == 0, said

    def prepare(self, name: str) -> None:
        """Make something that a page takes for granted."""
        how = PREPARATIONS[name]
        if isinstance(how, str):
            status, said = self._type(how)
            assert status == 0, said
        else:
            # The machine's mounts are its own: the way there leads through its process.
            how(Path(f"/proc/{self._process.pid}/cwd"))

    def write(self, path: str, text: str) -> None:
        """Write a file of the machine."""
        status, said = self._type(f"mkdir -p $(dirname {path})\ncat >{path} <<'END'\n{text}\nEND")
        assert status == 0, said

    def run(self, command: Command) -> tuple[int, list[str]]:
        """Type a command; give its status, and what was printed."""
        text = command.text
        if stays(text):
            self._count += 1
            text = f"_stay {self.folder}/stays{self._count} {shlex.quote(text)}"
        return self._type(text)

    def _type(self, text: str) -> tuple[int, list[str]]:
        mark = f"--- {os.urandom(8).hex()}"
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{{\n{text}\n}} </dev/null\nprintf '\\n{mark} %d\\n' $?\n")
        self._process.stdin.flush()
        printed: list[str] = []
        for line in self._process.stdout:
            if line.startswith(mark):
                return int(line.split()[2]), printed[:-1] if printed and not printed[
                    -1
                ] else printed
            printed.append(line.rstrip("\n"))
        raise AssertionError("\n".join(["the shell ended", *printed]))

    def close(self) -> None:
        """End it, and what it started."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_SECONDS)
        finally:
            if self._process.poll() is None:
                self._process.kill()
            assert self._process.stdout
            self._process.stdout.close()
