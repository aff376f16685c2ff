"""Copies of weights nearer than the server: directories, such as a USB stick, and LAN shares.

A mirror has files named by their digest, as ``ab/abcd...`` (so is a client's ``blobs`` folder, and
a server's) or all in one place. Nothing in it is believed before its digest is known.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from fedra_edge.bandwidth import Bandwidth
from fedra_edge.durable_files import storage_errors
from fedra_edge.errors import (
    FedraEdgeError,
    MirrorTooSlowError,
    NotThereError,
    ServerUnreachableError,
    UnexpectedAnswerError,
    WorkInterrupted,
)
from fedra_edge.layer_cache import Fetch
from fedra_edge.link import Link
from fedra_edge.metering import OnBytes, Tally
from fedra_edge.protocol.models import BlobRef
from fedra_edge.protocol.routes import Route
from fedra_edge.transfers import Download
from fedra_edge.transport import Request, Transport, open_http_client

LOGGER: Final = logging.getLogger(__name__)
_COPY_BYTES: Final = 2**20
_REST_S: Final = 300.0
"""How long a share that does not answer, or is too slow, is left alone."""
_SLOWEST_BYTES_PER_S: Final = 2**11
_WATCHED_S: Final = 30.0
"""How long a share may bring less than that."""
_STILL_USED: Final = "its others are still used"
_MANY_MISSES: Final = 8
"""After so many files that a mirror has not, and none that it has, that is told."""
_FAIR_SHARE: Final = 8
"""Downloads at the same time have at least such a part of a capped link each."""


class Mirror(Protocol):
    """A place that may have blobs."""

    def bring(self, ref: BlobRef, file: Path, on_bytes: OnBytes) -> str | None:
        """Write a blob's file and give its sha256; None when it is not there.

        Raises:
            ServerUnreachableError: The mirror is not there, or cannot be read.
        """
        ...

    def interrupt(self) -> None:
        """End what is under way."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class DirectoryMirror:
    """A directory of this machine, which need not always be there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stopping = threading.Event()

    def bring(self, ref: BlobRef, file: Path, on_bytes: OnBytes) -> str | None:
        """Copy a blob's file."""
        try:
            self._directory.stat()
            sources = (self._directory / place for place in _places(ref.sha256))
            source = next((path for path in sources if path.is_file()), None)
            size_bytes = 0 if source is None else source.stat().st_size
        except OSError as error:
            raise ServerUnreachableError(error.strerror or str(error)) from error
        if source is None:
            return None
        if size_bytes != ref.size_bytes:
            raise UnexpectedAnswerError(
                f"its copy of {ref.sha256} is damaged: {size_bytes} bytes, not {ref.size_bytes}"
            )
        digest = hashlib.sha256()
        with storage_errors(f"write {file}"), file.open("wb") as copy:
            for chunk in self._read(source, size_bytes):
                copy.write(chunk)
                digest.update(chunk)
                on_bytes(len(chunk))
        return digest.hexdigest()

    def interrupt(self) -> None:
        """End a copy under way."""
        self._stopping.set()

    def close(self) -> None:
        """Nothing is open between two copies."""

    def _read(self, source: Path, missing_bytes: int) -> Iterator[bytes]:
        try:
            with source.open("rb") as file:
                while chunk := file.read(min(_COPY_BYTES, missing_bytes)):
                    missing_bytes -= len(chunk)
                    if self._stopping.is_set():
                        raise WorkInterrupted("a stop was asked for")
                    yield chunk
        except OSError as error:
            raise ServerUnreachableError(error.strerror or str(error)) from error


class SpeedWatch:
    """Passes bytes on and ends a transfer that is too slow; what came first starts the clock."""

    def __init__(
        self,
        on_bytes: OnBytes,
        least_bytes_per_s: float,
        watched_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_bytes = on_bytes
        self._least_bytes_per_s = least_bytes_per_s
        self._watched_s = watched_s
        self._clock = clock
        self._since: float | None = None
        self._size_bytes = 0

    def __call__(self, size_bytes: int) -> None:
        """Take note of bytes.

        Raises:
            MirrorTooSlowError: There were too few of them for too long.
        """
        self._on_bytes(size_bytes)
        now = self._clock()
        if self._since is None:
            self._since = now
        self._size_bytes += size_bytes
        passed_s = now - self._since
        if passed_s < self._watched_s:
            return
        if self._size_bytes < passed_s * self._least_bytes_per_s:
            raise MirrorTooSlowError(
                f"it brought {self._size_bytes} bytes in {passed_s:.0f} s",
                remedy="look at the mirror and the network in between",
            )
        self._since, self._size_bytes = now, 0


class ShareMirror:
    """A web server in the plant that serves such a directory; it is told no credential."""

    def __init__(
        self,
        transport: Transport,
        least_bytes_per_s: float = _SLOWEST_BYTES_PER_S,
        watched_s: float = _WATCHED_S,
    ) -> None:
        self._transport = transport
        self._least_bytes_per_s = least_bytes_per_s
        self._watched_s = watched_s
        self._rests_until = 0.0

    def bring(self, ref: BlobRef, file: Path, on_bytes: OnBytes) -> str | None:
        """Download a blob's file."""
        if time.monotonic() < self._rests_until:
            return None
        watch = SpeedWatch(on_bytes, self._least_bytes_per_s, self._watched_s)
        for place in _places(ref.sha256):
            request = Request(Route("GET", f"/{place}"), f"/{place}")
            try:
                return Download(self._transport, request, file, ref.size_bytes, watch).complete()
            except NotThereError:
                continue
            except UnexpectedAnswerError:
                raise
            except (ServerUnreachableError, MirrorTooSlowError):
                self._rests_until = time.monotonic() + _REST_S
                raise
        return None

    def interrupt(self) -> None:
        """End a download under way."""
        self._transport.interrupt()

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()


class MirroredFetch:
    """Downloads like ``server``, but from the first mirror that has the right bytes."""

    def __init__(self, mirrors: Sequence[tuple[str, Mirror]], server: Fetch) -> None:
        self._mirrors = mirrors
        self._server = server
        self._told: set[tuple[str, str]] = set()
        self._misses = dict.fromkeys((name for name, _ in mirrors), 0)

    def __call__(self, ref: BlobRef, part: Path, on_bytes: OnBytes) -> str:
        """Complete ``part`` and give its sha256; what a mirror has wrong is never kept."""
        copy = part.with_name(f"{part.name}.mirror")
        for name, mirror in self._mirrors:
            told = Tally(on_bytes)
            try:
                digest = mirror.bring(ref, copy, told)
                if digest == ref.sha256:
                    with storage_errors(f"keep {part}"):
                        copy.replace(part)
                    self._misses.pop(name, None)
                    return digest
                if digest is None:
                    self._note_miss(name)
                else:
                    reason = f"its copy of {ref.sha256} is damaged; {_STILL_USED}"
                    self._warn(name, "damaged", reason)
            except WorkInterrupted:
                raise
            except UnexpectedAnswerError as error:
                self._warn(name, "damaged", f"{error}; {_STILL_USED}")
            except FedraEdgeError as error:
                self._misses.pop(name, None)
                self._warn(name, "useless", f"is of no use: {error}")
            told.take_back()
            with storage_errors(f"remove {copy}"):
                copy.unlink(missing_ok=True)
        return self._server(ref, part, on_bytes)

    def _note_miss(self, name: str) -> None:
        """Count what a mirror has not, as long as it had nothing; one that rests is not asked."""
        misses = self._misses.get(name)
        if misses is None:
            return
        self._misses[name] = misses + 1
        if misses + 1 == _MANY_MISSES:
            reason = f"had none of the first {_MANY_MISSES} files looked for there"
            hint = "adapters, new in each round, come from the server anyway"
            self._warn(name, "empty", f"{reason}; does it hold this model's weights? ({hint})")

    def _warn(self, name: str, kind: str, reason: str) -> None:
        """Tell of each mirror once what is wrong with it."""
        if (name, kind) not in self._told:
            self._told.add((name, kind))
            LOGGER.warning("the mirror %s: %s", name, reason)


def open_mirrors(
    places: Sequence[str], link: Link, bandwidth: Bandwidth
) -> list[tuple[str, Mirror]]:
    """Open directories and web addresses; none need be there yet.

    A share is reached without the link's proxy, but counts against its bandwidth.
    """
    return [(place, _open(place, link, bandwidth)) for place in places]


def is_web_address(place: str) -> bool:
    """Tell a share from a directory."""
    return place.startswith(("http://", "https://"))


def _open(place: str, link: Link, bandwidth: Bandwidth) -> Mirror:
    if not is_web_address(place):
        return DirectoryMirror(Path(place))
    near = Link(ca_file=link.ca_file, idle_s=link.idle_s)
    transport = Transport(open_http_client(place, near), near, bandwidth)
    if link.max_bytes_per_s is None:
        return ShareMirror(transport)
    return ShareMirror(transport, min(_SLOWEST_BYTES_PER_S, link.max_bytes_per_s / _FAIR_SHARE))


def _places(sha256: str) -> tuple[str, ...]:
    return f"{sha256[:2]}/{sha256}", f"blobs/{sha256[:2]}/{sha256}", sha256
