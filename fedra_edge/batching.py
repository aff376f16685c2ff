"""Brings many small blobs with one request, where each of them would cost one of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
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


def begin_together(transport: Transport, places: Places, on_bytes: OnBytes) -> None:
    """Write the small ones among these files, as far as they come.

    What does not come, or not as it should be, is left to a download of its own; nothing is
    digested here.

    Raises:
        StorageError: A file cannot be written.
    """
    for batch in _batches(places):
        digests = ",".join(ref.sha256 for ref in batch.values())
        request = Request(routes.BLOBS, routes.BLOBS.path, query={"sha256": digests})
        try:
            with transport.stream(request) as response:
                _distribute(_counted(transport.streamed(response), on_bytes), batch)
        except (ServerUnreachableError, NotFoundError) as error:  # an older server has no such call
            LOGGER.debug("blobs come one by one: %s", error)
            return


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


def _distribute(chunks: Iterable[bytes], batch: Places) -> None:
    """Cut a stream of files, one after the other, into the files."""
    rest = memoryview(b"")
    source = iter(chunks)
    for path, ref in batch.items():
        missing_bytes = ref.size_bytes
        with storage_errors(f"write {path}"), path.open("wb") as file:
            while missing_bytes:
                rest = rest or memoryview(next(source, b""))
                if not rest:
                    return
                taken_bytes = file.write(rest[:missing_bytes])
                missing_bytes -= taken_bytes
                rest = rest[taken_bytes:]
                fault_point("download.part")
    next(source, b"")  # read to its end, an answer leaves its connection to the next request
