"""What the trust between both sides rests on: join strings, spellings, challenges, sessions."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.trust import (
    Authority,
    JoinString,
    certificate_sha256,
    from_base64url,
    is_join_string,
    pinned_pem,
    signed_message,
    to_base64url,
)
from fedra_server.errors import RefusedError
from fedra_server.http import challenges, sessions
from fedra_server.http.challenges import Challenges
from fedra_server.http.sessions import Sessions

HOSTS = st.from_regex(r"\A(https|http)://[a-z0-9.-]{1,40}(:[0-9]{1,5})?(/[a-z0-9]{1,9})?\Z")
SECRETS = st.from_regex(r"\A[0-9a-f]{8}-[0-9a-f]{40}\Z")
DIGESTS = st.from_regex(r"\A[0-9a-f]{64}\Z")
NOW = 1_000_000.0


@given(HOSTS, SECRETS, DIGESTS, st.sampled_from(["", "/", " ", "\n"]))
def test_a_join_string_reads_as_it_was_written(
    address: str, secret: str, ca_sha256: str, around: str
) -> None:
    written = JoinString(address, secret, ca_sha256)
    assert JoinString.parse(f" {written}{around.strip('/')}") == written
    assert JoinString.parse(f"{address}/#{secret}.{ca_sha256}") == written
    assert is_join_string(str(written))
    assert not is_join_string(address)
    assert secret not in repr(written)


@given(HOSTS, SECRETS, DIGESTS, st.data())
def test_a_join_string_that_lost_a_character_is_none_or_another(
    address: str, secret: str, ca_sha256: str, data: st.DataObject
) -> None:
    text = str(JoinString(address, secret, ca_sha256))
    lost = data.draw(st.integers(0, len(text) - 1))
    try:
        read = JoinString.parse(text[:lost] + text[lost + 1 :])
    except ValueError:
        return
    assert read != JoinString.parse(text)
    assert read.ca_sha256 == ca_sha256


@given(HOSTS, SECRETS)
def test_what_is_wrong_with_a_join_string_is_told_without_its_secret(
    address: str, secret: str
) -> None:
    with pytest.raises(ValueError, match="FINGERPRINT") as refusal:
        JoinString.parse(f"{address}#{secret}.cut")
    assert secret not in str(refusal.value)


@given(st.binary(max_size=80))
def test_bytes_have_one_spelling(data: bytes) -> None:
    text = to_base64url(data)
    assert from_base64url(text) == data
    with pytest.raises(ValueError, match="base64"):
        from_base64url(text + "=")
    others = [text[:-1] + last for last in "AEgwBCz" if text and text[-1] != last]
    for other in others:
        try:
            assert from_base64url(other) != data
        except ValueError:
            continue


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_no_two_messages_are_signed_alike(one: list[str], other: list[str]) -> None:
    def message(parts: list[str]) -> bytes | None:
        try:
            return signed_message("session", "0" * 64, *parts)
        except ValueError:
            return None

    assert one == other or message(one) is None or message(one) != message(other)


@given(st.binary(min_size=3, max_size=300), st.binary(min_size=3, max_size=300))
def test_only_the_certificate_that_was_named_is_trusted(der: bytes, smuggled: bytes) -> None:
    pem, more = ssl.DER_cert_to_PEM_cert(der), ssl.DER_cert_to_PEM_cert(smuggled)
    digest = certificate_sha256(pem)
    assert pinned_pem(Authority(ca_pem=pem, ca_sha256=digest), digest) == pem
    for text in (pem + more, more + pem, f"{pem}x", f"x{pem}"):
        with pytest.raises(ValueError, match="exactly one"):
            pinned_pem(Authority(ca_pem=text, ca_sha256=digest), digest)
    if der != smuggled:
        with pytest.raises(ValueError, match="not the one"):
            pinned_pem(Authority(ca_pem=more, ca_sha256=digest), digest)


@given(st.floats(0, challenges.LIFETIME_S - 1), st.integers(0, 100), st.integers(1, 0x7F))
def test_a_challenge_is_good_once_unaltered_and_for_a_while(
    age_s: float, place: int, flip: int
) -> None:
    drawn = Challenges()
    challenge = drawn.draw(NOW)
    drawn.check(challenge, NOW + age_s)
    drawn.take(challenge, NOW + age_s)
    place %= len(challenge)
    altered = challenge[:place] + chr(ord(challenge[place]) ^ flip) + challenge[place + 1 :]
    refused: list[Callable[[], None]] = [
        lambda: drawn.take(challenge, NOW + age_s),
        lambda: drawn.check(challenge, NOW + challenges.LIFETIME_S + 1),
        lambda: drawn.check(altered, NOW + age_s),
        lambda: Challenges().check(challenge, NOW + age_s),
        lambda: drawn.check("", NOW),
        lambda: drawn.check("zz.1.2", NOW),
    ]
    for attempt in refused:
        with pytest.raises(RefusedError) as refusal:
            attempt()
        assert refusal.value.code is ProblemCode.CHALLENGE_INVALID


def test_of_many_who_take_a_challenge_at_once_one_gets_it() -> None:
    drawn = Challenges()
    challenge = drawn.draw(NOW)
    winners: list[int] = []
    together = threading.Barrier(8)

    def take(number: int) -> None:
        together.wait()
        try:
            drawn.take(challenge, NOW)
        except RefusedError:
            return
        winners.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 50_000)), max_size=30))
def test_a_client_has_few_sessions_and_none_for_ever(opened: list[tuple[int, float]]) -> None:
    kept = Sessions()
    now, last = NOW, dict[ClientId, tuple[str, float]]()
    for number, later_s in opened:
        now += later_s
        client = ClientId(f"client-{number}")
        last[client] = (kept.open(client, now), now)
        assert kept.client_of(last[client][0], now) == client
    assert len(kept) <= 4 * len(last)
    for client, (secret, since) in last.items():
        alive = now < since + sessions.LIFETIME_S
        assert kept.client_of(secret, now) == (client if alive else None)
        kept.end_all(client)
        assert kept.client_of(secret, now) is None
    assert kept.client_of("nobody's", now) is None
    assert len(kept) == 0
