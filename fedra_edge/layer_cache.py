"""Files named by their content, kept on disk within a quota and downloaded when missing."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from fedra_edge.durable_files import set_aside, storage_errors
from fedra_edge.errors import StorageFullError, UnexpectedAnswerError
from fedra_edge.metering import OnBytes, OpenMeter, Tally, unmetered
from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.models import BlobRef

LOGGER: Final = logging.getLogger(__name__)
_PART: Final = ".part"
_FOREIGN: Final = "foreign"
_MAX_DAMAGED: Final = 2
_STAMP_STEP_NS: Final = 1000
_KNOWN_FOR_S: Final = 60.0
"""How long it is taken as known what the cache holds, though others may put files there."""
_CONNECTIONS: Final = 3
_STACK_BYTES: Final = 2**20

Fetch = Callable[[BlobRef, Path, OnBytes], str]
"""Completes a file with a blob's bytes, from where it stands, and gives the file's sha256."""
Begin = Callable[[Mapping[Path, BlobRef], OnBytes], Collection[Path]]
"""Writes what it can of these files and names those it completed; a fetch takes up each other."""


@dataclass(frozen=True)
class _Held:
    path: Path
    size_bytes: int
    used_ns: int


class LayerCache:
    """Gives the local file of a blob, verified by its sha256 once per process.

    Args:
        directory: Where files live, as ``ab/abcd...``; sites may copy files in by hand.
        quota_bytes: The most that all files together may occupy.
        fetch: Downloads a blob; several threads call it at the same time.
        begin: Downloads what it can of all missing blobs before.
        meter: Watches what is downloaded.
    """

    def __init__(
        self,
        directory: Path,
        quota_bytes: int,
        fetch: Fetch,
        meter: OpenMeter = unmetered,
        begin: Begin | None = None,
    ) -> None:
        self._directory = directory
        self._quota_bytes = quota_bytes
        self._fetch = fetch
        self._meter = meter
        self._begin = begin
        self._verified: set[str] = set()
        self._pinned: set[Path] = set()
        self._is_holding = False
        self._lock = threading.RLock()
        self._stamp_ns = 0
        self._used_bytes = 0
        self._looked_at = -math.inf

    def path(self, ref: BlobRef, /) -> Path:
        """Give the verified local file, after a download when it is not there.

        Raises:
            StorageFullError: Disk or quota cannot take it beside what is in use.
            UnexpectedAnswerError: The server repeatedly sends other bytes than it names.
        """
        with self._lock:
            path = self._place(ref.sha256)
            if not self._is_sound(path, ref):
                self.fetch_all([ref])
            self._touch(path)
            if self._is_holding:
                self._pinned.add(path)
            return path

    def fetch_all(self, refs: Iterable[BlobRef]) -> None:
        """Download what is missing, in this order, over a few connections at once.

        Raises:
            StorageFullError: Disk or quota cannot take all of them beside what is in use.
            UnexpectedAnswerError: The server repeatedly sends other bytes than it names.
        """
        with self._lock:
            wanted = {self._place(ref.sha256): ref for ref in refs}
            missing = {path: ref for path, ref in wanted.items() if not self._is_sound(path, ref)}
            if not missing:
                return
            for path in missing:
                self._clear_the_way(path)
            self._make_room(missing.values(), keep=wanted.keys() | self._pinned)
            on_bytes = self._meter(sum(ref.size_bytes for ref in missing.values()))
            looked_at, self._looked_at = self._looked_at, -math.inf  # unknown if this fails
            _run_each(
                [
                    partial(self._download, path, missing[path], on_bytes)
                    for path in self._begun(missing, on_bytes)
                ]
            )
            self._used_bytes += sum(ref.size_bytes for ref in missing.values())
            self._looked_at = looked_at

    def fits(self, refs: Iterable[BlobRef]) -> bool:
        """Tell whether all of these could be here at the same time."""
        sizes = {ref.sha256: ref.size_bytes for ref in refs}
        return sum(sizes.values()) <= self._quota_bytes

    def give_way(self, size_bytes: int) -> bool:
        """Evict so many bytes for the sake of another file; tell whether anything could go."""
        with self._lock:
            return self._evict(self._listing(), size_bytes, self._pinned) < size_bytes

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Keep every file that is asked for inside this block until the block ends."""
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False
            self._pinned.clear()

    @property
    def used_bytes(self) -> int:
        """What all files together occupy, unfinished downloads included.

        It was looked at a minute ago at most; what was downloaded since is added.
        """
        if time.monotonic() - self._looked_at > _KNOWN_FOR_S:
            self._listing()
        return self._used_bytes

    def _place(self, sha256: str) -> Path:
        return self._directory / sha256[:2] / sha256

    def _is_sound(self, path: Path, ref: BlobRef) -> bool:
        with storage_errors(f"read {path}"):
            size_bytes = _size_of_file(path)
            if size_bytes is None:
                return False
            is_known = ref.sha256 in self._verified
            if size_bytes == ref.size_bytes and (is_known or sha256_of_file(path) == ref.sha256):
                self._verified.add(ref.sha256)
                return True
            LOGGER.warning("cached file %s is damaged; fetching it again", path.name[:12])
            self._verified.discard(ref.sha256)
            path.unlink()
            return False

    def _begun(self, missing: Mapping[Path, BlobRef], on_bytes: OnBytes) -> list[Path]:
        """Bring together what comes together; name what is still missing."""
        if self._begin is None:
            return list(missing)
        begun = Tally(on_bytes)
        complete = self._begin({_part_of(path): ref for path, ref in missing.items()}, begun)
        begun.take_back()  # each download counts what it finds
        rest = []
        for path, ref in missing.items():
            part = _part_of(path)
            if part in complete:
                self._keep(part, path, ref)
                on_bytes(ref.size_bytes)
            else:
                rest.append(path)
        return rest

    def _keep(self, part: Path, path: Path, ref: BlobRef) -> None:
        with storage_errors(f"keep {path}"):
            part.replace(path)
        self._verified.add(ref.sha256)

    def _clear_the_way(self, path: Path) -> None:
        with storage_errors(f"create {path.parent}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._clear(path)
        self._clear(_part_of(path))

    def _download(self, path: Path, ref: BlobRef, on_bytes: OnBytes) -> None:
        """Bring a file; if a power cut takes its name from it, it is still there as the part."""
        part = _part_of(path)
        for _ in range(_MAX_DAMAGED):
            digest = self._fetch(ref, part, on_bytes)
            if digest == ref.sha256:
                self._keep(part, path, ref)
                return
            with storage_errors(f"drop {part}"):
                part.unlink()
            on_bytes(-ref.size_bytes)
            LOGGER.warning("downloaded file %s has another digest", path.name[:12])
        raise UnexpectedAnswerError(
            f"the bytes received for {ref.sha256[:12]} are not the bytes it names",
            remedy="a proxy on the way may change downloads; exempt the server from it",
        )

    def _clear(self, place: Path) -> None:
        """Move away what is no file, a directory above all; it may be somebody's."""
        with storage_errors(f"look at {place}"):
            is_free = place.is_file() or not place.exists()
        if not is_free:
            aside = set_aside(place, self._directory / _FOREIGN)
            LOGGER.warning("%s is no file and was moved to %s", place, aside)

    def _make_room(self, refs: Collection[BlobRef], keep: Collection[Path]) -> None:
        """Evict what was used least recently until these fit the quota beside what is kept."""
        needed_bytes = sum(ref.size_bytes for ref in refs)
        if self.used_bytes + needed_bytes <= self._quota_bytes:
            return
        names = tuple(ref.sha256 for ref in refs)
        others = [held for held in self._listing() if not held.path.name.startswith(names)]
        excess_bytes = sum(held.size_bytes for held in others) + needed_bytes - self._quota_bytes
        excess_bytes = self._evict(others, excess_bytes, keep)
        if excess_bytes > 0:
            raise StorageFullError(
                f"the cache quota of {self._quota_bytes} bytes is {excess_bytes} bytes too small "
                "for this work",
                remedy="allow more with FEDRA_EDGE_DISK_QUOTA_BYTES",
            )

    def _evict(self, candidates: Iterable[_Held], excess_bytes: int, keep: Collection[Path]) -> int:
        """Remove what was used least recently; give how many bytes are still too many."""
        for held in sorted(candidates, key=lambda held: held.used_ns):
            if excess_bytes <= 0:
                break
            if held.path not in keep and _unlink(held.path):
                LOGGER.debug("evicted %s", held.path.name[:12])
                excess_bytes -= held.size_bytes
                self._used_bytes -= held.size_bytes
        return excess_bytes

    def _touch(self, path: Path) -> None:
        """Let a file be the one used last, also when the clock has gone back since the others."""
        newest_ns = self._stamp_ns or max((held.used_ns for held in self._listing()), default=0)
        self._stamp_ns = max(time.time_ns(), newest_ns + _STAMP_STEP_NS)
        with contextlib.suppress(OSError):
            os.utime(path, ns=(self._stamp_ns, self._stamp_ns))

    def _listing(self) -> list[_Held]:
        """Look at all files, and take note of what they occupy."""
        held = []
        for folder in _entries(self._directory):
            for entry in _entries(folder) if len(folder.name) == len("ab") else ():
                with contextlib.suppress(OSError):
                    state = entry.stat()
                    held.append(_Held(Path(entry.path), state.st_size, state.st_mtime_ns))
        self._used_bytes = sum(it.size_bytes for it in held)
        self._looked_at = time.monotonic()
        return held


def _entries(directory: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """Look into a directory; what is none, or not there, holds nothing."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []


def _size_of_file(path: Path) -> int | None:
    """Look at a file; None when there is none, or something else."""
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _run_each(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks, a few at a time; after the first failure none is begun, and it is raised."""
    if len(tasks) == 1:
        tasks[0]()
        return
    usual_bytes = threading.stack_size(_STACK_BYTES)  # of what an address limit leaves, little
    try:
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fedra-download") as pool:
            running = [pool.submit(task) for task in tasks]
            try:
                for done in as_completed(running):
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        threading.stack_size(usual_bytes)


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # still mapped by this process, on Windows
        return False
    return True
