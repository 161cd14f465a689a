"""What becomes of writes that are to be durable, of zeroes, and of space that is given back.

These are qemu-nbd's options `--cache` (without its O_DIRECT, which is the file's business),
`--discard` and `--detect-zeroes`.
"""

from __future__ import annotations

import sys
from typing import Final, Literal

from nbdlink.storage.base import AtOnce, PlainFile, Storage
from nbdlink.storage.layer import Layer
from nbdlink.storage.zeroes import is_zero

DetectZeroes = Literal["off", "on", "unmap"]

_BLOCK: Final = 4096
"""Zeroes are looked for in writes that begin and end at multiples of that many bytes: no file
system gives less back."""


class Policy(Layer):
    """A storage with a will of its own about durability and space."""

    def __init__(
        self,
        below: Storage,
        *,
        write_through: bool = False,
        flushes: bool = True,
        discards: bool = True,
        detect_zeroes: DetectZeroes = "off",
    ) -> None:
        """Lay a policy on a storage.

        Args:
            below: the storage.
            write_through: whether everything is durable before it is answered.
            flushes: whether anything is made durable at all; if not, a crash of the machine
                may lose everything that was written.
            discards: whether space may be given back. If not, `trim` does nothing, though
                clients are told that they can; the same as with qemu-nbd.
            detect_zeroes: whether writes of nothing but zeroes become `zero`, and whether that
                may give space back.
        """
        super().__init__(below)
        self._write_through = write_through
        self._flushes = flushes
        self._discards = discards
        self._detect_zeroes = detect_zeroes
        if not discards:
            self.can_trim = not below.read_only

    @property
    def plain_file(self) -> PlainFile | None:
        """The file below; to read from only, if writes need a second look."""
        plain = self.below.plain_file
        if plain and (self._write_through or self._detect_zeroes != "off"):
            return plain._replace(guarded=sys.maxsize)
        return plain

    @property
    def at_once(self) -> AtOnce | None:
        """What the storage below does; to read only, if writes need a second look."""
        below = self.below.at_once
        if below and (self._write_through or self._detect_zeroes != "off"):
            return below._replace(write=None)
        return below

    def _durable(self, fua: bool) -> bool:
        return self._flushes and (fua or self._write_through)

    def write(self, buffer: memoryview, offset: int, fua: bool) -> None:
        """Write, or zero if there are only zeroes to write."""
        if (
            self._detect_zeroes != "off"
            and not (offset | len(buffer)) % _BLOCK
            and len(buffer)
            and is_zero(buffer)
        ):
            may_trim = self._detect_zeroes == "unmap"
            self.zero(offset, len(buffer), may_trim=may_trim, fast=False, fua=fua)
        else:
            self.below.write(buffer, offset, self._durable(fua))

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Zero; space is given back only if that is wanted."""
        self.below.zero(
            offset,
            length,
            may_trim=may_trim and self._discards,
            fast=fast,
            fua=self._durable(fua),
        )

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim, if that is wanted."""
        if self._discards:
            self.below.trim(offset, length, self._durable(fua))

    def flush(self) -> None:
        """Flush, if that is wanted."""
        if self._flushes:
            self.below.flush()
