"""Copies of weights nearer than the server: directories, such as a USB stick, and LAN shares.

A mirror has files named by their digest, as ``ab/abcd...`` (so is a client's ``blobs`` folder, and
a server's) or all in one place. Nothing in it is believed before its digest is known.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from fedra_edge.bandwidth import Bandwidth
from fedra_edge.durable_files import storage_errors
from fedra_edge.errors import (
    FedraEdgeError,
    NotThereError,
    ServerUnreachableError,
    StorageError,
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
"""How long a share that does not answer is left alone."""


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
        except OSError as error:
            raise ServerUnreachableError(error.strerror or str(error)) from error
        if source is None:
            return None
        digest = hashlib.sha256()
        with storage_errors(f"write {file}"), file.open("wb") as copy:
            for chunk in self._read(source):
                copy.write(chunk)
                digest.update(chunk)
                on_bytes(len(chunk))
        return digest.hexdigest()

    def interrupt(self) -> None:
        """End a copy under way."""
        self._stopping.set()

    def close(self) -> None:
        """Nothing is open between two copies."""

    def _read(self, source: Path) -> Iterator[bytes]:
        try:
            with source.open("rb") as file:
                while chunk := file.read(_COPY_BYTES):
                    if self._stopping.is_set():
                        raise WorkInterrupted("a stop was asked for")
                    yield chunk
        except OSError as error:
            raise ServerUnreachableError(error.strerror or str(error)) from error


class ShareMirror:
    """A web server in the plant that serves such a directory; it is told no credential."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._rests_until = 0.0

    def bring(self, ref: BlobRef, file: Path, on_bytes: OnBytes) -> str | None:
        """Download a blob's file."""
        if time.monotonic() < self._rests_until:
            return None
        for place in _places(ref.sha256):
            request = Request(Route("GET", f"/{place}"), f"/{place}")
            try:
                return Download(self._transport, request, file, ref.size_bytes, on_bytes).complete()
            except NotThereError:
                continue
            except UnexpectedAnswerError:
                raise
            except ServerUnreachableError:
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
        self._complained: set[str] = set()

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
                    return digest
                if digest is not None:
                    self._complain(name, f"its file {ref.sha256} is damaged")
            except (StorageError, WorkInterrupted):
                raise
            except FedraEdgeError as error:
                self._complain(name, str(error))
            told.take_back()
            with storage_errors(f"remove {copy}"):
                copy.unlink(missing_ok=True)
        return self._server(ref, part, on_bytes)

    def _complain(self, name: str, reason: str) -> None:
        if name not in self._complained:
            self._complained.add(name)
            LOGGER.warning("the mirror %s is of no use: %s", name, reason)


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
    return ShareMirror(Transport(open_http_client(place, near), near, bandwidth))


def _places(sha256: str) -> tuple[str, ...]:
    return f"{sha256[:2]}/{sha256}", f"blobs/{sha256[:2]}/{sha256}", sha256
