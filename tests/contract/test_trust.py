"""Who gets in, over real sockets with TLS: pins, keys, challenges, sessions, tokens."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import RejoinRequest
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.trust import JoinString, pinned_pem
from fedra_server.authority import AuthorityFiles
from fedra_server.config import ServerConfig
from fedra_server.errors import ConfigurationError
from fedra_server.http import connections, securing
from fedra_server.http.key_changes import MOST_AN_HOUR
from fedra_server.inviting import TokenWish, invite
from fedra_server.leaving import end_membership
from tests.support.headquarters import PROTOCOL, Headquarters, headquarters, home_in
from tests.support.keys import (
    SiteKey,
    ask,
    authority_of,
    draw_challenge,
    enrol_key,
    open_session,
)


@pytest.fixture(scope="module")
def hq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headquarters]:
    """A secured server that takes join strings only."""
    config = ServerConfig(tls="on", enrolment="token", max_enrolments_per_minute=10_000)
    with headquarters(home_in(tmp_path_factory.mktemp("home")), config) as running:
        yield running


def join_string(hq: Headquarters, uses: int = 1, client_id: str | None = None) -> JoinString:
    """Do what `fedra-server token create` does."""
    services = hq.services
    wish = TokenWish(uses=uses, client_id=client_id, address=hq.url)
    now = services.clock.now()
    made = invite(services.store, services.home, services.config, wish, by="test", now=now)
    return made.join_string


def trusting(hq: Headquarters) -> ssl.SSLContext:
    """Trust what the fingerprint of a join string names, and nothing else."""
    with httpx.Client(base_url=hq.url, verify=False) as stranger:  # noqa: S501 (nothing secret is sent)
        authority = authority_of(stranger)
    pem = pinned_pem(authority, hq.services.authority.ca_sha256)
    return ssl.create_default_context(cadata=pem)


@contextmanager
def site_http(hq: Headquarters) -> Iterator[httpx.Client]:
    """Open a connection that is secured and pinned."""
    with httpx.Client(base_url=hq.url, headers=PROTOCOL, timeout=30, verify=trusting(hq)) as http:
        yield http


@pytest.fixture
def http(hq: Headquarters) -> Iterator[httpx.Client]:
    with site_http(hq) as opened:
        yield opened


def check_refused(answer: httpx.Response, code: ProblemCode) -> Problem:
    problem = Problem.model_validate_json(answer.content)
    assert problem.code is code, answer.text
    assert answer.status_code == problem.status
    assert problem.remedy
    return problem


def member(hq: Headquarters, http: httpx.Client, key: SiteKey) -> str:
    """Enrol with a join string of its own; give the client's id."""
    return enrol_key(http, key, join_secret=join_string(hq).secret)


def use(http: httpx.Client, session: str, route: Route = routes.CLIENT_STATUS) -> httpx.Response:
    headers = {"Authorization": f"Bearer {session}"}
    return http.request(route.method, route.path, headers=headers)


def test_a_site_needs_its_join_string_only(hq: Headquarters, http: httpx.Client) -> None:
    key = SiteKey()
    read = JoinString.parse(str(join_string(hq)))
    assert read.address == hq.url
    assert read.ca_sha256 == authority_of(http).ca_sha256
    client_id = enrol_key(http, key, "plant", join_secret=read.secret)
    answer = use(http, open_session(http, key, client_id))
    assert answer.json()["client_id"] == client_id


def test_a_server_that_does_not_hold_the_pinned_authority_is_believed_nothing(
    hq: Headquarters, tmp_path: Path
) -> None:
    with headquarters(home_in(tmp_path), ServerConfig(tls="on")) as impostor:
        with (
            httpx.Client(base_url=impostor.url, verify=trusting(hq)) as http,
            pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            http.get("/health/live")
        with (
            httpx.Client(base_url=impostor.url, verify=False) as http,  # noqa: S501
            pytest.raises(ValueError, match="not the one"),
        ):
            pinned_pem(authority_of(http), hq.services.authority.ca_sha256)


def test_a_host_name_that_the_certificate_lacks_is_refused(hq: Headquarters) -> None:
    place = httpx.URL(hq.url)
    with (
        socket.create_connection((place.host, place.port or 0)) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'hq\.example'"),
    ):
        trusting(hq).wrap_socket(plain, server_hostname="hq.example")


def test_old_tls_and_plain_http_are_turned_away(hq: Headquarters) -> None:
    place = httpx.URL(hq.url)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")  # else this side refuses first
    with pytest.warns(DeprecationWarning, match="deprecated"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        pytest.raises(ssl.SSLError),
        socket.create_connection((place.host, place.port or 0)) as plain,
    ):
        old.wrap_socket(plain, server_hostname=place.host)
    answer = httpx.get(hq.url.replace("https", "http"))
    assert (answer.status_code, "https://" in answer.text) == (400, True)


def test_nobody_enrols_without_a_join_string(hq: Headquarters, http: httpx.Client) -> None:
    for secret in (None, "00000000-guessed"):
        request = SiteKey().enrolment(hq.services.authority.ca_sha256, join_secret=secret)
        problem = check_refused(ask(http, routes.ENROL, request), ProblemCode.JOIN_TOKEN_INVALID)
        assert "guessed" not in problem.detail + problem.remedy


def test_a_stranger_learns_nothing_of_runs(hq: Headquarters, http: httpx.Client) -> None:
    ca_sha256 = hq.services.authority.ca_sha256
    request = SiteKey().enrolment(ca_sha256, run="secret-run")
    check_refused(ask(http, routes.ENROL, request), ProblemCode.JOIN_TOKEN_INVALID)
    secret = join_string(hq).secret
    request = SiteKey().enrolment(ca_sha256, run="misspelt", join_secret=secret)
    check_refused(ask(http, routes.ENROL, request), ProblemCode.NOT_FOUND)
    enrol_key(http, SiteKey(), join_secret=secret)  # the misspelt run used nothing up


@pytest.mark.parametrize("forged", ["audience", "secret", "key", "purpose"])
def test_an_enrolment_that_was_signed_for_something_else_is_refused(
    hq: Headquarters, http: httpx.Client, forged: str
) -> None:
    secret = join_string(hq).secret
    key = SiteKey()
    ours = hq.services.authority.ca_sha256
    good = key.enrolment(ours, join_secret=secret)
    signature = {
        "audience": key.enrolment("0" * 64, join_secret=secret).signature,
        "secret": key.enrolment(ours, join_secret=None).signature,
        "key": SiteKey().enrolment(ours, join_secret=secret).signature,
        "purpose": key.change_for(ours, "client", key).signature,
    }[forged]
    request = good.model_copy(update={"signature": signature})
    check_refused(ask(http, routes.ENROL, request), ProblemCode.SIGNATURE_INVALID)
    assert ask(http, routes.ENROL, good).status_code == 201


def test_two_sites_that_race_for_the_last_use_of_a_join_string(hq: Headquarters) -> None:
    secret = join_string(hq, uses=3).secret
    ca_sha256 = hq.services.authority.ca_sha256
    together = threading.Barrier(8)
    codes: list[int] = []

    def race() -> None:
        with site_http(hq) as http:
            request = SiteKey().enrolment(ca_sha256, join_secret=secret)
            together.wait()
            codes.append(ask(http, routes.ENROL, request).status_code)

    racers = [threading.Thread(target=race) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(codes) == [201] * 3 + [403] * 5


def test_a_challenge_is_answered_once(hq: Headquarters, http: httpx.Client) -> None:
    key = SiteKey()
    client_id = member(hq, http, key)
    ca_sha256 = hq.services.authority.ca_sha256
    request = key.session_request(ca_sha256, client_id, draw_challenge(http))
    assert ask(http, routes.SESSION, request).status_code == 201
    check_refused(ask(http, routes.SESSION, request), ProblemCode.CHALLENGE_INVALID)
    invented = key.session_request(ca_sha256, client_id, "1.2.3")
    check_refused(ask(http, routes.SESSION, invented), ProblemCode.CHALLENGE_INVALID)


def test_a_signature_for_another_server_opens_nothing(hq: Headquarters, http: httpx.Client) -> None:
    """A server that a client trusts as well could pass our challenge on to it."""
    key = SiteKey()
    client_id = member(hq, http, key)
    replayed = key.session_request("0" * 64, client_id, draw_challenge(http))
    check_refused(ask(http, routes.SESSION, replayed), ProblemCode.SIGNATURE_INVALID)


def test_a_forged_client_id_opens_nothing(hq: Headquarters, http: httpx.Client) -> None:
    key, victim = SiteKey(), SiteKey()
    member(hq, http, key)
    victims_id = member(hq, http, victim)
    ca_sha256 = hq.services.authority.ca_sha256
    forged = key.session_request(ca_sha256, victims_id, draw_challenge(http))
    check_refused(ask(http, routes.SESSION, forged), ProblemCode.SIGNATURE_INVALID)
    nobody = key.session_request(ca_sha256, "0" * 16, draw_challenge(http))
    problem = check_refused(ask(http, routes.SESSION, nobody), ProblemCode.NOT_AUTHENTICATED)
    assert "token create" in problem.remedy


def test_a_stolen_session_is_dead_as_soon_as_the_client_is_removed(
    hq: Headquarters, http: httpx.Client
) -> None:
    keys = [SiteKey(), SiteKey()]
    removed, other = (member(hq, http, key) for key in keys)
    sessions = [open_session(http, key, it) for key, it in zip(keys, (removed, other), strict=True)]
    assert [use(http, session).status_code for session in sessions] == [200, 200]
    now = hq.services.clock.now()
    end_membership(hq.services.store, ClientId(removed), now, removed_by="test")
    check_refused(use(http, sessions[0]), ProblemCode.CLIENT_REVOKED)
    assert use(http, sessions[1]).status_code == 200
    ca_sha256 = hq.services.authority.ca_sha256
    again = keys[0].session_request(ca_sha256, removed, draw_challenge(http))
    check_refused(ask(http, routes.SESSION, again), ProblemCode.CLIENT_REVOKED)
    enrolment = keys[0].enrolment(ca_sha256, join_secret=join_string(hq).secret)
    check_refused(ask(http, routes.ENROL, enrolment), ProblemCode.CLIENT_REVOKED)


def test_sessions_end_and_are_few(hq: Headquarters, http: httpx.Client) -> None:
    key = SiteKey()
    client_id = member(hq, http, key)
    first, *later = [open_session(http, key, client_id) for _ in range(5)]
    check_refused(use(http, first), ProblemCode.NOT_AUTHENTICATED)
    assert {use(http, session).status_code for session in later} == {200}
    check_refused(use(http, "A" * 43), ProblemCode.NOT_AUTHENTICATED)


def test_a_key_changes_without_a_pause(hq: Headquarters, http: httpx.Client) -> None:
    old, new, other = SiteKey(), SiteKey(), SiteKey()
    client_id = member(hq, http, old)
    member(hq, http, other)
    ca_sha256 = hq.services.authority.ca_sha256
    first, session = (open_session(http, old, client_id) for _ in range(2))

    def change(key: SiteKey, signed_by: SiteKey, allowed_by: SiteKey) -> httpx.Response:
        body = key.change_for(ca_sha256, client_id, allowed_by)
        signature = signed_by.change_for(ca_sha256, client_id, allowed_by).signature
        forged = body.model_copy(update={"signature": signature})
        return ask(http, routes.CHANGE_KEY, forged, session)

    check_refused(change(new, old, allowed_by=old), ProblemCode.SIGNATURE_INVALID)
    check_refused(change(other, other, allowed_by=old), ProblemCode.NOT_PERMITTED)
    assert use(http, session).status_code == 200
    assert change(new, new, allowed_by=old).status_code == 204
    for ended in (first, session):
        check_refused(use(http, ended), ProblemCode.NOT_AUTHENTICATED)
    stale = old.session_request(ca_sha256, client_id, draw_challenge(http))
    check_refused(ask(http, routes.SESSION, stale), ProblemCode.SIGNATURE_INVALID)
    session = open_session(http, new, client_id)
    assert change(new, new, allowed_by=old).status_code == 204  # the answer was lost on the way
    assert use(http, session).status_code == 200


def test_a_stolen_session_changes_no_key_and_is_dead_after_its_owner_has(
    hq: Headquarters, http: httpx.Client
) -> None:
    old, new, thief = SiteKey(), SiteKey(), SiteKey()
    client_id = member(hq, http, old)
    ca_sha256 = hq.services.authority.ca_sha256
    stolen = open_session(http, old, client_id)
    theft = thief.change_for(ca_sha256, client_id, thief)
    check_refused(ask(http, routes.CHANGE_KEY, theft, stolen), ProblemCode.SIGNATURE_INVALID)
    change = new.change_for(ca_sha256, client_id, old)
    assert ask(http, routes.CHANGE_KEY, change, stolen).status_code == 204  # it is the owner's too
    check_refused(use(http, stolen), ProblemCode.NOT_AUTHENTICATED)


def test_a_key_changes_a_few_times_an_hour(hq: Headquarters, http: httpx.Client) -> None:
    key = SiteKey()
    client_id = member(hq, http, key)
    ca_sha256 = hq.services.authority.ca_sha256
    before = hq.services.store.journal_head().sequence
    for _ in range(MOST_AN_HOUR):
        new = SiteKey()
        session = open_session(http, key, client_id)
        change = new.change_for(ca_sha256, client_id, key)
        assert ask(http, routes.CHANGE_KEY, change, session).status_code == 204
        key = new
    session = open_session(http, key, client_id)
    refusal = ask(http, routes.CHANGE_KEY, SiteKey().change_for(ca_sha256, client_id, key), session)
    check_refused(refusal, ProblemCode.TOO_MANY_REQUESTS)
    assert int(refusal.headers["Retry-After"]) > 0
    assert hq.services.store.journal_head().sequence == before + MOST_AN_HOUR


def test_nobody_takes_the_name_of_another_member(hq: Headquarters, http: httpx.Client) -> None:
    victim, mallory = SiteKey(), SiteKey()
    ca_sha256 = hq.services.authority.ca_sha256
    victims_id = enrol_key(http, victim, "press 9", join_secret=join_string(hq).secret)
    secret = join_string(hq).secret
    enrolment = mallory.enrolment(ca_sha256, victims_id, join_secret=secret)
    refusal = ask(http, routes.ENROL, enrolment)
    assert "--name" in check_refused(refusal, ProblemCode.NOT_PERMITTED).remedy
    mallorys_id = enrol_key(http, mallory, "mallory", join_secret=secret)  # nothing was used up
    session = open_session(http, mallory, mallorys_id)
    profile = mallory.enrolment(ca_sha256).profile
    for name in ("press 9", "PRESS 9", victims_id):
        taking = RejoinRequest(profile=profile, name=name)
        check_refused(ask(http, routes.REJOIN, taking, session), ProblemCode.NOT_PERMITTED)
    now = hq.services.clock.now()
    end_membership(hq.services.store, ClientId(victims_id), now, removed_by="test")
    taking = RejoinRequest(profile=profile, name="press 9")
    assert ask(http, routes.REJOIN, taking, session).status_code == 200


def test_an_enrolment_that_is_refused_keeps_nobody_out(tmp_path: Path) -> None:
    config = ServerConfig(tls="on", enrolment="token", max_enrolments_per_minute=1)
    with headquarters(home_in(tmp_path), config) as running, site_http(running) as http:
        ca_sha256 = running.services.authority.ca_sha256
        unused = join_string(running).secret
        for _ in range(3):
            refused = SiteKey().enrolment(ca_sha256, run="nowhere", join_secret=unused)
            check_refused(ask(http, routes.ENROL, refused), ProblemCode.NOT_FOUND)
        enrol_key(http, SiteKey(), "first", join_secret=join_string(running).secret)
        late = SiteKey().enrolment(ca_sha256, join_secret=unused)
        assert ask(http, routes.ENROL, late).status_code == 503


def test_what_is_secret_is_kept_by_no_cache(hq: Headquarters, http: httpx.Client) -> None:
    key = SiteKey()
    ca_sha256 = hq.services.authority.ca_sha256
    enrolled = ask(http, routes.ENROL, key.enrolment(ca_sha256, join_secret=join_string(hq).secret))
    challenge = http.post(routes.CHALLENGE.path)
    request = key.session_request(
        ca_sha256, enrolled.json()["client_id"], challenge.json()["challenge"]
    )
    session = ask(http, routes.SESSION, request)
    for answer in (enrolled, challenge, session):
        assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")


def test_after_a_disk_swap_the_same_client_has_a_new_key(
    hq: Headquarters, http: httpx.Client
) -> None:
    old, new = SiteKey(), SiteKey()
    client_id = member(hq, http, old)
    session = open_session(http, old, client_id)
    secret = join_string(hq, client_id=client_id).secret
    assert enrol_key(http, new, join_secret=secret) == client_id
    check_refused(use(http, session), ProblemCode.NOT_AUTHENTICATED)
    assert use(http, open_session(http, new, client_id)).status_code == 200


def test_handshakes_that_never_end_hold_nobody_up(
    hq: Headquarters, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(securing, "_MOST_ENTERING", 8)
    place = httpx.URL(hq.url)
    address = (place.host, place.port or 0)
    silent = [socket.create_connection(address) for _ in range(40)]
    try:
        assert http.get("/health/live").status_code == 200
        with site_http(hq) as another:
            assert another.get("/health/live").status_code == 200
        silent[0].settimeout(20)
        assert silent[0].recv(1) == b""  # the first of them made room
    finally:
        for connection in silent:
            connection.close()


def test_a_slow_handshake_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(securing, "MAX_HEAD_S", 1)
    with headquarters(home_in(tmp_path), ServerConfig(tls="on")) as running:
        place = httpx.URL(running.url)
        with socket.create_connection((place.host, place.port or 0)) as slow:
            slow.sendall(b"\x16\x03\x01")
            slow.settimeout(20)
            assert slow.recv(1) == b""


def test_a_server_stops_while_others_hold_connections_open(tmp_path: Path) -> None:
    started = time.monotonic()
    with headquarters(home_in(tmp_path), ServerConfig(tls="on")) as running:
        place = httpx.URL(running.url)
        address = (place.host, place.port or 0)
        entering = socket.create_connection(address)
        idle = trusting(running).wrap_socket(
            socket.create_connection(address), server_hostname=place.host
        )
        with site_http(running) as http:
            assert http.get("/health/live").status_code == 200
    entering.settimeout(20)
    assert entering.recv(1) == b""
    entering.close()
    idle.close()
    assert time.monotonic() - started < connections.MAX_HEAD_S


def test_the_certificate_in_use_outlives_one_that_cannot_work(
    tmp_path: Path,
) -> None:
    """An operator replaces the files one after the other; the new pair is shown once it is one."""
    with headquarters(home_in(tmp_path / "other"), ServerConfig(tls="on")) as other:
        second = AuthorityFiles.of(other.services.home)
    home = home_in(tmp_path)
    with headquarters(home, ServerConfig(tls="on")) as made:
        first = AuthorityFiles.of(made.services.home)
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for path in (chain, key):
        path.write_bytes(first.server.read_bytes())
    config = ServerConfig(tls="on", certificate_file=chain, key_file=key)
    tls = securing.ServerTls(home, config)
    chain.write_bytes(second.server.read_bytes())
    with pytest.raises(ConfigurationError, match="mismatch"):
        tls.refresh()
    assert shown_by(tls) == issuer_of(first.certificate)
    key.write_bytes(second.server.read_bytes())
    tls.refresh()
    assert shown_by(tls) == issuer_of(second.certificate)


def shown_by(tls: securing.ServerTls) -> x509.Name:
    """Tell whose certificate a server shows, in memory."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = tls.context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).issuer


def issuer_of(path: Path) -> x509.Name:
    return x509.load_pem_x509_certificate(path.read_bytes()).subject
