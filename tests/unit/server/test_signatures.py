"""What no holder of a key has signed is refused, however it is made."""

from __future__ import annotations

import pytest

from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.trust import from_base64url, to_base64url
from fedra_server.errors import RefusedError
from fedra_server.signatures import check_signature
from tests.support.keys import SiteKey

MESSAGE = b"a message"
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
SMALL_ORDER = (
    "0100000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)
NEUTRAL = bytes.fromhex(SMALL_ORDER[0])


def refusal_of(public_key: str, signature: str, message: bytes = MESSAGE) -> ProblemCode | None:
    try:
        check_signature(public_key, signature, message)
    except RefusedError as refusal:
        return refusal.code
    return None


def is_refused(public_key: str, signature: str, message: bytes = MESSAGE) -> bool:
    return refusal_of(public_key, signature, message) is ProblemCode.SIGNATURE_INVALID


def test_what_the_holder_has_signed_is_taken_and_nothing_else() -> None:
    key, other = SiteKey(), SiteKey()
    signature = key.sign(MESSAGE)
    assert refusal_of(key.public, signature) is None
    assert is_refused(key.public, signature, MESSAGE + b".")
    assert is_refused(other.public, signature)
    assert is_refused(key.public, other.sign(MESSAGE))


def test_a_signature_has_one_spelling() -> None:
    """Adding the group's order to its second half gives another one that is as good to some."""
    key = SiteKey()
    signature = from_base64url(key.sign(MESSAGE))
    scalar = int.from_bytes(signature[32:], "little") + GROUP_ORDER
    assert is_refused(key.public, to_base64url(signature[:32] + scalar.to_bytes(32, "little")))


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_a_key_that_anybody_could_sign_for_is_none(point: str) -> None:
    """With a point of small order as the key, a signature of zeros fits one message in eight."""
    key = bytes.fromhex(point)
    for first in (key, NEUTRAL):
        for number in range(64):
            signature = to_base64url(first + bytes(32))
            assert is_refused(to_base64url(key), signature, b"message %d" % number)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_keys_and_signatures_of_another_length_are_refused(length: int) -> None:
    key = SiteKey()
    assert is_refused(to_base64url(bytes(length)), key.sign(MESSAGE))
    if length != 64:
        assert is_refused(key.public, to_base64url(bytes(length)))
    assert is_refused(key.public, "not base64url!")
