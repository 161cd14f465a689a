"""Typing all blocks of a page that run in one place."""

from __future__ import annotations

from pathlib import Path

from .blocks import blocks, commands, matches
from .shell import Shell, stays


def type_page(page: str, where: str, folder: Path) -> int:
    """Type the blocks of `page` that run on the "host" or in the "guest"; give how many did.

    Raises:
        AssertionError: a command failed, or printed what the page does not show.
    """
    count = 0
    shell = Shell(folder, network=where == "host")
    try:
        for block in blocks(page):
            if block.mark == "file":
                shell.write(block.said, "\n".join(block.lines))
            if block.mark != "run" or block.said != where:
                continue
            for name in block.needs:
                shell.prepare(name)
            if block.language == "python":
                shell.write("./program.py", "\n".join(block.lines))
            for command in commands(block):
                if block.language == "python":
                    command.text = "python3 ./program.py"
                status, printed = shell.run(command)
                said = "\n".join(printed)
                assert bool(status) == command.fails, f"{command.place}: {status}\n{said}"
                # A server prints an address, which is another one on each machine.
                if command.shown is not None and (command.shown or not stays(command.text)):
                    shown = "\n".join(command.shown)
                    assert matches(command.shown, printed), (
                        f"{command.place}: {command.text}\nprints\n{said}\n\nbut shows\n{shown}"
                    )
            count += 1
    finally:
        shell.close()
    return count
