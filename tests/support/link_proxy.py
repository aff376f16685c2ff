"""A bad link as a real TCP proxy: slow, far away, with connections that are reset, and darkness."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

_PACKET_BYTES = 1400
_BUFFER_BYTES = 16 * 2**10
_RESET = struct.pack("ii", 1, 0)
_BITS = 8


_Line = asyncio.Queue[tuple[float, bytes]]
"""Packets on their way, with the time of their arrival; an empty one is the end."""


@dataclass(frozen=True)
class Quality:
    """How bad a link is.

    ``bits_per_s`` holds for each direction, ``latency_s`` for each way. One connection in
    ``reset_every`` is reset, the first one among them, after a random number of bytes below
    ``reset_below_bytes``, in both directions together.
    """

    bits_per_s: float | None = None
    latency_s: float = 0.0
    reset_every: int | None = None
    reset_below_bytes: int = 2**18
    seed: int = 0


@dataclass
class Carried:
    """What went over the link; bytes that were lost on it count."""

    bytes_up: int = 0
    bytes_down: int = 0
    connections: int = 0
    resets: int = 0


class LinkProxy:
    """Forwards connections to one port of this machine; all methods may be called at any time."""

    def __init__(self, target_port: int, quality: Quality) -> None:
        self.quality = quality
        self.carried = Carried()
        self._target_port = target_port
        self._generator = np.random.default_rng(quality.seed)
        self._listener = _small_socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1)  # in darkness hardly a connection is established
        self._loop = asyncio.new_event_loop()
        self._is_light = asyncio.Event()
        self._is_light.set()
        self._up, self._down = _Lane(quality.bits_per_s), _Lane(quality.bits_per_s)
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="link-proxy")

    @property
    def url(self) -> str:
        """Where the link begins."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        """Begin to forward."""
        self._thread.start()

    def stop(self) -> None:
        """End every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def darken(self) -> None:
        """Drop from now on whatever is sent, without a word to anybody."""
        self._loop.call_soon_threadsafe(self._darken)

    def lighten(self) -> None:
        """Forward again; connections that lost something stay silent for ever."""
        self._loop.call_soon_threadsafe(self._is_light.set)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Have something done beside."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _darken(self) -> None:
        self._is_light.clear()
        for connection in self._connections:
            connection.note_darkness()

    def _run(self) -> None:
        self.spawn(self._accept())
        self._loop.run_forever()
        for task in list(self._tasks):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        for connection in list(self._connections):
            connection.close()
        self._loop.close()
        self._listener.close()

    async def _accept(self) -> None:
        while True:
            near, _ = await self._loop.sock_accept(self._listener)
            await self._is_light.wait()
            self.spawn(self._serve(near))

    async def _serve(self, near: socket.socket) -> None:
        far = _small_socket()
        connection = _Connection(near, far, self._doom())
        self._connections.add(connection)
        try:
            await self._loop.sock_connect(far, ("127.0.0.1", self._target_port))
            async with asyncio.TaskGroup() as group:
                for source, target, lane in ((near, far, self._up), (far, near, self._down)):
                    line: _Line = asyncio.Queue()
                    group.create_task(self._carry(connection, source, line, lane))
                    group.create_task(self._deliver(connection, target, line))
        except* (OSError, _ResetError):
            pass
        finally:
            connection.close()
            self._connections.discard(connection)

    def _doom(self) -> int | None:
        number = self.carried.connections
        self.carried.connections += 1
        if self.quality.reset_every is None or number % self.quality.reset_every:
            return None
        return int(self._generator.integers(self.quality.reset_below_bytes))

    async def _carry(
        self, connection: _Connection, source: socket.socket, line: _Line, lane: _Lane
    ) -> None:
        """Read packets, let them take their time on the lane, and have them delivered later."""
        while packet := await self._loop.sock_recv(source, _PACKET_BYTES):
            connection.in_flight += 1
            await lane.carry(len(packet))
            self._count(packet, is_up=lane is self._up)
            connection.bytes_carried += len(packet)
            if connection.is_doomed:
                self.carried.resets += 1
                raise _ResetError
            await line.put((self._loop.time() + self.quality.latency_s, packet))
            if not self._is_light.is_set():
                connection.note_darkness()
            if connection.is_lost:
                await asyncio.Event().wait()  # nobody is told
        await self._is_light.wait()
        await line.put((self._loop.time() + self.quality.latency_s, b""))

    async def _deliver(self, connection: _Connection, target: socket.socket, line: _Line) -> None:
        while True:
            arrives_at, packet = await line.get()
            await asyncio.sleep(arrives_at - self._loop.time())
            if connection.is_lost:
                continue
            if not packet:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)
                return
            connection.in_flight -= 1
            await self._loop.sock_sendall(target, packet)  # fails when it is closed: all ends

    def _count(self, packet: bytes, *, is_up: bool) -> None:
        if is_up:
            self.carried.bytes_up += len(packet)
        else:
            self.carried.bytes_down += len(packet)


class _ResetError(Exception):
    """The connection has met its fate."""


class _Connection:
    """Both ends of a connection, and what befell it."""

    def __init__(self, near: socket.socket, far: socket.socket, reset_at: int | None) -> None:
        self._ends = (near, far)
        self._reset_at = reset_at
        self.bytes_carried = 0
        self.in_flight = 0
        self.is_lost = False

    @property
    def is_doomed(self) -> bool:
        """Whether it is to be reset now."""
        return self._reset_at is not None and self.bytes_carried >= self._reset_at

    def note_darkness(self) -> None:
        """Lose the connection if anything is on its way."""
        self.is_lost = self.is_lost or self.in_flight > 0

    def close(self) -> None:
        """End it, with a reset when it is to be, and when it did not end by itself."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                if self.is_doomed:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.close()


class _Lane:
    """One direction, which all connections share."""

    def __init__(self, bits_per_s: float | None) -> None:
        self._bytes_per_s = None if bits_per_s is None else bits_per_s / _BITS
        self._free_at = 0.0

    async def carry(self, size_bytes: int) -> None:
        """Take as long as these bytes take, behind those that came before."""
        if self._bytes_per_s is None:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + size_bytes / self._bytes_per_s
        await asyncio.sleep(self._free_at - now)


def _small_socket() -> socket.socket:
    """Make one that takes in little before it is read, in packets as on a real link."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _PACKET_BYTES)
    made.setblocking(False)
    return made


@contextmanager
def bad_link(target_port: int, quality: Quality) -> Iterator[LinkProxy]:
    """Have a bad link to a port of this machine while the block lasts."""
    proxy = LinkProxy(target_port, quality)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
