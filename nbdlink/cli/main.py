"""The `nbdlink` command: finds the verb, runs it, and turns errors into exit codes.

Exit status: 0 done, 1 it failed, 2 the command line or the configuration is wrong,
130 interrupted (see `nbdlink.__main__`). Only the module of the verb that was typed is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from nbdlink.errors import ConfigError, NBDError
from nbdlink.version import __version__

# Verb -> (the module with its `add_parser(subparsers, verb)`, what it does in a line).
VERBS = {
    "attach": ("nbdlink.cli.attach", "bind an export to a block device"),
    "detach": ("nbdlink.cli.attach", "unbind devices"),
    "reconnect": ("nbdlink.cli.reconnect", "renew the connections of a device, or move them"),
    "resize": ("nbdlink.cli.reconnect", "take over the new size of an export"),
    "supervise": ("nbdlink.cli.supervise", "keep devices attached: the daemon"),
    "list": ("nbdlink.cli.show", "show what is attached"),
    "watch": ("nbdlink.cli.watch", "show what links do, as it happens"),
    "exports": ("nbdlink.cli.show", "show what a server offers"),
    "info": ("nbdlink.cli.show", "show all that is known of an export or a device"),
    "map": ("nbdlink.cli.map", "show what is allocated"),
    "copy": ("nbdlink.cli.copy", "copy images from and to exports"),
    "serve": ("nbdlink.cli.serve", "serve images, files and block devices"),
    "mirror": ("nbdlink.cli.mirror", "show and rebuild the members of mirrors"),
    "qemu-nbd": ("nbdlink.cli.qemu_nbd", "take the command line of qemu-nbd"),
    "enbd-server": ("nbdlink.cli.enbd_server", "take the command line of enbd-server"),
    "nbd-client": ("nbdlink.cli.nbd_client", "take the command line of nbd-client"),
    "setup": ("nbdlink.cli.setup", "install udev rules, units, pages, completions"),
    "completion": ("nbdlink.cli.completion", "print the completion for a shell"),
    "doctor": ("nbdlink.cli.doctor", "check whether this machine can do it"),
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong as all of nbdlink does, instead of its usage."""

    _near: str | None = None
    """What the last word that was wrong is likely to mean."""

    def error(self, message: str) -> NoReturn:
        """Complain and exit with 2."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        if unknown and words.startswith("-"):
            self._near = _nearest(words.split()[0], self._option_string_actions)
        hint = f"did you mean {self._near}?" if self._near else f"see {self.prog} --help"
        complain(ConfigError(message, hint=hint))
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        is_wrong = action.choices is not None and value not in action.choices
        self._near = _nearest(value, action.choices or ()) if is_wrong else None
        if is_wrong and isinstance(action, argparse._SubParsersAction):
            self.error(f"there is no verb {value!r}")  # to name all there are takes four lines
        super()._check_value(action, value)


def _nearest(word: object, known: Iterable[object]) -> str | None:
    """Give the known word that `word` is likely a slip of, or None."""
    import difflib

    near = difflib.get_close_matches(str(word).partition("=")[0], map(str, known), 1, 0.7)
    return near[0] if near else None


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the parser; with `only` a verb, the other verbs have help lines and nothing else."""
    parser = Parser(
        prog="nbdlink",
        description="Remote NBD exports as local block devices, and the server to match.",
        epilog="`nbdlink VERB --help` tells more; so does `man nbdlink`.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"nbdlink {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (module, summary) in VERBS.items():
        sub = subparsers.add_parser(verb, help=summary, description=summary.capitalize() + ".")
        if only in (None, verb):
            import_module(module).add_arguments(sub, verb)
            sub.add_argument(
                "-v", "--verbose", action="count", default=0, help="say more; may be repeated"
            )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit status; argparse's own errors exit with 2.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    _open_missing_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["complete"]:  # what the scripts of shells run, see candidates.py
        from nbdlink.cli.candidates import run as complete

        return complete(words[1:])
    for stream in (sys.stdout, sys.stderr):
        # File names need not be text; what cannot be encoded is shown escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    verb = next((word for word in words if not word.startswith("-")), None)
    verbose = 0
    try:
        arguments = _parse(verb, words)
        verbose = arguments.verbose
        if verbose:
            set_up_logging(verbose)
        status: int = arguments.run(arguments)
        if sys.stdout is not None:  # closed by whoever started us: `nbdlink list >&-`
            sys.stdout.flush()
        return status
    except NBDError as error:
        error.hint = _in_words_of(verb, error.hint)
        complain(error)
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:
        # The reader of our output left early (`nbdlink list | head -1`); that is its right.
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        what = error.filename or "the output cannot be written"
        complain(NBDError(f"{what}: {(error.strerror or str(error)).lower()}"))
        return 1
    except Exception as error:
        # A bug of ours. Whoever meets it needs a line that can be reported, not a page.
        if verbose > 1:
            raise
        name = type(error).__name__
        complain(
            NBDError(f"unexpected {name}: {error}", hint="this is a bug; -vv shows where it is")
        )
        return 1


def _in_words_of(verb: str | None, hint: str | None) -> str | None:
    """Name options in a hint as they are called on the command line that was typed."""
    module = sys.modules.get(VERBS[verb][0]) if verb in VERBS else None
    for ours, theirs in getattr(module, "NAMES_IN_HINTS", {}).items():
        hint = hint and hint.replace(ours, theirs)
    return hint


def _parse(verb: str | None, words: list[str]) -> argparse.Namespace:
    """Parse a command line; after a verb, options and operands may come in any order."""
    if verb not in VERBS or words[0] != verb:
        return build_parser().parse_args(words)
    parser = build_parser(verb)
    (subparsers,) = (
        each for each in parser._actions if isinstance(each, argparse._SubParsersAction)
    )
    sub: argparse.ArgumentParser = subparsers.choices[verb]
    # Other programs' command lines have words that argparse takes for others.
    prepare = getattr(import_module(VERBS[verb][0]), "prepare", list)
    return sub.parse_intermixed_args(prepare(words[1:]))


def _open_missing_streams() -> None:
    """Put something harmless on the descriptors 0 to 2 if they are closed.

    A socket or a disk image that got one of them would be written to by whoever, in this
    process, has something to say.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # it is given the lowest number that is free
    os.close(descriptor)
    # Python has None for what was closed, which cannot be asked whether it is a terminal.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _drop_output() -> None:
    """Throw away what is still buffered, which the interpreter would try to write at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(error: NBDError) -> None:
    """Say on stderr what went wrong, and in a second line what to do next."""
    if sys.stderr is None:
        return  # closed; print would take stdout instead, which is for values
    print(f"nbdlink: {_one_line(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {_one_line(error.hint)}", file=sys.stderr)


def _one_line(text: str) -> str:
    """Keep what a peer or a file name may have smuggled in from reaching the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def set_up_logging(verbose: int) -> None:
    """Send the log to stderr; each `verbose` shows one level more than warnings."""
    import logging

    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(level=level, format="nbdlink: %(message)s", stream=sys.stderr)
