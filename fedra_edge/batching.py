"""Brings many small blobs with one request, where each of them would cost one of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from fedra_edge.durable_files import storage_errors
from fedra_edge.errors import NotFoundError, ServerUnreachableError
from fedra_edge.metering import OnBytes
from fedra_edge.protocol import routes
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.models import BlobRef
from fedra_edge.transport import Request, Transport

LOGGER: Final = logging.getLogger(__name__)
_SMALL_BYTES: Final = 2**20
_BATCH_BYTES: Final = 8 * 2**20
_MOST_BLOBS: Final = 128

Places = Mapping[Path, BlobRef]
"""Files that blobs are to be downloaded into."""


def begin_together(transport: Transport, places: Places, on_bytes: OnBytes) -> set[Path]:
    """Write the small ones among these files, as far as they come; name those that are right.

    What does not come, or not as it should be, is left to a download of its own.

    Raises:
        StorageError: A file cannot be written.
    """
    complete: set[Path] = set()
    for batch in _batches(places):
        digests = ",".join(ref.sha256 for ref in batch.values())
        request = Request(routes.BLOBS, routes.BLOBS.path, query={"sha256": digests})
        try:
            with transport.stream(request) as response:
                chunks = _counted(transport.streamed(response), on_bytes)
                complete.update(_distribute(chunks, batch))
        except (ServerUnreachableError, NotFoundError) as error:  # an older server has no such call
            LOGGER.debug("blobs come one by one: %s", error)
            break
    return complete


def _batches(places: Places) -> Iterator[dict[Path, BlobRef]]:
    """Group small files that are not begun, so that a request is worth it and not too large."""
    batch: dict[Path, BlobRef] = {}
    for path, ref in places.items():
        if ref.size_bytes > _SMALL_BYTES or path.exists():
            continue
        batch[path] = ref
        if len(batch) == _MOST_BLOBS or sum(it.size_bytes for it in batch.values()) > _BATCH_BYTES:
            yield batch
            batch = {}
    if len(batch) > 1:
        yield batch


def _counted(chunks: Iterable[bytes], on_bytes: OnBytes) -> Iterator[bytes]:
    for chunk in chunks:
        on_bytes(len(chunk))
        yield chunk


def _distribute(chunks: Iterable[bytes], batch: Places) -> Iterator[Path]:
    """Cut a stream of files, one after the other, into the files; give those that are right."""
    rest = memoryview(b"")
    source = iter(chunks)
    for path, ref in batch.items():
        missing_bytes = ref.size_bytes
        digest = sha256()
        with storage_errors(f"write {path}"), path.open("wb", buffering=0) as file:
            while missing_bytes:
                rest = rest or memoryview(next(source, b""))
                if not rest:
                    return
                taken_bytes = file.write(rest[:missing_bytes])
                digest.update(rest[:taken_bytes])
                missing_bytes -= taken_bytes
                rest = rest[taken_bytes:]
                fault_point("download.part")
        if digest.hexdigest() == ref.sha256:
            yield path
    next(source, b"")  # read to its end, an answer leaves its connection to the next request
