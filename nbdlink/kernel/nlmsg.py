"""How netlink messages lie in a packet (netlink(7)): headers, bodies and attributes.

What is in the bodies is known to those who send and receive them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length with itself, type, flags, sequence, port."""
REQUEST, ACK, DUMP = 1, 4, 0x300
"""Flags of a request (NLM_F_...)."""
ERROR, DONE = 2, 3
"""Types of the messages that end an answer (NLMSG_...)."""

_CODE: Final = struct.Struct("=i")
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct nlattr: length with itself, type
_TYPE_MASK: Final = 0x3FFF  # NLA_TYPE_MASK: two flags share the field


def message(kind: int, flags: int, body: bytes) -> bytes:
    """Give a message for a socket that asks one thing at a time."""
    return HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body


def messages(packet: bytes) -> Iterator[tuple[int, bytes]]:
    """Give the type of each message of a packet, and all of the message with its header."""
    while len(packet) >= HEADER.size:
        length, kind, _, _, _ = HEADER.unpack_from(packet)
        if length < HEADER.size:
            return
        yield kind, packet[:length]
        packet = packet[(length + 3) & ~3 :]


def error_of(whole: bytes) -> int:
    """Give the errno in a message that ends an answer; 0 if all is well."""
    has_code = len(whole) >= HEADER.size + _CODE.size
    return -int(_CODE.unpack_from(whole, HEADER.size)[0]) if has_code else 0


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Give the type and the content of each attribute."""
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]


def attribute(kind: int, content: bytes) -> bytes:
    """Give an attribute without its padding, as the last one of a message may be."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content
