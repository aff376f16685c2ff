"""How administrators let sites in over HTTP: join tokens are made, listed and revoked."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol import routes
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import Token
from fedra_server.http.mounting import mount
from fedra_server.http.operators import FOR_OPERATORS, Administrator, author
from fedra_server.http.services import ServicesHere
from fedra_server.inviting import TokenSummary, TokenWish, invite, summarize_token

router = APIRouter(tags=["operators"])


class TokenList(BaseModel):
    """All join tokens, in the order in which they were made."""

    tokens: tuple[TokenSummary, ...]


class TokenCreated(BaseModel):
    """A new token, and the join string for `fedra-edge join --server`, told this once."""

    model_config = ConfigDict(frozen=True)

    token: TokenSummary
    join_string: str


@mount(router, routes.OPERATOR_TOKENS, *FOR_OPERATORS)
def list_tokens(services: ServicesHere, _operator: Administrator) -> TokenList:
    """List the join tokens."""
    now = services.clock.now()
    return TokenList(tokens=tuple(summarize_token(it, now) for it in services.store.tokens()))


@mount(router, routes.OPERATOR_CREATE_TOKEN, *FOR_OPERATORS, ProblemCode.NOT_FOUND, status_code=201)
def create_token(wish: TokenWish, services: ServicesHere, operator: Administrator) -> TokenCreated:
    """Make a join token and tell its join string, once."""
    now = services.clock.now()
    by = author(operator)
    made = invite(services.store, services.home, services.config, wish, by=by, now=now)
    return TokenCreated(
        token=summarize_token(made.token, now), join_string=str(made.join_string)
    )  # fmt: skip


@mount(router, routes.OPERATOR_REVOKE_TOKEN, *FOR_OPERATORS, ProblemCode.NOT_FOUND, status_code=204)
def revoke_token(token_id: Token, services: ServicesHere, operator: Administrator) -> None:
    """Let nobody join with a token any more; sites that have joined stay."""
    services.store.revoke_token(token_id, services.clock.now(), author(operator))
