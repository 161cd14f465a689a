"""The programs that make the load: fio's nbd engine, nbdcopy and `nbdlink copy`."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.processes import Server, busy_seconds, cpu_seconds
from bench.results import Sample
from bench.rows import CopyRow, Row


class ClientError(RuntimeError):
    """A client failed, or did not end."""


def _run(command: Sequence[str], seconds: float, cwd: Path) -> str:
    """Run a client to its end and give what it prints; with all its processes, if it hangs."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ClientError(f"{_name(command)} did not end within {seconds:.0f} s") from None
        raise
    if process.returncode:
        words = (errors or output).strip().splitlines() or ["no word why"]
        raise ClientError(f"{_name(command)} ended with {process.returncode}: {words[-1]}")
    return output


def _name(command: Sequence[str]) -> str:
    return command[3] if command[0] == "taskset" else command[0]


def _own_cpu() -> float:
    """Give the processor time of clients that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def fio(
    row: Row, server: Server, seconds: float, processors: Sequence[int], folder: Path
) -> Sample:
    """Load a server for a while.

    Raises:
        ClientError: the client failed.
    """
    command = ["taskset", "-c", ",".join(map(str, processors)), "fio", "--name=row"]
    command += [
        "--ioengine=nbd",
        f"--uri={server.uri}",
        f"--rw={row.rw if row.is_sequential else 'rand' + row.rw}",
        f"--bs={row.block}",
        f"--iodepth={row.depth}",
        f"--numjobs={row.connections}",
        "--group_reporting",
        "--time_based",
        f"--runtime={int(seconds * 1000)}ms",
        "--norandommap",  # no book-keeping of what has been read: it costs the client time
        "--randrepeat=0",
        "--output-format=json",
    ]
    before, own_before = cpu_seconds(server.pid), _own_cpu()
    busy, start = busy_seconds(processors), time.monotonic()
    output = _run(command, seconds * 5 + 30, folder)
    busy, took = busy_seconds(processors) - busy, time.monotonic() - start
    server.settle()
    spent = cpu_seconds(server.pid) - before
    strange = busy - spent - (_own_cpu() - own_before)
    # It says that it has connected, and then comes JSON.
    report: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    if report["error"]:
        raise ClientError(f"fio reports {os.strerror(report['error'])}")
    work = report[row.rw]
    if not work["total_ios"]:
        raise ClientError("fio did nothing")
    return Sample(
        requests=work["total_ios"],
        bytes=work["io_bytes"],
        seconds=work["runtime"] / 1000,
        cpu=spent,
        p99=work["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1e9,
        others=max(0.0, strange / took / len(processors)),
    )


def _copy_command(row: CopyRow, program: str, uri: str, source: Path, back: Path) -> list[str]:
    is_nbdcopy = program == "nbdcopy"
    nowhere = "null:" if is_nbdcopy else "/dev/null"
    ends = {
        "upload": [str(source), uri],
        "download": [uri, nowhere],
        "tofile": [uri, str(back)],
    }[row.direction]
    if is_nbdcopy:
        return ["nbdcopy", f"--connections={row.connections}", *ends]
    return [sys.executable, "-m", "nbdlink", "copy", "-C", str(row.connections), *ends]


def copy(row: CopyRow, server: Server, source: Path, program: str, root: Path) -> Sample:
    """Copy the whole file once. The processor time is the server's, or the program's own.

    The latter if the row compares programs.

    Raises:
        ClientError: the client failed.
    """
    size = source.stat().st_size
    back = source.with_name("back")
    back.unlink(missing_ok=True)  # else the second program would find its pages made
    command = _copy_command(row, program, server.uri, source, back)
    before, own_before = cpu_seconds(server.pid), _own_cpu()
    start = time.monotonic()
    _run(command, 120, root)
    seconds = time.monotonic() - start
    server.settle()
    own = _own_cpu() - own_before
    spent = own if row.client == "copy" else cpu_seconds(server.pid) - before
    return Sample(requests=0, bytes=size, seconds=seconds, cpu=spent)


def can_copy(root: Path) -> bool:
    """Tell whether this nbdlink has a `copy` command."""
    command = [sys.executable, "-m", "nbdlink", "copy", "--help"]
    return subprocess.run(command, capture_output=True, cwd=root, check=False).returncode == 0
