"""The bytes of a delta on their way: from the socket to the disk in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from io import FileIO
from pathlib import Path
from typing import Final, NamedTuple

from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.errors import RefusedError
from fedra_server.storage.durability import disk_errors, sync_directory

BLOCK_BYTES: Final = 2**20
_MAX_SILENCE_S: Final = 30.0
"""A sender that is silent for longer has lost its connection and will come back."""


def part_size_bytes(part: Path) -> int:
    """Tell how many bytes have arrived; 0 before the first."""
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0


class Patience:
    """Waits for a sender, not for ever, and no more once another request took its place."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Timeout | None = None
        self._is_over = False

    def end(self) -> None:
        """Wait no more; any thread may say so."""
        self._loop.call_soon_threadsafe(self._end)

    async def await_next(self, stream: AsyncIterator[bytes]) -> bytes | None:
        """Give the next bytes; None at the end, when the sender is gone, or nobody waits for it."""
        try:
            async with asyncio.timeout(0 if self._is_over else _MAX_SILENCE_S) as self._waiting:
                return await anext(stream)
        except (StopAsyncIteration, ClientDisconnect, TimeoutError):
            return None
        finally:
            self._waiting = None

    def _end(self) -> None:
        self._is_over = True
        if self._waiting is not None:
            self._waiting.reschedule(self._loop.time())


class Received(NamedTuple):
    """How long a file is now, and its sha256 if all of it came in one request."""

    size_bytes: int
    sha256: str | None


async def receive(
    part: Path,
    stream: AsyncIterator[bytes],
    room_bytes: int,
    patience: Patience,
    block_bytes: Callable[[], int] = lambda: BLOCK_BYTES,
    *,
    is_named_durably: bool = True,
) -> Received:
    """Append a request's body to a file and sync it, and digest it on the way.

    When the sender breaks off or falls silent, what has arrived is kept. ``block_bytes`` says,
    at any moment, how much to gather before it is worth a trip to the disk. The name of a new
    file is synced as well, unless it is about to get another.

    Raises:
        RefusedError: More than ``room_bytes`` arrived; those beyond are not written.
        StorageFullError: No space is left; what was written before is kept.
    """
    file = _PartFile(part, is_named_durably=is_named_durably)
    block = bytearray()
    try:
        while (chunk := await patience.await_next(stream)) is not None:
            room_bytes -= len(chunk)
            if room_bytes < 0:
                block.clear()
                raise RefusedError(
                    ProblemCode.DELTA_TOO_LARGE, "more bytes arrive than were announced"
                )
            block += chunk
            if len(block) >= block_bytes():
                await run_in_threadpool(file.append, block)
    finally:
        await run_in_threadpool(file.finish, block)
    return Received(part_size_bytes(part), file.sha256)


class _PartFile:
    """A file that grows at its end; it is opened when there is something to write."""

    def __init__(self, path: Path, *, is_named_durably: bool) -> None:
        self._path = path
        self._is_named_durably = is_named_durably
        self._file: FileIO | None = None
        self._digest: hashlib._Hash | None = None

    @property
    def sha256(self) -> str | None:
        """The digest of the file, if it was empty before."""
        return None if self._digest is None else self._digest.hexdigest()

    def append(self, block: bytearray) -> None:
        """Write a block and take away from it what is written, also when the disk refuses."""
        if not block:
            return
        with disk_errors("receiving a delta"):
            file = self._file = self._file or self._open()
            while block:
                written_bytes = file.write(block)
                if self._digest is not None:
                    with memoryview(block) as view:
                        self._digest.update(view[:written_bytes])
                del block[:written_bytes]
                fault_point("upload.written")

    def finish(self, block: bytearray) -> None:
        """Write what is left, and make all of it last."""
        try:
            self.append(block)
        finally:
            if self._file is not None:
                with disk_errors("receiving a delta"), self._file:
                    fault_point("upload.received")
                    os.fsync(self._file.fileno())
                    fault_point("upload.synced")

    def _open(self) -> FileIO:
        is_new = not self._path.exists()
        file = self._path.open("ab", buffering=0)
        if file.tell() == 0:
            self._digest = hashlib.sha256()
        if is_new and self._is_named_durably:
            sync_directory(self._path.parent)
        return file
