"""Meeting a server over real TLS: who is trusted, what is sent to whom, who we are afterwards."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedra_edge.api import ServerApi
from fedra_edge.config import EdgeConfig, load_config
from fedra_edge.enrolling import Enrolment
from fedra_edge.errors import (
    ClientRevokedError,
    ConfigurationError,
    JoinRefusedError,
    ServerUnreachableError,
    UntrustedServerError,
    WrongServerError,
)
from fedra_edge.home_lock import home_lock
from fedra_edge.keys import NEXT_NAME
from fedra_edge.membership import Membership
from fedra_edge.protocol import routes
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.trust import Authority, JoinString, certificate_sha256
from fedra_edge.retrying import Retrier, RetryPolicy
from fedra_edge.transport import Request, Transport, open_http_client
from tests.support.builders import make_profile
from tests.support.gate import CLIENT_ID, Gate
from tests.support.tls_front import TlsFront, tls_front
from tests.support.web_proxy import web_proxy
from tests.support.wire_server import Received, Reply, WireServer, serving

ADMITTING = "t1-nobodyguessesthis"
OTHER = "cd" * 32
ATTEMPTS = 2
QUICK = RetryPolicy(max_attempts=ATTEMPTS, first_wait_s=0.01, max_wait_s=0.02)


@dataclass
class Scene:
    """A server behind TLS that remembers what came, and the home of a site."""

    gate: Gate
    server: WireServer
    front: TlsFront
    home: Path

    @property
    def asked(self) -> list[str]:
        return [f"{it.method} {it.path}" for it in self.server.received]

    @property
    def sent(self) -> str:
        """Everything that the server was told, as far as it is text."""
        return "".join(f"{it.path}{it.headers}{it.body!r}" for it in self.server.received)

    def join_string(self, **changes: str) -> str:
        told = JoinString(self.front.url, ADMITTING, self.gate.authority.ca_sha256)
        return str(replace(told, **changes))

    def config(self, server: str | None = None, **options: object) -> EdgeConfig:
        given = {"server": server or self.join_string(), "home": self.home, "name": "plant-7"}
        return load_config({**given, **options})

    @property
    def membership(self) -> Membership:
        return Membership.of(self.config())


@contextmanager
def client(config: EdgeConfig) -> Iterator[tuple[Enrolment, Transport]]:
    """Have what a client or a command talks to its server with."""
    transport = Transport(open_http_client(config.server, config.link), config.link)
    try:
        api = ServerApi(transport, Retrier(threading.Event()), QUICK)
        yield Enrolment(config, transport, api), transport
    finally:
        transport.close()


def join(config: EdgeConfig) -> str:
    """Do what a client does when it starts, and use the session."""
    with client(config) as (enrolment, transport):
        identity = enrolment.come_back() or enrolment.enrol(make_profile())
        transport.send(Request(routes.CLIENT_STATUS, routes.CLIENT_STATUS.path))
        return identity.client_id


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WireServer, TlsFront]]:
    with (
        serving(Gate()) as server,
        tls_front(tmp_path_factory.mktemp("tls"), server.server_address[1]) as front,
    ):
        yield server, front


@pytest.fixture(scope="module")
def other_front(
    gates: tuple[WireServer, TlsFront], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TlsFront]:
    """Somebody with another authority who passes everything on to the same server."""
    with tls_front(tmp_path_factory.mktemp("other"), gates[0].server_address[1]) as front:
        yield front


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def scene(gates: tuple[WireServer, TlsFront], tmp_path: Path) -> Scene:
    server, front = gates
    pem = front.ca_file.read_text(encoding="ascii")
    gate = Gate(authority=Authority(ca_pem=pem, ca_sha256=certificate_sha256(pem)))
    gate.admits = ADMITTING
    server.script = gate
    server.received.clear()
    return Scene(gate, server, front, tmp_path / "home")


def test_a_join_string_is_all_that_it_takes(scene: Scene) -> None:
    assert join(scene.config()) == CLIENT_ID
    assert scene.asked == [
        "GET /v1/authority", "POST /v1/clients",
        "POST /v1/challenges", "POST /v1/sessions", "GET /v1/clients/me",
    ]  # fmt: skip
    assert scene.server.received[0].body == b""
    assert scene.membership.pin.find(scene.gate.authority.ca_sha256) is not None


@pytest.mark.parametrize("kind", ["again", "address"])
def test_a_member_just_comes_back(scene: Scene, kind: str) -> None:
    join(scene.config())
    scene.gate.admits = None  # it is used up
    scene.server.received.clear()
    assert join(scene.config(None if kind == "again" else scene.front.url)) == CLIENT_ID
    assert scene.asked == ["POST /v1/challenges", "POST /v1/sessions", "GET /v1/clients/me"]
    assert ADMITTING not in scene.sent


def test_a_wrong_fingerprint_is_refused_before_anything_secret_is_sent(scene: Scene) -> None:
    with pytest.raises(WrongServerError) as refusal:
        join(scene.config(scene.join_string(ca_sha256=OTHER)))
    assert scene.asked == ["GET /v1/authority"]
    assert "Authorization" not in scene.server.received[0].headers
    assert ADMITTING not in scene.sent + str(refusal.value) + refusal.value.remedy
    assert scene.membership.pin.find(OTHER) is None


def test_who_shows_the_right_authority_without_its_key_is_told_nothing(
    scene: Scene, other_front: TlsFront
) -> None:
    with pytest.raises(UntrustedServerError):
        join(scene.config(scene.join_string(address=other_front.url)))
    assert set(scene.asked) == {"GET /v1/authority"}
    assert ADMITTING not in scene.sent


def test_a_second_certificate_beside_the_right_one_is_never_trusted(
    scene: Scene, other_front: TlsFront
) -> None:
    right = scene.gate.authority
    added = other_front.ca_file.read_text(encoding="ascii")
    scene.gate.authority = right.model_copy(update={"ca_pem": right.ca_pem + added})
    with pytest.raises(WrongServerError):
        join(scene.config(scene.join_string(address=other_front.url)))
    assert ADMITTING not in scene.sent


def test_a_member_tells_nothing_to_who_has_another_authority(
    scene: Scene, other_front: TlsFront
) -> None:
    join(scene.config())
    port = scene.front.url.rpartition(":")[2]
    scene.server.received.clear()
    with web_proxy() as diverting:
        diverting.instead_of = {f"127.0.0.1:{port}": other_front.url.removeprefix("https://")}
        with pytest.raises(UntrustedServerError) as failure:
            join(scene.config(proxy=diverting.url))
    assert scene.asked == []
    assert "--ca-file" in failure.value.remedy
    assert "pose as the server" in failure.value.remedy


def test_a_server_that_is_called_by_another_name_says_so(scene: Scene) -> None:
    address = scene.front.url.replace("127.0.0.1", "localhost")
    with pytest.raises(UntrustedServerError, match="mismatch") as failure:
        join(scene.config(scene.join_string(address=address)))
    assert "host_names" in failure.value.remedy
    assert set(scene.asked) == {"GET /v1/authority"}


def test_a_member_whose_pin_is_gone_gets_the_same_one_again(scene: Scene) -> None:
    join(scene.config())
    scene.membership.pin.forget()
    scene.server.received.clear()
    assert join(scene.config(scene.front.url)) == CLIENT_ID
    assert scene.asked[0] == "GET /v1/authority"
    assert scene.membership.pin.find(scene.gate.authority.ca_sha256) is not None


def test_a_server_that_was_set_up_anew_is_not_the_one_a_member_knows(scene: Scene) -> None:
    join(scene.config())
    scene.membership.pin.forget()
    scene.gate.authority = scene.gate.authority.model_copy(update={"ca_sha256": OTHER})
    with pytest.raises(WrongServerError):
        join(scene.config(scene.front.url))


def test_a_certificate_that_the_system_trusts_is_accepted_without_a_pin(
    scene: Scene, other_front: TlsFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(other_front.ca_file))
    server = scene.join_string(address=other_front.url)
    assert join(scene.config(server)) == CLIENT_ID
    membership = Membership.of(scene.config(server))
    assert membership.pin.find(scene.gate.authority.ca_sha256) is None
    assert join(scene.config(other_front.url)) == CLIENT_ID


def test_a_trusted_certificate_is_not_enough_for_another_authority(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(scene.front.ca_file))
    with pytest.raises(WrongServerError):
        join(scene.config(scene.join_string(ca_sha256=OTHER)))
    assert ADMITTING not in scene.sent


def test_the_authority_of_an_inspecting_proxy_wins_over_the_pin(
    scene: Scene, other_front: TlsFront
) -> None:
    server = scene.join_string(address=other_front.url)
    assert join(scene.config(server, ca_file=other_front.ca_file)) == CLIENT_ID
    assert Membership.of(scene.config(server)).pin.find(scene.gate.authority.ca_sha256) is None


def test_a_plain_address_learns_who_the_server_is_over_a_trusted_connection(scene: Scene) -> None:
    config = scene.config(scene.front.url, ca_file=scene.front.ca_file)
    scene.gate.admits = None
    join(config)
    identity = scene.membership.load()
    assert identity is not None
    assert identity.ca_sha256 == scene.gate.authority.ca_sha256


def test_joining_goes_through_a_tunnel(scene: Scene) -> None:
    with web_proxy(account="plant:pass") as proxy:
        assert join(scene.config(proxy=proxy.url)) == CLIENT_ID
        assert {line.split(" ")[0] for line in proxy.seen} == {"CONNECT"}


def test_joining_works_behind_a_path_prefix(scene: Scene) -> None:
    def below(received: Received) -> Reply:
        if not received.path.startswith("/fed/ra/v1/"):
            return Reply(404)
        return scene.gate(replace(received, path=received.path.removeprefix("/fed/ra")))

    scene.server.script = below
    server = scene.join_string(address=f"{scene.front.url}/fed/ra")
    assert join(scene.config(server)) == CLIENT_ID


@pytest.mark.parametrize("is_cut", [True, False])
def test_an_enrolment_whose_answer_got_lost_is_repeated_with_the_same_key(
    scene: Scene, is_cut: bool
) -> None:
    lost = Reply(201, b'{"client_id": "c1"}', cut_after=3) if is_cut else Reply(503)
    scene.gate.answers = [lost]
    assert join(scene.config()) == CLIENT_ID
    bodies = [it.body for it in scene.server.received if it.path == "/v1/clients"]
    assert len(bodies) == 2
    assert len(set(bodies)) == 1


def test_a_client_that_died_before_it_knew_of_its_membership_gets_it(scene: Scene) -> None:
    join(scene.config())
    (scene.config().membership / "identity.json").unlink()
    scene.gate.admits = None
    assert join(scene.config()) == CLIENT_ID


@pytest.mark.parametrize("has_secret", [True, False])
def test_who_is_not_admitted_hears_what_to_ask_for(scene: Scene, has_secret: bool) -> None:
    scene.gate.admits = "t2-another"
    server = None if has_secret else scene.front.url
    config = scene.config(server, ca_file=scene.front.ca_file)
    with pytest.raises(JoinRefusedError) as refusal:
        join(config)
    if not has_secret:
        assert "fedra-server token create" in refusal.value.remedy
        assert "--client NAME" in refusal.value.remedy
    assert ADMITTING not in f"{refusal.value}{refusal.value.remedy}"


def test_a_site_whose_identity_is_of_before_keys_hears_who_it_was(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    config = scene.config(scene.front.url, ca_file=scene.front.ca_file)
    config.membership.mkdir(parents=True)
    before = {"server": config.server, "client_id": "c7", "credential": "dead-by-now"}
    (config.membership / "identity.json").write_text(json.dumps(before), encoding="utf-8")
    for _ in range(2):
        with caplog.at_level(logging.DEBUG), pytest.raises(JoinRefusedError) as refusal:
            join(config)
        assert "fedra-server token create --client c7" in refusal.value.remedy
    assert "dead-by-now" not in caplog.text
    assert join(scene.config()) == CLIENT_ID


def test_a_join_string_of_another_server_does_not_replace_a_membership(scene: Scene) -> None:
    join(scene.config())
    scene.server.received.clear()
    with pytest.raises(WrongServerError, match="fingerprint in the join string") as refusal:
        join(scene.config(scene.join_string(ca_sha256=OTHER)))
    assert scene.asked == []
    remedy = refusal.value.remedy
    assert 0 < remedy.index("mistyped") < remedy.index("poses") < remedy.index("leave --forget")
    assert join(scene.config()) == CLIENT_ID


def test_a_mistyped_fingerprint_costs_no_pin(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.gate.admits = "t2-another"
    with pytest.raises(JoinRefusedError):
        join(scene.config())  # which has pinned the authority
    scene.gate.admits = ADMITTING
    with pytest.raises(WrongServerError, match="is not the server that is meant") as refusal:
        join(scene.config(scene.join_string(ca_sha256=OTHER)))
    assert "mistyped" in refusal.value.remedy
    assert scene.membership.pin.ca_sha256 == scene.gate.authority.ca_sha256
    assert caplog.text == ""
    assert join(scene.config()) == CLIENT_ID


def test_a_pin_of_another_server_gives_way_to_the_one_that_was_verified(
    scene: Scene, other_front: TlsFront, caplog: pytest.LogCaptureFixture
) -> None:
    scene.membership.pin.keep(other_front.ca_file.read_text(encoding="ascii"))
    assert join(scene.config()) == CLIENT_ID
    assert scene.membership.pin.ca_sha256 == scene.gate.authority.ca_sha256
    assert "is of another server; kept as" in caplog.text


@pytest.mark.parametrize("kind", ["address", "ca-file"])
def test_a_stranger_who_cannot_tell_whom_to_trust_does_not_try_for_ever(
    scene: Scene, other_front: TlsFront, kind: str
) -> None:
    config = scene.config(scene.front.url)
    if kind == "ca-file":
        config = scene.config(ca_file=other_front.ca_file)
    with pytest.raises(ConfigurationError, match="cannot be trusted") as refusal:
        join(config)
    assert "with the join string that headquarters gives out" in refusal.value.remedy
    assert scene.asked == []


def test_a_join_string_that_a_member_does_not_need_is_told_of(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    join(scene.config())
    for server in (None, scene.front.url):
        assert join(scene.config(server)) == CLIENT_ID
    assert caplog.text == ""
    other = scene.join_string().replace(ADMITTING, "t9-for-somebody-else")
    assert join(scene.config(other)) == CLIENT_ID
    assert f"the member {CLIENT_ID} already, so the join string is not used" in caplog.text
    assert "somebody-else" not in caplog.text + scene.sent
    kept = [path for path in scene.home.rglob("*") if path.is_file()]
    assert not [path for path in kept if ADMITTING.encode() in path.read_bytes()]


def test_a_key_that_was_revoked_is_replaced_where_a_new_join_string_admits(scene: Scene) -> None:
    join(scene.config())
    membership = scene.membership
    [first] = membership.keys.candidates()
    membership.identity_file.forget()
    scene.gate.is_revoked = True
    with pytest.raises(ClientRevokedError):
        join(scene.config(scene.front.url))
    assert join(scene.config()) == CLIENT_ID
    [second] = membership.keys.candidates()
    assert second != first


def test_a_member_that_was_revoked_does_not_sneak_back_with_an_old_join_string(
    scene: Scene,
) -> None:
    join(scene.config())
    scene.gate.is_revoked = True
    with pytest.raises(ClientRevokedError):
        join(scene.config())
    assert scene.membership.load() is not None


def rotate(config: EdgeConfig) -> None:
    with client(config) as (enrolment, _):
        assert enrolment.come_back() is not None
        enrolment.rotate_key()


def test_a_changed_key_takes_over_with_a_new_session(scene: Scene) -> None:
    config = scene.config()
    join(config)
    [before] = scene.membership.keys.candidates()
    with client(config) as (enrolment, transport):
        enrolment.come_back()
        transport.send(Request(routes.CLIENT_STATUS, routes.CLIENT_STATUS.path))
        made = scene.gate.sessions_made
        enrolment.rotate_key()
        transport.send(Request(routes.CLIENT_STATUS, routes.CLIENT_STATUS.path))
        assert scene.gate.sessions_made == made + 1
    [after] = scene.membership.keys.candidates()
    assert after != before
    assert scene.gate.public_key == after.public_key
    assert join(config) == CLIENT_ID


def test_a_change_whose_answer_got_lost_is_finished_with_the_same_key(scene: Scene) -> None:
    join(scene.config())
    scene.gate.answers = [Reply(503)] * ATTEMPTS
    with pytest.raises(ServerUnreachableError):
        rotate(scene.config())
    [following] = scene.membership.keys.candidates()  # it has signed in to ask again
    assert scene.gate.public_key == following.public_key
    assert join(scene.config()) == CLIENT_ID
    assert scene.membership.keys.candidates() == [following]
    assert not (scene.config().membership / NEXT_NAME).exists()


@pytest.mark.parametrize(("age_days", "changes"), [(89, 0), (91, 1)])
def test_a_key_is_changed_when_it_is_old(scene: Scene, age_days: int, changes: int) -> None:
    config = scene.config()
    join(config)
    file = config.membership / "key.pem"
    then = file.stat().st_mtime - age_days * 86_400
    os.utime(file, (then, then))
    with client(config) as (enrolment, _):
        enrolment.come_back()
        for _ in range(3):
            enrolment.rotate_key_when_due()
    assert scene.asked.count("PUT /v1/clients/me/key") == changes


def test_a_change_that_is_refused_is_told_and_tried_again_later(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    join(scene.config())
    scene.gate.answers = [Reply.problem(ProblemCode.NOT_PERMITTED, 403)]
    with client(scene.config(rotate_key_after_days=0)) as (enrolment, _):
        enrolment.come_back()
        for _ in range(3):
            enrolment.rotate_key_when_due()
    assert caplog.text.count("the key could not be changed") == 1
    assert scene.asked.count("PUT /v1/clients/me/key") == 1
    assert join(scene.config()) == CLIENT_ID


def test_one_process_at_a_time_changes_the_key(scene: Scene) -> None:
    join(scene.config())
    with (
        home_lock(scene.config().membership),
        pytest.raises(ConfigurationError, match="by another process"),
    ):
        rotate(scene.config())


def test_plain_http_to_another_machine_is_told_each_time(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    config = scene.config("http://plant.example", insecure_http=True)
    with client(config):
        assert "everybody on the way" in caplog.text
