"""`--trace`: parts of the log that are wanted in full, as qemu's tools take it."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Final

from nbdlink.errors import ConfigError

EVENTS: Final = {
    "nbd_server": "nbdlink.server",
    "nbd_storage": "nbdlink.storage",
    "nbd_tls": "nbdlink.transport",
    "nbd_link": "nbdlink.link",
}
"""What can be traced, and where it is logged."""


def set_up_trace(words: list[str]) -> None:
    """Log what `[[enable=]PATTERN][,events=FILE][,file=FILE]` asks for.

    Args:
        words: what was said, each time it was.

    Raises:
        ConfigError: it is not understood, or a file cannot be used.
    """
    import logging

    for word in words:
        patterns: list[str] = []
        handler: logging.Handler | None = None
        for piece in word.split(","):
            key, equals, value = piece.partition("=")
            if not equals:
                key, value = "enable", piece
            if key == "enable":
                patterns.append(value)
            elif key == "events":
                patterns += _lines(value)
            elif key == "file":
                try:
                    handler = logging.FileHandler(value)
                except OSError as error:
                    raise _unusable(value, error) from None
                handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
            else:
                raise ConfigError(
                    f"--trace {word}: {key} is not understood",
                    hint="say [enable=]PATTERN, events=FILE or file=FILE",
                )
        chosen = [
            logger
            for event, logger in EVENTS.items()
            if any(fnmatch.fnmatch(event, pattern) for pattern in patterns or ["*"])
        ]
        if not chosen:
            raise ConfigError(
                f"--trace {word}: nothing of that name can be traced",
                hint=f"there are {', '.join(EVENTS)}, and patterns such as nbd_*",
            )
        for logger in chosen:
            logging.getLogger(logger).setLevel(logging.DEBUG)
            if handler is not None:
                logging.getLogger(logger).addHandler(handler)


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(errors="replace")
    except OSError as error:
        raise _unusable(path, error) from None
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _unusable(path: str, error: OSError) -> ConfigError:
    words = (error.strerror or str(error)).lower()
    return ConfigError(f"--trace: {path} cannot be opened: {words}")
