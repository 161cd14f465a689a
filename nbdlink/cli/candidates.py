"""What may stand at the cursor of a command line that is being typed: shell completion.

Each of the scripts in `completions/` runs `nbdlink complete SHELL ...`, a verb that no help shows,
whenever somebody presses Tab. So it has to be fast, to come to an end whatever a server does, and
never to say anything but candidates. Options and choices are those of the parser; which values
fit is told by an argument's metavar, the word that stands for it in the help.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nbdlink.cli.main import VERBS, build_parser

if TYPE_CHECKING:
    from nbdlink.uri import Target

Value = tuple[str, str]
"""What can be inserted, and what it means."""

_PATIENCE: Final = "NBDLINK_COMPLETION_TIMEOUT"
"""The environment's word for the seconds that a server has to tell its exports."""
_SERVER_SECONDS: Final = 1.0
"""Without that word: somebody has pressed Tab and waits."""
_FURTHER_SECONDS: Final = 1.5
"""For everything else: looking up a name cannot be given a limit."""


@dataclass(slots=True)
class Candidates:
    """What fits.

    Attributes:
        values: each a whole word, already begun as what was typed.
        files: whether the shell's files do as well; "folders" if only these.
        goes_on: whether a value is only the beginning of a word.
    """

    values: list[Value] = field(default_factory=list)
    files: str | None = None
    goes_on: bool = False


def run(words: Sequence[str]) -> int:
    """Print what fits, for one of the scripts; on any mistake print nothing.

    Args:
        words: the shell; then for bash the line up to the cursor, the cursor's place in the line,
            and COMP_WORDBREAKS, for others the words up to the cursor, that at the cursor last.
    """
    watchdog = threading.Timer(_server_seconds() + _FURTHER_SECONDS, os._exit, (0,))
    watchdog.daemon = True
    watchdog.start()
    with contextlib.suppress(Exception, SystemExit, KeyboardInterrupt):
        shell, *rest = words
        if shell == "bash":
            line, point, breaks = rest
            typed = split(line[: int(point)])[1:]
        else:
            typed = rest
        found = candidates(typed[:-1], typed[-1])
        lines = [_shown(value, shell) for value in found.values if _is_safe(value)]
        if shell == "bash":
            cut = _bash_begins(typed[-1], line, breaks)
            lines = [_escaped(text)[len(_escaped(typed[-1][:cut])) :] for text in lines]
        flags = [found.files or "values", *(["nospace"] if found.goes_on else [])]
        print(" ".join(flags), *lines, sep="\n", flush=True)
    watchdog.cancel()
    return 0


def _server_seconds() -> float:
    try:
        return min(max(0.1, float(os.environ[_PATIENCE])), 3600.0)
    except (KeyError, ValueError):
        return _SERVER_SECONDS


def split(line: str) -> list[str]:
    """Give the words of a line that is not finished; the last one is that at its end."""
    for quote in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            words = shlex.split(f"{line}.{quote}")
            return [*words[:-1], words[-1][:-1]]
    return [""]


def candidates(before: Sequence[str], word: str) -> Candidates:
    """Give what fits.

    Args:
        before: the words between the program and the cursor.
        word: what is there of the word at the cursor.
    """
    verb = next((each for each in before if not each.startswith("-")), None)
    if verb is None:
        found = [(name, summary) for name, (_, summary) in VERBS.items()]
        if word.startswith("-"):
            found = [("--help", "tell what there is"), ("--version", "tell the version")]
        return _fitting(Candidates(found), word)
    if verb not in VERBS:
        return Candidates()
    return _Line(verb, before[before.index(verb) + 1 :]).fitting(word)


class _Line:
    """What was typed of a verb's arguments, as far as it can be understood."""

    def __init__(self, verb: str, before: Sequence[str]) -> None:
        self._verb = verb
        subparsers = build_parser(verb)._subparsers
        assert subparsers is not None
        (choices,) = (each.choices for each in subparsers._group_actions)
        self._parser: argparse.ArgumentParser = choices[verb]  # type: ignore[index]
        self._options = self._parser._option_string_actions
        self.said = argparse.Namespace()
        for action in self._parser._actions:
            setattr(self.said, action.dest, action.default)
        self._operands: list[str] = []
        self._only_operands = False
        self._expecting: argparse.Action | None = None
        for word in before:
            self._take(word)

    def _take(self, word: str) -> None:
        expecting, self._expecting = self._expecting, None
        if expecting is not None and _takes(expecting, word):
            self._say(expecting, word)
        elif self._only_operands or not word.startswith("-") or word == "-":
            self._operands.append(word)
        elif word == "--":
            self._only_operands = True
        else:
            name, equals, value = word.partition("=")
            action = self._options.get(name)
            if action is None or (action.nargs != 0 and equals):
                if action is not None:
                    self._say(action, value)
            elif action.nargs == 0:
                setattr(self.said, action.dest, action.const)
            else:
                self._expecting = action

    def _say(self, action: argparse.Action, value: str) -> None:
        if isinstance(action, argparse._StoreAction):
            with contextlib.suppress(ValueError):
                made = action.type(value) if callable(action.type) else value
                setattr(self.said, action.dest, made)

    def fitting(self, word: str) -> Candidates:
        """Give what fits as the next word."""
        if self._expecting is not None and _takes(self._expecting, word):
            return self._values(self._expecting, word)
        if word.startswith("-") and not self._only_operands:
            name, equals, value = word.partition("=")
            if equals:
                found = (
                    self._values(self._options[name], value)
                    if name in self._options
                    else Candidates()
                )
                found.values = [(f"{name}={text}", meaning) for text, meaning in found.values]
                return found
            return _fitting(Candidates(list(self._option_names(word))), word)
        operands = [each for each in self._parser._actions if not each.option_strings]
        for number, action in enumerate(operands):
            if number == len(self._operands) or (
                number == len(operands) - 1 and action.nargs in ("*", "+")
            ):
                return self._values(action, word)
        return Candidates()

    def _option_names(self, word: str) -> Iterator[Value]:
        for action in self._parser._actions:
            if action.option_strings and action.help is not argparse.SUPPRESS:
                # Who knows the short one does not look for it. nbd-client's long ones may begin
                # with one hyphen: as they were begun, they go on.
                names = [each for each in action.option_strings if each.startswith(word)]
                yield max(names or action.option_strings, key=len), action.help or ""

    def _values(self, action: argparse.Action, word: str) -> Candidates:
        if action.choices is not None:
            return _fitting(Candidates([(str(each), "") for each in action.choices]), word)
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        if metavar == "NAME" and {"--export", "-N"} & set(action.option_strings):
            return _fitting(Candidates(list(self._names_there())), word)
        if metavar == "NAME" and (self._verb == "supervise" or "--name" in action.option_strings):
            return _fitting(Candidates(list(_configured())), word)
        if self._verb == "qemu-nbd" and metavar == "FILE|DEV" and self.said.disconnect:
            return self._attached(word)
        for pattern, fill in _FILLERS:
            if re.fullmatch(pattern, metavar):
                return fill(self, word)
        return Candidates()

    def _attached(self, word: str) -> Candidates:
        return _fitting(Candidates(list(_devices(attached=True))), word)

    def _free(self, word: str) -> Candidates:
        return _fitting(Candidates(list(_devices(attached=False))), word)

    def _host_or_device(self, word: str) -> Candidates:
        """Give what nbd-client takes: HOST [PORT] DEVICE, PATH DEVICE, or a line of nbdtab."""
        if self._operands:
            return self._free(word)
        if self.said.unix:
            return Candidates(files="files")
        hosts = [(host.partition(":")[0], "") for host, _ in _servers()]
        table = [
            (name.removeprefix("nbdtab-"), target)
            for name, target in _configured()
            if name.startswith("nbdtab-")
        ]
        return _fitting(Candidates(list(dict.fromkeys(hosts)) + table), word)

    def _names_there(self) -> Iterator[Value]:
        """Give the exports of the server that has been named before."""
        from nbdlink.uri import Target

        place, *further = self._operands
        if getattr(self.said, "unix", False):
            target = Target(socket=place)
        elif self._verb == "nbd-client" and further and further[0].isdigit():
            target = Target(host=place, port=int(further[0]))
        else:
            target = Target.parse(place)
        yield from self._listed(target)

    def _targets(self, word: str) -> Candidates:
        if (place := _export_begins(word)) is not None and self._verb != "exports":
            return _fitting(Candidates(list(self._exports(word[:place]))), word)
        known = list(_servers())
        if self._verb == "exports":
            return _fitting(Candidates([(host, "") for host, _ in known]), word)
        full = _fitting(Candidates([(uri, "") for _, uri in known]), word)
        hosts = _fitting(Candidates([(f"{host}/", "") for host, _ in known]), word)
        if hosts.values and not full.values:
            hosts.goes_on = True
            return hosts
        full.values += hosts.values
        return full

    def _targets_or_files(self, word: str) -> Candidates:
        if os.path.lexists(os.path.dirname(word) or word):  # noqa: PTH120
            return Candidates(files="files")
        found = self._targets(word)
        if not found.values or not word:
            return Candidates(files="files")
        return found

    def _anything_attached(self, word: str) -> Candidates:
        found = self._attached(word)
        return found if found.values and word else _joined(found, self._targets(word))

    def _members(self, word: str) -> Candidates:
        found = _fitting(Candidates(list(_served_members())), word)
        return found if found.values else Candidates(files="files")

    def _files(self, word: str) -> Candidates:
        return Candidates(files="files")

    def _folders(self, word: str) -> Candidates:
        return Candidates(files="folders")

    def _exports(self, base: str) -> Iterator[Value]:
        """Ask a server for its exports; `base` is what comes before a name."""
        from urllib.parse import quote

        from nbdlink.uri import Target

        for name, meaning in self._listed(Target.parse(base)):
            yield base + (quote(name) if "://" in base else name), meaning

    def _listed(self, target: Target) -> Iterator[Value]:
        from nbdlink.cli.tls import client_options
        from nbdlink.client.negotiate import Negotiation
        from nbdlink.client.security import NO_OPTIONS, Security

        options = client_options(self.said) if hasattr(self.said, "tls") else NO_OPTIONS
        security = Security(target, options)
        with Negotiation(target, timeout=_server_seconds(), security=security) as negotiation:
            for listing in negotiation.list_exports():
                yield listing.name, listing.description


_FILLERS: Final[Sequence[tuple[str, Callable[[_Line, str], Candidates]]]] = (
    (r"DEVICE(\|NAME)?", _Line._attached),
    (r"/dev/nbdN|DEV", _Line._free),
    (r"HOST\|PATH .*", _Line._host_or_device),
    (r"TARGET", _Line._targets),
    (r"TARGET\|DEVICE", _Line._anything_attached),
    (r"SRC|DST", _Line._targets_or_files),
    (r"MEMBER", _Line._members),
    (r"DIR", _Line._folders),
    (r".*(FILE|PATH|STORAGE|IMAGE).*", _Line._files),
)
"""Metavars, and what gives the values of such an argument."""


def _takes(option: argparse.Action, word: str) -> bool:
    """Tell whether a word is the value of the option before it, which may need none."""
    return option.nargs != "?" or word == "-" or not word.startswith("-")


def _fitting(found: Candidates, word: str) -> Candidates:
    found.values = [value for value in found.values if value[0].startswith(word)]
    return found


def _joined(one: Candidates, other: Candidates) -> Candidates:
    return Candidates(
        one.values + other.values, one.files or other.files, one.goes_on or other.goes_on
    )


def _devices(*, attached: bool) -> Iterator[Value]:
    """Give the devices of this machine, and if they are attached their names as well."""
    from nbdlink.kernel import sysfs
    from nbdlink.link import record

    known = {each.index: each for each in record.read_all()} if attached else {}
    for index in sysfs.indices():
        if (sysfs.pid(index) is not None) != attached:
            continue
        about = known.get(index)
        yield f"/dev/nbd{index}", "" if about is None else about.target
        if about is not None and about.name:
            yield about.name, about.target


def _configured() -> Iterator[Value]:
    from nbdlink.link.config.files import load

    for name, link in load().links.items():
        yield name, str(link.spec.target)


def _served_members() -> Iterator[Value]:
    """Give the members of the mirrors that are served on this machine, and what they are worth."""
    from nbdlink.server.mirrors import ask
    from nbdlink.storage.mirror.places import known_mirrors

    for mirror in known_mirrors():
        for member in (ask(mirror, do="status") or {}).get("members", ()):
            yield member["address"], member["state"]


def _servers() -> Iterator[tuple[str, str]]:
    """Give host and URI of every target that is configured or attached."""
    from nbdlink.link import record
    from nbdlink.uri import DEFAULT_PORT, Target

    texts: list[str] = []
    with contextlib.suppress(Exception):  # one of the files has a mistake in it
        texts += [uri for _, uri in _configured()]
    texts += [each.target for each in record.read_all()]
    for text in dict.fromkeys(texts):
        target = Target.parse(text)
        if target.socket is None:
            yield target.address.removesuffix(f":{DEFAULT_PORT}"), text


def _export_begins(word: str) -> int | None:
    """Tell where in a target the export's name begins, if it has come to that."""
    match = re.match(r"(nbds?://[^/?]+|(?!nbds?:)[^/?]+)/", word)
    return match.end() if match else None


def _bash_begins(word: str, line: str, breaks: str) -> int:
    """Tell where in a word that begins which bash completes.

    It takes a colon or an equals sign for the end of a word, unless they are quoted.
    """
    if line.endswith(word) and word:
        return 1 + max(word.rfind(each) if each in breaks else -1 for each in ":=")
    return 0


def _escaped(text: str) -> str:
    return re.sub(r"([^\w@%+=:,./~-])", r"\\\1", text)


def _is_safe(value: Value) -> bool:
    # Names come from servers.
    return value[0].isprintable() and bool(value[0])


def _shown(value: Value, shell: str) -> str:
    text, meaning = value
    if shell == "bash" or not meaning:
        return text
    line = "".join(c if c.isprintable() else " " for c in meaning)
    return f"{text}\t{line[:60]}"


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
