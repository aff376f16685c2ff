"""Join tokens, and the enrolments that they admit; a use counts in the transaction that enrols."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final

from pydantic import JsonValue
from sqlalchemy import Connection, delete, func, insert, select, update

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.chain import COMMAND, Event, author, sha256_of
from fedra_server.errors import ConflictError, NotFoundError, NotPermittedError, RefusedError
from fedra_server.hiding import without_secrets
from fedra_server.storage import tables
from fedra_server.storage.clients import find_by_key, require_no_id
from fedra_server.storage.database import Database
from fedra_server.storage.journal import write_entry
from fedra_server.storage.records import ClientRecord, TokenRecord
from fedra_server.storage.rows import client_record, client_values, token_record, token_values

_TOKENS: Final = tables.join_tokens.c
_CLIENTS: Final = tables.clients.c
_REMEDY: Final = "Ask the operator for a new join string ('fedra-server token create')."


def new_join_secret(token_id: str) -> str:
    """Draw what a token admits with; the store keeps its digest only."""
    return f"{token_id}-{secrets.token_hex(20)}"


def secret_sha256(secret: str) -> str:
    """Digest a secret that is too long to be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()


class TokenRecords(Database):
    """Every method is one transaction."""

    def add_token(self, record: TokenRecord, join_secret: str, by: str = COMMAND) -> None:
        """Keep a new token.

        Raises:
            ConflictError: There is one of this id.
        """
        values = token_values(record, secret_sha256(join_secret))
        details: dict[str, JsonValue] = {
            "uses": record.uses_allowed,
            "for_client": record.client_id,
            "expires_at": record.expires_at,
        }
        with self.writing() as connection:
            connection.execute(insert(tables.join_tokens).values(values))
            write_entry(connection, Event.TOKEN_CREATED, record.token_id, by, details)

    def tokens(self) -> list[TokenRecord]:
        """Give all tokens, in the order of their making."""
        query = select(tables.join_tokens).order_by(_TOKENS.created_at, _TOKENS.token_id)
        with self.reading() as connection:
            return [token_record(row) for row in connection.execute(query).all()]

    def revoke_token(self, token_id: str, now: float, by: str = COMMAND) -> TokenRecord:
        """Let a token admit nobody from now on; who joined with it stays.

        Raises:
            NotFoundError: No such token.
        """
        change = update(tables.join_tokens).where(
            _TOKENS.token_id == token_id, _TOKENS.revoked_at.is_(None)
        )
        with self.writing() as connection:
            query = select(tables.join_tokens).where(_TOKENS.token_id == token_id)
            if connection.execute(query).one_or_none() is None:
                raise NotFoundError(f"there is no join token {without_secrets(token_id)}")
            if connection.execute(change.values(revoked_at=now)).rowcount:
                write_entry(connection, Event.TOKEN_REVOKED, token_id, by)
            return token_record(connection.execute(query).one())

    def check_join_secret(self, join_secret: str, now: float) -> None:
        """Make sure that a join secret admits somebody.

        Raises:
            RefusedError: It does not; the message says why.
        """
        with self.reading() as connection:
            _usable_token(connection, join_secret, now)

    def enrol(
        self, client: ClientRecord, public_key: str, join_secret: str | None, max_clients: int
    ) -> ClientRecord:
        """Take a client into the population, or tell which client this key belongs to already.

        With the token of one client, that client gets the key, keeps its history, and measures
        models anew.

        Raises:
            RefusedError: The join secret admits nobody, or the key is of a client that left.
            NotPermittedError: The population may not grow, or another member has this name.
        """
        try:
            return self._enrol(client, public_key, join_secret, max_clients)
        except ConflictError:  # the same enrolment came twice at once
            return self._enrol(client, public_key, join_secret, max_clients)

    def _enrol(
        self, client: ClientRecord, public_key: str, join_secret: str | None, max_clients: int
    ) -> ClientRecord:
        now = client.enrolled_at
        with self.writing() as connection:
            known = find_by_key(connection, public_key)
            if known is not None:
                return require_member(known)
            details: dict[str, JsonValue] = {"name": client.name}
            if join_secret is not None:
                token = _usable_token(connection, join_secret, now)
                _use(connection, token, now)
                details["token"] = token.token_id
                if token.client_id is not None:
                    return _give_key(connection, token.client_id, client, public_key, token)
            require_no_id(connection, client.name)
            members = select(func.count()).where(_CLIENTS.has_left.is_(False))
            if connection.execute(members).scalar_one() >= max_clients:
                raise NotPermittedError(
                    f"the population has reached its limit of {max_clients} clients",
                    remedy="Ask the operator to raise max_clients in the server's settings.",
                )
            connection.execute(insert(tables.clients).values(client_values(client, public_key)))
            by = author(client.client_id)
            write_entry(connection, Event.CLIENT_JOINED, client.client_id, by, details)
            return client


def require_member(client: ClientRecord) -> ClientRecord:
    """Give a client back unless its membership is over.

    Raises:
        RefusedError: It is.
    """
    if client.has_left:
        raise RefusedError(
            ProblemCode.CLIENT_REVOKED, f"the membership of {client.name} on this server is over"
        )
    return client


def _usable_token(connection: Connection, join_secret: str, now: float) -> TokenRecord:
    query = select(tables.join_tokens).where(_TOKENS.token_id == join_secret.partition("-")[0])
    row = connection.execute(query).one_or_none()
    digest = secret_sha256(join_secret)
    if row is None or not hmac.compare_digest(row.secret_sha256, digest):
        raise _invalid("this server does not know the join string's secret")
    token = token_record(row)
    if why := token.why_unusable(now):
        raise _invalid(f"the join string is {why}")
    return token


def _use(connection: Connection, token: TokenRecord, now: float) -> None:
    """Count a use; of several at once, no more than are left succeed."""
    change = update(tables.join_tokens).where(
        _TOKENS.token_id == token.token_id,
        _TOKENS.uses_left > 0,
        _TOKENS.revoked_at.is_(None),
        _TOKENS.expires_at > now,
    )
    if connection.execute(change.values(uses_left=_TOKENS.uses_left - 1)).rowcount == 0:
        raise _invalid("the join string is used up")


def _give_key(
    connection: Connection,
    client_id: ClientId,
    client: ClientRecord,
    public_key: str,
    token: TokenRecord,
) -> ClientRecord:
    """Let a new installation be an existing client: its key, its machine, the old history."""
    change = update(tables.clients).where(
        _CLIENTS.client_id == client_id, _CLIENTS.has_left.is_(False)
    )
    values = {
        "public_key": public_key,
        "profile": client.profile.model_dump_json(),
        "run": client.run,
        "is_online": True,
        "last_seen_at": client.last_seen_at,
    }
    row = select(tables.clients).where(_CLIENTS.client_id == client_id)
    if connection.execute(change.values(values)).rowcount == 0:
        return require_member(client_record(connection.execute(row).one()))
    calibrations = tables.calibrations
    connection.execute(delete(calibrations).where(calibrations.c.client_id == client_id))
    details = {"token": token.token_id, "public_key_sha256": sha256_of(public_key)}
    write_entry(connection, Event.CLIENT_REENROLLED, client_id, author(client_id), details)
    return client_record(connection.execute(row).one())


def _invalid(message: str) -> RefusedError:
    return RefusedError(ProblemCode.JOIN_TOKEN_INVALID, message, remedy=_REMEDY)
