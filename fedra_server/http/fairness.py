"""Shares the server between its callers: each may ask so often, and so much at the same time.

Who is within its share is served as if it were alone with the others. Who is beyond is answered
``429``, and late, so that a loop of requests brings nothing; it holds no thread meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import math
from collections.abc import MutableMapping
from contextlib import AsyncExitStack
from typing import Any, Final, NamedTuple

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.routes import UPLOAD_CREATE
from fedra_server.config import ServerConfig
from fedra_server.http.pacing import AtOnce, Buckets, Rate, Recent
from fedra_server.http.problems import problem_response

CALLER: Final = "caller"
"""Where authentication leaves, in the state of a request, the name of who sent it."""
_BURST_S: Final = 12.0
_STRANGE_BURST_S: Final = 30.0
"""As for a plant whose many sites all come back at once behind one address."""
_STRANGERS_AT_ONCE: Final = 64
"""Requests of one address that are not known to be anybody's."""
_FAILURE_COST: Final = 5.0
_HOLD_S: Final = 1.0
_MOST_HELD: Final = 16
_REFUSED: Final = frozenset({401, 403})
_PREFIX_BITS: Final = 64
"""An IPv6 site has that many bits of addresses to itself."""


class Caller(NamedTuple):
    """Whose share a request is taken from: a client's or operator's, or its address's."""

    name: str
    is_known: bool


class Shares:
    """What every caller has asked for lately; used on the event loop only."""

    def __init__(self, config: ServerConfig) -> None:
        own, strange = config.max_requests_per_s, config.max_strange_requests_per_s
        self._requests: Buckets[str] = Buckets(Rate(own, own * _BURST_S))
        self._strange: Buckets[str] = Buckets(Rate(strange, strange * _STRANGE_BURST_S))
        self._known: Recent[bytes, str] = Recent(2 * config.max_clients)
        self.requests: AtOnce[str] = AtOnce(config.max_requests_at_once)
        self.strange: AtOnce[str] = AtOnce(_STRANGERS_AT_ONCE)
        self.uploads: AtOnce[str] = AtOnce(config.max_uploads_at_once)
        self.held: AtOnce[str] = AtOnce(_MOST_HELD)

    def caller_of(self, scope: Scope) -> Caller:
        """Find out, without a look at the records, who calls."""
        name = self._known.get(credential_digest(scope))
        return Caller(name or address_of(scope), is_known=name is not None)

    def wait_s(self, caller: Caller, now: float) -> float:
        """Count a request; give 0, or how long its sender should wait if it is not served."""
        buckets = self._requests if caller.is_known else self._strange
        return buckets.take(caller.name, now)

    def note_answer(self, scope: Scope, status: int, now: float) -> None:
        """Learn from an answer whose credential came, or that it was nobody's."""
        name = scope["state"].get(CALLER)
        digest = credential_digest(scope)
        if name is not None and digest:
            self._known.put(digest, name)
        elif status in _REFUSED:
            self._known.forget(digest)
            self._strange.charge(address_of(scope), now, _FAILURE_COST)


class FairShare:
    """Lets every caller have its share and no more."""

    def __init__(self, app: ASGIApp, shares: Shares) -> None:
        self._app = app
        self._shares = shares

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it late that it is too much."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state.pop(CALLER, None)
        now = asyncio.get_running_loop().time
        caller = self._shares.caller_of(scope)
        wait_s = self._shares.wait_s(caller, now())
        if wait_s:
            refusal = await self._refusal(caller, wait_s, "too often")
            await refusal(scope, receive, send)
            return

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._shares.note_answer(scope, message["status"], now())
            await send(message)

        async with AsyncExitStack() as held:
            if all(
                held.enter_context(it.enter(caller.name)) for it in self._turnstiles(caller, scope)
            ):
                await self._app(scope, receive, send_noted)
                return
        refusal = await self._refusal(caller, 1.0, "too much at the same time")
        await refusal(scope, receive, send)

    def _turnstiles(self, caller: Caller, scope: Scope) -> tuple[AtOnce[str], ...]:
        shares = self._shares
        requests = shares.requests if caller.is_known else shares.strange
        is_upload = scope["path"].startswith(UPLOAD_CREATE.path)
        return (requests, shares.uploads) if is_upload and caller.is_known else (requests,)

    async def _refusal(self, caller: Caller, wait_s: float, what: str) -> Response:
        """Give the answer after a while; who is owed many answers loses the connection instead."""
        headers = {"Retry-After": str(math.ceil(wait_s))}
        with self._shares.held.enter(caller.name) as is_held:
            if is_held:
                await asyncio.sleep(_HOLD_S)
            else:
                headers["Connection"] = "close"
        whose = "this caller asks" if caller.is_known else "callers from this address ask"
        told = f"{whose} {what}"
        return problem_response(ProblemCode.TOO_MANY_REQUESTS, told, headers=headers)


def credential_digest(scope: Scope) -> bytes:
    """Digest the credential of a request; empty when there is none."""
    told = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return hashlib.sha256(told).digest() if told else b""


def address_of(scope: Scope) -> str:
    """Name where a request comes from, such that one machine has few names."""
    return network_of((scope.get("client") or ("",))[0])


def network_of(host: str) -> str:
    """Name the network of an IPv6 address that one site has to itself; others are themselves."""
    if ":" not in host:
        return host
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, _PREFIX_BITS), strict=False))
