"""What the kernel is given: keys that decrypt what is on the wire, and the right numbers."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from nbdlink.transport import ktls
from nbdlink.transport.tls import TLSStream
from tests.wire import records

from .pairs import AES_128, AES_256, CHACHA20, KINDS, TLS_1_2, aside, exactly, pair

APPLICATION_DATA = 23
AEAD = {AES_128: AESGCM, AES_256: AESGCM, CHACHA20: ChaCha20Poly1305}
HASHES = {"sha256": hashes.SHA256, "sha384": hashes.SHA384}


# Counting. Each side counts by itself, by what it sees of the records.


@pytest.mark.parametrize("suite", AEAD)
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_count_the_same_records(kind, suite):
    if kind == "keys" and suite == AES_256:
        suite = AES_128  # OpenSSL takes keys for SHA-256 only
    with pair(kind, suite=suite, exact=True) as ends:
        for length in (1, 20_000, 0, 300_000, 16_384):
            _exchange(ends, length)
        client, server = ends.client, ends.server
        assert client.session.cipher == suite
        assert (client.records_sent, client.records_received) == (
            server.records_received,
            server.records_sent,
        )
        # 1 + 2 + 0 + 19 + 1, as 300000 bytes are two chunks of 9 records and 1 record more.
        assert client.records_sent == 23


def _exchange(ends, length):
    for source, sink in ((ends.client, ends.server), (ends.server, ends.client)):
        with aside(source.sendall, bytes(length)):
            assert exactly(sink, length) == bytes(length)


def test_session_tickets_count():
    with pair(exact=True) as ends:
        ends.server.sendall(b"x")
        assert exactly(ends.client, 1) == b"x"
        assert ends.client.records_received == ends.server.records_sent > 1


def test_nothing_is_counted_without_tls_1_3():
    with pair(newest=TLS_1_2, exact=True) as ends:
        _exchange(ends, 10)
        assert ends.client.records_sent == ends.client.records_received == 0


# Keys.


def independently(digest, secret, label, length):
    """HKDF-Expand-Label, by somebody else's HKDF."""
    label = b"tls13 " + label
    info = struct.pack(">H", length) + bytes([len(label)]) + label + bytes([0])
    return HKDFExpand(HASHES[digest](), length, info).derive(secret)


@pytest.mark.parametrize("digest", HASHES)
@pytest.mark.parametrize(("label", "length"), [(b"key", 16), (b"key", 32), (b"iv", 12)])
def test_keys_are_derived_as_by_others(digest, label, length):
    secret = bytes(range(HASHES[digest].digest_size))
    derived = ktls._expand_label(digest, secret, label, length)
    assert derived == independently(digest, secret, label, length)


def keys(stream: TLSStream, side):
    """Give key, nonce and sequence number as the kernel would be told them."""
    cipher = ktls._CIPHERS[stream.session.cipher]
    sends = (side == "SERVER") == stream.is_server
    sequence = stream.records_sent if sends else stream.records_received
    info = ktls._info(cipher, stream.secret(side), sequence)
    # include/uapi/linux/tls.h: version, cipher, iv, key, salt, rec_seq.
    version, number = struct.unpack_from("=HH", info)
    assert (version, number) == (0x0304, cipher.number)
    parts = struct.unpack(f"{12 - cipher.salt}s{cipher.key}s{cipher.salt}s8s", info[4:])
    iv, key, salt, number = parts
    return key, salt + iv, int.from_bytes(number)


def decrypt(suite, key, nonce, sequence, record):
    """Decrypt a record as RFC 8446, section 5.2, has it; give type and data."""
    mixed = (int.from_bytes(nonce) ^ sequence).to_bytes(12)
    plain = AEAD[suite](key).decrypt(mixed, record[5:], record[:5]).rstrip(b"\0")
    return plain[-1], plain[:-1]


@pytest.mark.parametrize("suite", AEAD)
@pytest.mark.parametrize("kind", ["one certificate", "two certificates"])
@pytest.mark.parametrize("side", ["CLIENT", "SERVER"])
def test_the_next_record_can_be_decrypted_with_what_the_kernel_is_told(side, kind, suite):
    with pair(kind, suite=suite, exact=True, wired=True) as ends:
        _exchange(ends, 40_000)
        source, sink = ends.client, ends.server
        direction = "up"
        if side == "SERVER":
            source, sink, direction = sink, source, "down"
        known = keys(source, side), keys(sink, side)
        assert known[0] == known[1], "the two sides would tell their kernels different things"
        source.sendall(b"secret")
        assert exactly(sink, 6) == b"secret"
        kind, last = records(ends.wire.carried[direction])[-1]
        assert kind == APPLICATION_DATA
        assert b"secret" not in last
        assert decrypt(suite, *known[0], last) == (APPLICATION_DATA, b"secret")


def test_the_next_record_can_be_decrypted_with_a_shared_key():
    with pair("keys", exact=True, wired=True) as ends:
        _exchange(ends, 40_000)
        known = keys(ends.client, "CLIENT")
        ends.client.sendall(b"secret")
        assert exactly(ends.server, 6) == b"secret"
        last = records(ends.wire.carried["up"])[-1][1]
        assert decrypt(AES_128, *known, last) == (APPLICATION_DATA, b"secret")


def test_both_sides_have_the_same_secrets():
    with pair(exact=True) as ends:
        for side in ("CLIENT", "SERVER"):
            assert ends.client.secret(side) == ends.server.secret(side) is not None


def test_secrets_are_forgotten_once_they_are_of_no_use():
    with pair() as ends:
        assert ends.client.secret("CLIENT") is None


def test_secrets_are_not_shown_with_the_rest():
    with pair(exact=True) as ends:
        assert ends.client.secret("CLIENT").hex() not in repr(ends.client._judgement)
        assert repr(ends.client.secret("CLIENT")) not in repr(ends.client._judgement)


# What cannot be handed over.


def test_unix_sockets_stay_here():
    with pair(family="unix", exact=True) as ends:
        assert "TCP only" in ktls.obstacle(ends.client)


def test_tls_1_2_stays_here():
    with pair(family="tcp", newest=TLS_1_2, exact=True) as ends:
        assert "TLSv1.2 was negotiated" in ktls.obstacle(ends.client)
