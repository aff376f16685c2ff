"""The bytes of a delta on their way: from the socket to the disk in bounded memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path
from typing import Final

from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from fedra_edge.protocol.problems import ProblemCode
from fedra_server.errors import RefusedError
from fedra_server.storage.durability import disk_errors, sync_directory

_BLOCK_BYTES: Final = 2**20
_MAX_SILENCE_S: Final = 30.0
"""A sender that is silent for longer has lost its connection and will come back."""


def part_size_bytes(part: Path) -> int:
    """Tell how many bytes have arrived; 0 before the first."""
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0


async def receive(part: Path, stream: AsyncIterator[bytes], room_bytes: int) -> int:
    """Append a request's body to a file and sync it; tell the file's size then.

    When the sender breaks off or falls silent, what has arrived is kept.

    Raises:
        RefusedError: More than ``room_bytes`` arrived; those beyond are not written.
        StorageFullError: No space is left; what was written before is kept.
    """
    with disk_errors("receiving a delta"):
        file = await run_in_threadpool(_open_to_append, part)
    try:
        async for block in _in_blocks(_until_broken(stream)):
            room_bytes -= len(block)
            if room_bytes < 0:
                raise RefusedError(
                    ProblemCode.DELTA_TOO_LARGE, "more bytes arrive than were announced"
                )
            await run_in_threadpool(_write, file, block)
    finally:
        await run_in_threadpool(_seal, file)
    return part_size_bytes(part)


async def _until_broken(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(_MAX_SILENCE_S):
                chunk = await anext(stream)
        except (StopAsyncIteration, ClientDisconnect, TimeoutError):
            return
        yield chunk


async def _in_blocks(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Gather small chunks, so that each trip to the disk is worth a thread."""
    block = bytearray()
    async for chunk in stream:
        block += chunk
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _open_to_append(part: Path) -> FileIO:
    is_new = not part.exists()
    file = part.open("ab", buffering=0)
    if is_new:
        sync_directory(part.parent)
    return file


def _write(file: FileIO, block: bytes) -> None:
    rest = memoryview(block)
    with disk_errors("receiving a delta"):
        while rest:
            rest = rest[file.write(rest) :]


def _seal(file: FileIO) -> None:
    with disk_errors("receiving a delta"), file:
        os.fsync(file.fileno())
