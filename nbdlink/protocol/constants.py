"""Numbers of the NBD protocol, under the names of its specification.

Source: `doc/proto.md` of the NBD project, "Values". Members drop the specification's
prefix: `NBD_OPT_GO` is `Option.GO`, `NBD_FLAG_SEND_FUA` is `TransmissionFlag.SEND_FUA`.
Numbers of extensions that nbdlink knows about but does not negotiate are listed too, so that
messages about them can name them.
"""

from __future__ import annotations

import enum
from typing import Final

# Handshake magics: "NBDMAGIC", "IHAVEOPT", the reply magic, and the oldstyle server's second.
INIT_PASSWD: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
OLDSTYLE_MAGIC: Final = 0x0000420281861253

# Transmission magics.
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# Zeroes that end the answer to EXPORT_NAME unless NO_ZEROES was agreed on.
EXPORT_NAME_ZEROES: Final = 124

MAX_STRING: Final = 4096
"""Bytes in a name or description ("Values": strings SHOULD be no longer)."""

MAX_OPTION_DATA: Final = 64 * 1024
"""Bytes of option or option-reply data that either machine will hold in memory."""

MAX_SKIPPED_OPTION_DATA: Final = 1024 * 1024
"""Bytes of an oversized option that a server reads past in order to answer TOO_BIG."""

MAX_OPTIONS: Final = 1024
"""Options that a server answers on one connection before it takes the client for an attack."""

MAX_OPTION_REPLIES: Final = 16 * 1024
"""Replies to one option that a client reads (an export list has one for each export)."""

MAX_OPTION_REPLY_BYTES: Final = 16 * 1024 * 1024
"""Bytes in all replies to one option together that a client takes."""

DEFAULT_MINIMUM_BLOCK: Final = 1
DEFAULT_PREFERRED_BLOCK: Final = 4096
DEFAULT_MAXIMUM_PAYLOAD: Final = 32 * 1024 * 1024
"""Size constraints in bytes where none are advertised ("Size constraints")."""

MAX_MINIMUM_BLOCK: Final = 64 * 1024

MAX_EXTENTS: Final = 1 << 20
"""Extents in one block status chunk ("Structured reply types": servers SHOULD send no more)."""

ALLOCATION_CONTEXT: Final = "base:allocation"
"""The metadata context that the specification itself defines."""

DEPTH_CONTEXT: Final = "qemu:allocation-depth"
"""QEMU's context of where data comes from: 0 from nowhere, 1 from the image itself, 2 and more
from what it is based on."""

BITMAP_CONTEXT: Final = "qemu:dirty-bitmap:"
"""What the contexts of QEMU's bitmaps begin with (docs/interop/nbd.txt): 1 is dirty."""

MAX_EXPORT_SIZE: Final = 2**63 - 1
"""Bytes; the largest file offset that Linux has (off_t, loff_t)."""


class HandshakeFlag(enum.IntFlag):
    """What the server says of the handshake, in its greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class ClientFlag(enum.IntFlag):
    """What the client answers to the greeting."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlag(enum.IntFlag):
    """What an export can do; the kernel's driver takes the same bits."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(enum.IntEnum):
    """What a client can ask for before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """How a server answers an option; errors have bit 31 set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x8000_0001
    ERR_POLICY = 0x8000_0002
    ERR_INVALID = 0x8000_0003
    ERR_PLATFORM = 0x8000_0004
    ERR_TLS_REQD = 0x8000_0005
    ERR_UNKNOWN = 0x8000_0006
    ERR_SHUTDOWN = 0x8000_0007
    ERR_BLOCK_SIZE_REQD = 0x8000_0008
    ERR_TOO_BIG = 0x8000_0009
    ERR_EXT_HEADER_REQD = 0x8000_000A


OPTION_REPLY_ERROR: Final = 0x8000_0000
"""The bit that marks an option reply as an error."""


class InfoType(enum.IntEnum):
    """Kinds of information in answer to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(enum.IntEnum):
    """Request types of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(enum.IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class HeaderStyle(enum.IntEnum):
    """Which headers the transmission phase uses, as the handshake agreed; later ones win."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class ReplyFlag(enum.IntFlag):
    """Flags of a structured or extended reply chunk."""

    DONE = 1 << 0


class ReplyType(enum.IntEnum):
    """Types of structured and extended reply chunks; errors have bit 15 set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


REPLY_TYPE_ERROR: Final = 0x8000
"""The bit that marks a reply chunk as an error."""


class AllocationFlag(enum.IntFlag):
    """What the `base:allocation` context says of an extent; neither means data."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class Error(enum.IntEnum):
    """Error values of replies; on Linux they equal errno."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


def option_name(number: int) -> str:
    """Name an option as the specification does, known or not."""
    try:
        return f"NBD_OPT_{Option(number).name}"
    except ValueError:
        return f"option {number}"


def reply_name(number: int) -> str:
    """Name an option reply as the specification does, known or not."""
    try:
        return f"NBD_REP_{OptionReply(number).name}"
    except ValueError:
        return f"reply type {number:#x}"


def command_name(number: int) -> str:
    """Name a request type as the specification does, known or not."""
    try:
        return f"NBD_CMD_{Command(number).name}"
    except ValueError:
        return f"command {number}"
