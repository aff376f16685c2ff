"""Inviting, joining, signing in, changing keys, removing, in any order: who gets in, who not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.config import ServerConfig
from fedra_server.errors import NotFoundError
from fedra_server.http.key_changes import MOST_AN_HOUR
from fedra_server.inviting import TokenWish, invite
from fedra_server.leaving import end_membership
from tests.support.headquarters import Headquarters, connection, headquarters, home_in
from tests.support.keys import SiteKey, ask, draw_challenge

SETTINGS: Final = settings(
    max_examples=int(os.environ.get("FEDRA_FUZZ_EXAMPLES", "15")),
    stateful_step_count=30,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
JOIN_REFUSED: Final = (403, ProblemCode.JOIN_TOKEN_INVALID)
REVOKED: Final = (403, ProblemCode.CLIENT_REVOKED)
WRONG_KEY: Final = (403, ProblemCode.SIGNATURE_INVALID)


@dataclass(eq=False)
class Token:
    """A join string as its maker remembers it."""

    secret: str
    uses_left: int
    owner: Member | None
    is_revoked: bool = False


@dataclass(eq=False)
class Member:
    """A client as the model knows it; ``sessions`` are those that must work, oldest first."""

    client_id: str
    key: SiteKey
    is_removed: bool = False
    sessions: list[str] = field(default_factory=list)
    past_keys: list[SiteKey] = field(default_factory=list)
    changes: int = 0


class Enrolment(RuleBasedStateMachine):
    """Speaks to a real server and knows what it must say."""

    hq: ClassVar[Headquarters]
    tokens = Bundle("tokens")
    members = Bundle("members")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.http = self.stack.enter_context(connection(self.hq.url))
        self.ca_sha256 = self.hq.services.authority.ca_sha256
        self.known: list[Member] = []

    @override
    def teardown(self) -> None:
        self.stack.close()

    @rule(target=tokens, uses=st.integers(1, 3))
    def invite_sites(self, uses: int) -> Token:
        return Token(self._join_secret(TokenWish(uses=uses)), uses, None)

    @rule(target=tokens, member=members)
    def invite_again(self, member: Member) -> Any:  # noqa: ANN401 (a token or none)
        wish = TokenWish(client_id=member.client_id)
        if member.is_removed:
            with pytest.raises(NotFoundError):
                self._join_secret(wish)
            return multiple()
        return Token(self._join_secret(wish), 1, member)

    @rule(token=tokens)
    def revoke(self, token: Token) -> None:
        services = self.hq.services
        services.store.revoke_token(token.secret.partition("-")[0], services.clock.now())
        token.is_revoked = True

    @rule(target=members, token=tokens)
    def join(self, token: Token) -> Any:  # noqa: ANN401 (a member or none)
        key = SiteKey()
        told = self._enrol(key, token.secret)
        if token.is_revoked or token.uses_left == 0:
            assert told == JOIN_REFUSED
            return multiple()
        if token.owner is not None and token.owner.is_removed:
            assert told == REVOKED
            return multiple()
        token.uses_left -= 1
        if token.owner is None:
            member = Member(str(told[1]), key)
            assert told[0] == 201
            assert member.client_id not in {it.client_id for it in self.known}
            self.known.append(member)
            return member
        assert told == (201, token.owner.client_id)
        token.owner.past_keys.append(token.owner.key)
        token.owner.key, token.owner.sessions = key, []
        return multiple()

    @rule(member=members, token=tokens)
    def join_once_more(self, member: Member, token: Token) -> None:
        """A known key gives the same client, whatever the join string; it uses nothing up."""
        expected = REVOKED if member.is_removed else (201, member.client_id)
        assert self._enrol(member.key, token.secret) == expected

    @rule(member=members)
    def sign_in(self, member: Member) -> None:
        status, told = self._sign_in(member.key, member.client_id)
        if member.is_removed:
            assert (status, told) == REVOKED
            return
        assert status == 201
        member.sessions = [*member.sessions, str(told)][-4:]

    @precondition(lambda self: len(self.known) > 1)
    @rule(data=st.data())
    def sign_in_as_another(self, data: st.DataObject) -> None:
        one, other = data.draw(st.permutations(self.known))[:2]
        assert self._sign_in(one.key, other.client_id) == WRONG_KEY
        for past in other.past_keys:
            assert self._sign_in(past, other.client_id) == WRONG_KEY

    @rule(member=members)
    def change_key(self, member: Member) -> None:
        if not member.sessions:
            return
        key = SiteKey()
        change = key.change_for(self.ca_sha256, member.client_id, member.key)
        headers = {"Authorization": f"Bearer {member.sessions[-1]}"}
        body = change.model_dump(mode="json")
        answer = self.http.put(routes.CHANGE_KEY.path, json=body, headers=headers)
        if member.is_removed:
            assert answer.status_code == 403
        elif member.changes == MOST_AN_HOUR:
            assert answer.status_code == 429
        else:
            assert answer.status_code == 204
            member.changes += 1
            member.past_keys.append(member.key)
            member.key, member.sessions = key, []

    @rule(thief=members, victim=members)
    def steal_a_session_to_change_the_key(self, thief: Member, victim: Member) -> None:
        """A session and a key of one's own are not enough."""
        if not victim.sessions or victim.is_removed or thief is victim:
            return
        change = SiteKey().change_for(self.ca_sha256, victim.client_id, thief.key)
        headers = {"Authorization": f"Bearer {victim.sessions[-1]}"}
        body = change.model_dump(mode="json")
        answer = self.http.put(routes.CHANGE_KEY.path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == WRONG_KEY

    @rule(member=members)
    def remove(self, member: Member) -> None:
        if not member.is_removed:
            services = self.hq.services
            now = services.clock.now()
            end_membership(services.store, ClientId(member.client_id), now, removed_by="test")
            member.is_removed = True

    @invariant()
    def sessions_open_what_they_must(self) -> None:
        for member in self.known:
            for session in member.sessions[-1:]:
                answer = self.http.get(
                    routes.CLIENT_STATUS.path, headers={"Authorization": f"Bearer {session}"}
                )
                if member.is_removed:
                    assert (answer.status_code, answer.json()["code"]) == REVOKED
                else:
                    assert answer.json()["client_id"] == member.client_id

    def _join_secret(self, wish: TokenWish) -> str:
        services = self.hq.services
        made = invite(
            services.store, services.home, services.config, wish,
            by="test", now=services.clock.now(),
        )  # fmt: skip
        return made.join_string.secret

    def _enrol(self, key: SiteKey, secret: str) -> tuple[int, str]:
        answer = ask(self.http, routes.ENROL, key.enrolment(self.ca_sha256, join_secret=secret))
        told = answer.json()
        return answer.status_code, told.get("client_id") or told["code"]

    def _sign_in(self, key: SiteKey, client_id: str) -> tuple[int, str]:
        request = key.session_request(self.ca_sha256, client_id, draw_challenge(self.http))
        answer = ask(self.http, routes.SESSION, request)
        told = answer.json()
        return answer.status_code, told.get("session") or told["code"]


@pytest.fixture
def hq(tmp_path: Path) -> Iterator[Headquarters]:
    config = ServerConfig(
        enrolment="token", max_enrolments_per_minute=100_000, max_clients=100_000,
        max_requests_per_s=10_000, max_strange_requests_per_s=10_000,
    )  # fmt: skip
    with headquarters(home_in(tmp_path), config) as running:
        yield running


def test_no_order_of_calls_lets_anybody_in_who_does_not_belong(hq: Headquarters) -> None:
    Enrolment.hq = hq
    run_state_machine_as_test(Enrolment, settings=SETTINGS)
    store = hq.services.store
    ids = [client.client_id for client in store.clients(include_left=True)]
    assert len(ids) == len(set(ids))
    assert all(0 <= token.uses_left <= token.uses_allowed for token in store.tokens())
