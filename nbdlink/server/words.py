"""The engine loop's view of headers: as few numbers as there can be.

Magic, flags and type are one number, so that a single comparison tells a plain read or write, and
replies have half as many numbers to pack. That is worth a tenth of the interpreter's share.
"""

from __future__ import annotations

import struct
from typing import Final

from nbdlink.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ReplyFlag,
    ReplyType,
)

REQUEST_WORDS: Final = struct.Struct(">QQQI").unpack_from
EXTENDED_REQUEST_WORDS: Final = struct.Struct(">QQQQ").unpack_from
SIMPLE_WORDS: Final = struct.Struct(">QQ")
STRUCTURED_DATA_WORDS: Final = struct.Struct(">QQIQ")
EXTENDED_DATA_WORDS: Final = struct.Struct(">QQQQQ")
EXTENDED_WORDS: Final = struct.Struct(">QQQQ")

SIMPLE_OK: Final = SIMPLE_REPLY_MAGIC << 32
STRUCTURED_DATA: Final = STRUCTURED_REPLY_MAGIC << 32 | ReplyFlag.DONE << 16 | ReplyType.OFFSET_DATA
EXTENDED_DATA: Final = EXTENDED_REPLY_MAGIC << 32 | ReplyFlag.DONE << 16 | ReplyType.OFFSET_DATA
EXTENDED_OK: Final = EXTENDED_REPLY_MAGIC << 32 | ReplyFlag.DONE << 16 | ReplyType.NONE
