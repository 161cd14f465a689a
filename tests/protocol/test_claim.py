"""Claims and testimonies: what is said comes back, and what is malformed is no claim."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdlink.protocol.claim import NAMESPACE, Claim
from nbdlink.protocol.claim import Testimony as Said  # or it would be taken for a test
from nbdlink.protocol.constants import MAX_STRING

SESSION = "0123456789abcdef0123456789abcdef"
MOST = (1 << 63) - 1

sessions = st.text("0123456789abcdef", min_size=32, max_size=32)
numbers = st.integers(0, MOST)
claims = st.builds(Claim, sessions, numbers, numbers, st.none() | st.integers(1, 65535))
signatures = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=255)


@given(claims)
def test_a_claim_comes_back(claim):
    assert Claim.parse(claim.query) == claim


@given(claims)
def test_a_claim_is_a_query_that_the_protocol_can_carry(claim):
    assert claim.query.startswith(NAMESPACE)
    assert len(claim.query) <= MAX_STRING


@given(claims, st.permutations(range(3)), st.text(st.characters(exclude_characters=";=")))
def test_order_does_not_matter_and_what_is_not_known_is_left_alone(claim, order, word):
    items = claim.query.removeprefix(NAMESPACE).split(";")
    shuffled = [*(items[i] for i in order), *items[3:], f"later{word}={word}"]
    assert Claim.parse(NAMESPACE + ";".join(shuffled)) == claim


@given(st.text())
def test_anything_else_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - which one is no matter of its words
        Claim.parse(text)
    with pytest.raises(ValueError):  # noqa: PT011
        Claim.parse(NAMESPACE + text)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "fences",
        f"session={SESSION}",
        f"session={SESSION};channel=0",
        f"session={SESSION};channel=0;generation=",
        f"session={SESSION};channel=0;generation=-1",
        f"session={SESSION};channel=0;generation=+1",
        f"session={SESSION};channel=0;generation=1_0",
        f"session={SESSION};channel=0;generation=01",
        f"session={SESSION};channel=0;generation= 1",
        f"session={SESSION};channel=0;generation=1\n",
        f"session={SESSION};channel=0;generation=\N{ARABIC-INDIC DIGIT ONE}",
        f"session={SESSION};channel=0;generation={MOST + 1}",
        f"session={SESSION};channel=0;generation={'9' * 4000}",
        f"session={SESSION};channel=0;generation=1;generation=2",
        f"session={SESSION};channel=0;generation=1;",
        f"session={SESSION};channel=0;generation=1;notice=",
        f"session={SESSION};channel=0;generation=1;notice=0",
        f"session={SESSION};channel=0;generation=1;notice=65536",
        f"session={SESSION.upper()};channel=0;generation=1",
        f"session={SESSION[1:]};channel=0;generation=1",
        f"session={SESSION}\n;channel=0;generation=1",
        f"session={SESSION}0;channel=0;generation=1",
        "channel=0;generation=1",
    ],
)
def test_what_is_malformed_is_no_claim(said):
    with pytest.raises(ValueError):  # noqa: PT011
        Claim.parse(NAMESPACE + said)


@pytest.mark.parametrize(
    "numbers", [(-1, 0), (0, -1), (MOST + 1, 0), (0, 0, 0), (0, 0, 65536)], ids=str
)
def test_what_could_not_be_sent_cannot_be_claimed(numbers):
    with pytest.raises(ValueError):  # noqa: PT011
        Claim(SESSION, *numbers)


@given(st.booleans(), st.none() | signatures)
def test_a_testimony_comes_back(fences, signature):
    testimony = Said(fences, signature)
    assert Said.parse(testimony.contexts) == testimony


@given(st.lists(st.text(max_size=40)))
def test_what_others_list_says_nothing(contexts):
    others = [name for name in contexts if not name.startswith(NAMESPACE)]
    assert Said.parse([*others, "x-nbdlink:later", "x-nbdlink:fences=no"]) == Said()


def test_a_signature_is_taken_up_to_a_bearable_length():
    said = Said.parse([f"{NAMESPACE}signature={'a' * 4000}"]).signature
    assert said == "a" * 255
