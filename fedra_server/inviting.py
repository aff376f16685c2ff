"""Inviting sites: new tokens and their join strings, for the command line and over HTTP alike."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import SiteName
from fedra_edge.protocol.trust import JoinString
from fedra_edge.protocol.wire import Token
from fedra_server.addressing import listens_at, site_address
from fedra_server.authority import ensure_authority
from fedra_server.config import Address, ServerConfig, ServerHome
from fedra_server.errors import NotFoundError
from fedra_server.storage.records import TokenRecord
from fedra_server.storage.store import Store
from fedra_server.storage.tokens import new_join_secret


class TokenWish(BaseModel):
    """What a new token shall admit; with a ``client_id`` it enrols that client again.

    ``address`` is how sites reach the server, unless they do so as it says itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uses: Annotated[int, Field(ge=1, le=100_000)] = 1
    ttl_s: Annotated[float, Field(ge=1, le=10 * 366 * 86_400)] = 86_400.0
    label: SiteName | Literal[""] = ""
    client_id: Token | None = None
    address: Address | None = None

    @model_validator(mode="after")
    def _one_client_joins_once(self) -> Self:
        if self.client_id is not None and self.uses != 1:
            raise ValueError("a join string for one client has one use")
        return self


class TokenSummary(BaseModel):
    """A token in short; its secret is not known."""

    model_config = ConfigDict(frozen=True)

    token_id: str
    label: str
    state: str
    uses_allowed: int
    uses_left: int
    created_at: float
    expires_at: float
    client_id: str | None


@dataclass(frozen=True)
class Invitation:
    """A new token, and the join string that is told once."""

    token: TokenRecord
    join_string: JoinString


def invite(
    store: Store, home: ServerHome, config: ServerConfig, wish: TokenWish, *, by: str, now: float
) -> Invitation:
    """Make a token.

    Raises:
        NotFoundError: The token is for a client that is not there, or not any more.
    """
    client_id = None if wish.client_id is None else ClientId(wish.client_id)
    if client_id is not None and store.client(client_id).has_left:
        raise NotFoundError(f"client {client_id} has left", remedy="Let it join as a new one.")
    token = TokenRecord(
        token_id=secrets.token_hex(4),
        label=wish.label,
        client_id=client_id,
        created_at=now,
        expires_at=now + wish.ttl_s,
        uses_allowed=wish.uses,
        uses_left=wish.uses,
    )
    address = wish.address or _address(home, config)
    ca_sha256 = ensure_authority(home).ca_sha256
    join_string = JoinString(address, new_join_secret(token.token_id), ca_sha256)
    store.add_token(token, join_string.secret, by)
    return Invitation(token, join_string)


def _address(home: ServerHome, config: ServerConfig) -> str:
    """Find how sites reach the server: as set, as it listens now, or as it would."""
    listening = listens_at(home)
    if config.address is None and listening is not None:
        return listening.address
    return site_address(config, config.port, socket.gethostname())


def summarize_token(token: TokenRecord, now: float) -> TokenSummary:
    """Tell of a token in short."""
    return TokenSummary(
        token_id=token.token_id,
        label=token.label,
        state=token.why_unusable(now) or "usable",
        uses_allowed=token.uses_allowed,
        uses_left=token.uses_left,
        created_at=token.created_at,
        expires_at=token.expires_at,
        client_id=token.client_id,
    )
