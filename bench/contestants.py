"""The servers that are compared: nbdlink, Debian's peers, and a minimal one in C.

Each serves one raw file or, if it can, one qcow2 image, on a Unix socket or on TCP, with its
defaults; where a default would keep several clients out, it is told to let them in.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.processes import Server, free_port, launch

ROOT = Path(__file__).parents[1]
OURS = "nbdlink"
YARDSTICK = "yardstick"


@dataclass(frozen=True)
class Post:
    """Where a server is to stand: what it serves, at which address, and with which certificates.

    Attributes:
        image: the file.
        transport: "unix", "tcp" or "tls".
        folder: for its files.
        address: where it listens.
        credentials: the folder of its certificates.
        format: what the file is, "raw" or "qcow2".
    """

    image: Path
    transport: str
    folder: Path
    address: str | tuple[str, int]
    credentials: Path | None = None
    format: str = "raw"

    def uri(self, export: str = "") -> str:
        if isinstance(self.address, str):
            return f"nbd+unix:///{export}?socket={self.address}"
        if self.credentials:
            # fio lets no URI name files, and there is nobody in between on this machine.
            return f"nbds://localhost:{self.address[1]}/{export}?tls-verify-peer=0"
        return f"nbd://{self.address[0]}:{self.address[1]}/{export}"

    @property
    def port(self) -> str:
        assert not isinstance(self.address, str)
        return str(self.address[1])

    def words(self, unix: str, tcp: list[str]) -> list[str]:
        """Give the words of a command line that say where to listen."""
        return [unix, self.address] if isinstance(self.address, str) else [*tcp, self.port]


@dataclass(frozen=True)
class Contestant:
    """A server as it takes part.

    Attributes:
        name: what tables call it.
        program: what has to be installed.
        describe: its version and the options that matter.
        start: starts it at a post.
        has_tls: whether it takes part over TLS.
        has_qcow2: whether it serves qcow2 images.
    """

    name: str
    program: str
    describe: Callable[[], str]
    start: Callable[[Post], Server]
    has_tls: bool = True
    has_qcow2: bool = False

    @property
    def is_there(self) -> bool:
        return shutil.which(self.program) is not None


def _begin(
    post: Post,
    name: str,
    command: list[str],
    *,
    export: str = "",
    cwd: Path | None = None,
    pid_file: Path | None = None,
) -> Server:
    return launch(
        name,
        command,
        post.uri(export),
        post.address,
        cwd=cwd or post.folder,
        log=post.folder / f"{name.replace(' ', '')}-{post.transport}.log",
        export=export,
        pid_file=pid_file,
    )


def _nbdlink(name: str, checkout: Path) -> Contestant:
    python = [sys.executable, "-m", "nbdlink"]

    def start(post: Post) -> Server:
        command = [*python, "serve", str(post.image)]
        command += ["-f", post.format] if post.format != "raw" else []
        command += post.words("-k", ["-b", "127.0.0.1", "-p"])
        if post.credentials:
            command += ["--tls-certificates", str(post.credentials)]
        # The working directory comes first on the path of modules, so it says which nbdlink.
        return _begin(post, name, command, cwd=checkout)

    def describe() -> str:
        version = _first_line([*python, "--version"], checkout)
        return f"{version}, Python {sys.version.split()[0]}"

    return Contestant(name, sys.executable, describe, start, has_qcow2=True)


def _nbdkit(name: str, options: list[str]) -> Contestant:
    def start(post: Post) -> Server:
        where = post.words("-U", ["-i", "127.0.0.1", "-p"])
        if post.credentials:
            where += ["--tls=require", f"--tls-certificates={post.credentials}"]
        return _begin(post, name, ["nbdkit", "-f", *options, *where, "file", str(post.image)])

    def describe() -> str:
        threads = " ".join(options) or "16 threads, the default"
        return f"{_first_line(['nbdkit', '--version'])}, file plugin, {threads}"

    return Contestant(name, "nbdkit", describe, start)


def _start_qemu(post: Post) -> Server:
    command = ["qemu-nbd", "-t", "-e", "0", "-f", post.format]
    command += post.words("-k", ["-b", "127.0.0.1", "-p"])
    if post.credentials:
        tls = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir={post.credentials}"
        command += ["--object", tls, "--tls-creds", "tls0"]
    return _begin(post, "qemu-nbd", [*command, str(post.image)])


def _describe_qemu() -> str:
    version = _first_line(["qemu-nbd", "--version"]).partition("(")[0].strip()
    return f"{version}, -t -e 0 -f raw (or qcow2); cache writeback and aio threads, the defaults"


def _start_nbd_server(post: Post) -> Server:
    config = post.folder / f"nbd-server-{post.transport}.conf"
    pid_file = config.with_suffix(".pid")
    # It listens on TCP besides, whatever it is told.
    port = free_port() if isinstance(post.address, str) else post.port
    unix = f"unixsock = {post.address}\n" if isinstance(post.address, str) else ""
    config.write_text(
        f"[generic]\nport = {port}\nlistenaddr = 127.0.0.1\nallowlist = true\n{unix}"
        f"[data]\nexportname = {post.image}\nflush = true\nfua = true\ntrim = true\n"
    )
    # In the foreground (-d) it serves one client and ends, so it goes to the background.
    command = ["nbd-server", "-C", str(config), "-p", str(pid_file)]
    return _begin(post, "nbd-server", command, export="data", pid_file=pid_file)


def _describe_nbd_server() -> str:
    return f"nbd-server {_first_line(['nbd-server', '-V']).rpartition(' ')[2]}, its defaults"


def _start_yardstick(post: Post) -> Server:
    program = compiled("yardstick", ROOT / "build" / "bench")
    command = [str(program), str(post.image), *post.words("-U", ["-p"])]
    return _begin(post, YARDSTICK, command)


def _describe_yardstick() -> str:
    return f"bench/yardstick.c, {_first_line(['gcc', '--version'])}, -O2"


def compiled(name: str, folder: Path) -> Path:
    """Give a program of ours in C, or a plugin (.so), compiled since it was last changed."""
    target = folder / name
    source = ROOT / "bench" / f"{target.stem}.c"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        kind = ["-fPIC", "-shared"] if target.suffix == ".so" else ["-pthread"]
        command = ["gcc", "-O2", "-Wall", "-Wextra", *kind, "-o", str(target), str(source)]
        subprocess.run(command, check=True)
    return target


def _first_line(command: list[str], cwd: Path | None = None) -> str:
    # nbd-server says its version and leaves with an error.
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines() or ["?"]
    return re.sub(r"\s+", " ", lines[0])


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        _nbdlink(OURS, ROOT),
        _nbdkit("nbdkit -t 1", ["-t", "1"]),
        _nbdkit("nbdkit", []),
        Contestant("qemu-nbd", "qemu-nbd", _describe_qemu, _start_qemu, has_qcow2=True),
        Contestant("nbd-server", "nbd-server", _describe_nbd_server, _start_nbd_server, False),
        Contestant(YARDSTICK, "gcc", _describe_yardstick, _start_yardstick, False),
    )
}


def another_nbdlink(checkout: Path) -> Contestant:
    """Let another checkout take part, to compare a change with what was before."""
    return _nbdlink(f"nbdlink at {checkout.name}", checkout)


def client_versions() -> dict[str, str]:
    """Give the versions of the programs that make the load."""
    commands = {"fio": ["fio", "--version"], "nbdcopy": ["nbdcopy", "--version"]}
    return {name: _first_line(command) for name, command in commands.items()}
