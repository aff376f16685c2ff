"""Reads what is announced in front of the bytes of a delta that comes in one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.errors import RefusedError
from fedra_server.http.plainness import read_json
from fedra_server.http.problems import RefusedBodyError

_WHOLE_S: Final = 30.0
"""How long an announcement may take, which is small."""


async def read_announcement(
    body: AsyncIterator[bytes], manifest_bytes: int, most_bytes: int
) -> tuple[DeltaManifest, AsyncIterator[bytes]]:
    """Give what a body announces, and the rest of the body.

    Raises:
        RefusedError: It is longer than any announcement may be.
        RefusedBodyError: It is no JSON, or is not there.
        RequestValidationError: It announces no delta.
    """
    if manifest_bytes > most_bytes:
        raise RefusedError(
            ProblemCode.REQUEST_TOO_LARGE, f"an announcement has at most {most_bytes} bytes"
        )
    start = bytearray()
    try:
        async with asyncio.timeout(_WHOLE_S):
            while len(start) < manifest_bytes:
                start += await anext(body)
    except (StopAsyncIteration, ClientDisconnect, TimeoutError) as error:
        told = "the body ends before its announcement does"
        raise RefusedBodyError(ProblemCode.MALFORMED_REQUEST, told) from error
    try:
        delta = DeltaManifest.model_validate(read_json(bytes(start[:manifest_bytes])))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return delta, _after(bytes(start[manifest_bytes:]), body)


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for chunk in rest:
        yield chunk
