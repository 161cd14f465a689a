"""What an export tells about its storage, and what a catalogue finds."""

from __future__ import annotations

import pytest

from nbdlink.errors import ConfigError
from nbdlink.protocol.constants import TransmissionFlag
from nbdlink.server import Catalogue, Export

from .fakes import MemoryStorage

WRITING = (
    TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
)


@pytest.fixture
def storage():
    return MemoryStorage(4096)


def test_an_export_offers_what_its_storage_can(storage):
    flags = Export("", storage).flags()
    assert flags & TransmissionFlag.HAS_FLAGS
    assert flags & WRITING == WRITING
    assert not flags & TransmissionFlag.READ_ONLY


@pytest.mark.parametrize(
    ("attribute", "flag"),
    [
        ("can_trim", TransmissionFlag.SEND_TRIM),
        ("can_zero", TransmissionFlag.SEND_WRITE_ZEROES),
        ("can_fast_zero", TransmissionFlag.SEND_FAST_ZERO),
        ("can_cache", TransmissionFlag.SEND_CACHE),
        ("can_multi_conn", TransmissionFlag.CAN_MULTI_CONN),
        ("is_rotational", TransmissionFlag.ROTATIONAL),
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_each_ability_is_a_flag(storage, attribute, flag, value):
    setattr(storage, attribute, value)
    assert bool(Export("", storage).flags() & flag) is value


def test_fast_zeroes_need_zeroes(storage):
    storage.can_zero = False
    assert not Export("", storage).flags() & TransmissionFlag.SEND_FAST_ZERO


@pytest.mark.parametrize("by_wish", [True, False])
def test_a_read_only_export_offers_no_writing(storage, by_wish):
    storage.read_only = not by_wish
    flags = Export("", storage, read_only=by_wish).flags()
    assert flags & TransmissionFlag.READ_ONLY
    assert not flags & WRITING


def test_a_server_for_one_client_promises_no_second_connection(storage):
    flags = Export("", storage, multi_conn=False).flags()
    assert not flags & TransmissionFlag.CAN_MULTI_CONN


def test_the_size_is_that_of_whole_blocks():
    storage = MemoryStorage(4096 + 100, minimum_block=512)
    assert Export("", storage).size == 4096


def test_the_rules_are_the_storages_limits():
    rules = Export("", MemoryStorage(4096, minimum_block=512)).rules()
    assert (rules.size, rules.minimum_block, rules.maximum_payload) == (4096, 512, 32 << 20)


@pytest.mark.parametrize(
    ("name", "description"),
    [("x" * 4097, ""), ("", "x" * 4097), ("a\0b", ""), ("\ud800", "")],
    ids=["long name", "long description", "NUL", "half a character"],
)
def test_what_the_protocol_cannot_say_is_no_export(storage, name, description):
    with pytest.raises(ConfigError, match="export"):
        Export(name, storage, description)


def test_impossible_block_sizes_are_no_export(storage):
    storage.minimum_block = 3
    with pytest.raises(ConfigError, match="minimum block size of 3"):
        Export("", storage)


def test_a_catalogue_finds_by_the_exact_name(storage):
    one, two = Export("one", storage), Export("", storage)
    catalogue = Catalogue([one, two])
    assert catalogue.find("one") is one
    assert catalogue.find("") is two
    assert catalogue.find("ONE") is None


def test_the_empty_name_stands_for_nothing_else(storage):
    assert Catalogue([Export("one", storage)]).find("") is None


def test_a_catalogue_keeps_the_order(storage):
    names = ["b", "a", "c"]
    assert [e.name for e in Catalogue(Export(n, storage) for n in names)] == names


def test_a_storage_of_two_exports_is_closed_once(storage):
    assert Catalogue([Export("a", storage), Export("b", storage)]).storages == [storage]


def test_two_exports_of_one_name(storage):
    with pytest.raises(ConfigError, match="two exports have the name 'a'"):
        Catalogue([Export("a", storage), Export("a", storage)])


def test_nothing_to_serve():
    with pytest.raises(ConfigError, match="nothing to serve"):
        Catalogue([])


@pytest.mark.parametrize(
    ("signature", "wrong"),
    [
        ("", "has 0 characters"),
        ("a" * 201, "has 201 characters"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "not printable ASCII"),
        ("a\nb", "not printable ASCII"),
        ("auto:1", "begins with 'auto:'"),
    ],
)
def test_a_signature_that_cannot_be_told_is_refused(storage, signature, wrong):
    with pytest.raises(ConfigError, match=wrong):
        Export("", storage, given_signature=signature)


def test_a_given_signature_goes_before_the_storage_s_own(storage):
    assert Export("", storage, given_signature="a b").signature == "a b"


@pytest.mark.parametrize(
    ("further", "offered"),
    [
        ((), ("base:allocation",)),
        (("qemu:dirty-bitmap:b",), ("base:allocation", "qemu:dirty-bitmap:b")),
        (("qemu:nothing", "qemu:allocation-depth"), ("base:allocation", "qemu:allocation-depth")),
    ],
)
def test_qemus_contexts_are_offered_if_they_are_asked_for_and_there(storage, further, offered):
    storage.contexts = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b")
    assert Export("", storage, further_contexts=further).contexts == offered
