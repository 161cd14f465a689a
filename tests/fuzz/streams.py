"""Make what a client might say, from a random number generator: equal seeds say the same."""

from __future__ import annotations

import struct

SIZE = 1 << 20
EDGES = [
    0, 1, 2, 27, 28, 31, 32, 511, 512, 4096, 8192, 32767, 32768, 65536, 131072, 131073, 262144,
    SIZE - 1, SIZE, SIZE + 1, 2**25, 2**25 + 1, 2**26 + 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1,
]  # fmt: skip
NAMES = [b"", b"", b"", b"other", b"nope", b"\xff", b"a\0b", b"x" * 5000]
CLAIM = b"x-nbdlink:session=0123456789abcdef0123456789abcdef;channel=0;generation=7"
QUERIES = [
    b"base:allocation", b"base:", b"base:x", b"qemu:", b"no colon", b":", b"\xff:", b"",
    CLAIM, CLAIM, CLAIM[:-1], b"x-nbdlink:fences",
]  # fmt: skip


def number(rng, bits=64):
    """Give a number that fits into `bits`, most often one that matters."""
    if rng.randrange(4):
        return min(rng.choice(EDGES), 2**bits - 1)
    return rng.getrandbits(rng.randrange(1, bits + 1))


def payload(rng, length):
    return bytes([rng.randrange(256)]) * length


def string(data):
    return struct.pack(">I", len(data)) + data


def option(rng, number_=None):
    kind = rng.choice([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 99]) if number_ is None else number_
    if kind in (6, 7):
        asked = [rng.randrange(6) for _ in range(rng.randrange(3))]
        data = string(rng.choice(NAMES)) + struct.pack(f">H{len(asked)}H", len(asked), *asked)
    elif kind in (9, 10):
        queries = [rng.choice(QUERIES) for _ in range(rng.randrange(4))]
        data = string(rng.choice(NAMES)) + struct.pack(">I", len(queries))
        data += b"".join(map(string, queries))
    else:
        data = rng.choice(NAMES) if kind == 1 or not rng.randrange(8) else b""
    return b"IHAVEOPT" + struct.pack(">II", kind, len(data)) + data


def haggling(rng):
    """Give the client's side of a handshake, most often one that comes to transmission."""
    parts = [struct.pack(">I", rng.choice([3, 3, 3, 3, 3, 1, 2, 0, 4]))]
    style = rng.randrange(3)
    if style:
        parts.append(b"IHAVEOPT" + struct.pack(">II", 8 if style == 1 else 11, 0))
        if rng.randrange(3):
            query = string(b"") + struct.pack(">I", 1) + string(b"base:allocation")
            parts.append(b"IHAVEOPT" + struct.pack(">II", 10, len(query)) + query)
    parts += [option(rng) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    if rng.randrange(10):
        parts.append(b"IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0))
    return b"".join(parts), style


def request(rng, style):
    """Give a request, most often a good one."""
    command = rng.choice([0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 7, 7, 2, 8, 65535])
    if command == 2 and rng.randrange(4):
        command = 0
    flags = rng.choice([0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 33, rng.getrandbits(16)])
    if rng.randrange(4):
        offset = rng.randrange(SIZE)
        length = min(rng.choice(EDGES[:17]), SIZE - offset)
    else:
        offset, length = number(rng), number(rng, 64 if style == 2 else 32)
    if command == 3 and rng.randrange(4):
        offset = length = 0
    cookie = rng.getrandbits(64)
    data = b""
    if style == 2:
        if command == 1 and rng.randrange(8):
            flags |= 32
        if flags & 32:
            length = min(length, 1 << 21)
            data = payload(rng, length)
            if command == 7 and rng.randrange(4):
                ids = [rng.choice([1, 1, 0, 2, 2**32 - 1]) for _ in range(rng.randrange(4))]
                data = struct.pack(f">Q{len(ids)}I", number(rng), *ids)
                length = len(data)
        header = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
    else:
        if command == 1:
            length = min(length, 1 << 21)
            data = payload(rng, length)
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
    return header + data


def broken(rng, data):
    """Give the same with something wrong in it, or only its beginning."""
    data = bytearray(data)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice([0, 1, 127, 128, 255])
            case 2:
                del data[at : at + rng.choice([1, 2, 4, 8, 28])]
            case 3:
                data[at:at] = payload(rng, rng.choice([1, 2, 4, 8, 28]))
            case 4:
                del data[at:]
    return bytes(data)


def conversation(rng):
    """Give all that a client says."""
    if rng.randrange(16) == 0:
        return rng.randbytes(rng.randrange(2000))
    said, style = haggling(rng)
    requests = b"".join(request(rng, style) for _ in range(rng.choice([0, 1, 5, 20])))
    match rng.randrange(4):
        case 0:
            return said + requests
        case 1:
            return broken(rng, said) + requests
        case 2:
            return said + broken(rng, requests)
    return broken(rng, said + requests)
