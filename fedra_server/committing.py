"""Commits revisions: merges what is due, and publishes it with all that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Final

from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_server.clock import Clock
from fedra_server.errors import StorageError
from fedra_server.judging import judge_deltas, screening_of
from fedra_server.merging import Contributor
from fedra_server.publishing import Arrival, merged_revision
from fedra_server.rounds import HeldSlice, WaitingDelta, due_pieces, too_stale
from fedra_server.run_locks import RunLocks
from fedra_server.runs import AssignmentState
from fedra_server.sifting import Sifted
from fedra_server.stopwatch import Stopwatch
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.delta_files import DeltaFiles
from fedra_server.storage.durability import disk_errors
from fedra_server.storage.records import MergeRecord, RevisionRecord, RoundRecord, RunRecord
from fedra_server.storage.rounds import Publication
from fedra_server.storage.store import Store

LOGGER = logging.getLogger(__name__)
_LOST: Final = (
    "Bring the file back, as by mounting its disk; if it is lost for good, put an empty one in its "
    "place, and the run goes on without it."
)


class Committer:
    """The only writer of revisions after the first.

    A merge after which no delta may be left behind, because late ones are refused or the run
    ends, keeps the run's intake waiting; during every other one deltas go on being counted in,
    and wait for the next.
    """

    def __init__(
        self, store: Store, blobs: BlobStore, deltas: DeltaFiles, clock: Clock, locks: RunLocks
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._deltas = deltas
        self._clock = clock
        self._locks = locks
        self.merging = Stopwatch()

    def commit(self, run: RunRecord, current: RoundRecord) -> bool:
        """Merge the pieces that are due and publish them; tell whether anything changed."""
        is_last = current.number >= run.spec.rounds
        is_all_or_none = run.spec.mode == "synchronous" and run.spec.staleness_limit == 0
        leaves_none = is_last or is_all_or_none
        with self._locks.of(run.run) if leaves_none else nullcontext():
            with self._store.reading():
                waiting = self._store.waiting_deltas(run.run)
                base = self._store.revision(run.run)
            now = self._clock.now()
            due = due_pieces(waiting, run.spec, now=now, is_last=is_last)
            taken = [delta for delta in waiting if not due.isdisjoint(delta.pieces)]
            if not taken:
                return False
            if self._set_damaged_aside(taken):
                return True
            with self._store.reading():
                sifted = judge_deltas(
                    self._store, self._blobs, self._deltas, run, base,
                    taken=taken, due=due, now=now, is_last=is_last,
                )  # fmt: skip
            if not sifted.merging:
                if sifted.records:
                    self._store.record_screening(run.run, screening_of(sifted), now)
                return bool(sifted.records)
            revision, merges = self._merge(run, base, taken, sifted, now)
            publication = Publication(
                revision=revision,
                merges=merges,
                merged=sifted.settled,
                expired=self._too_stale(run, revision, is_last=is_last),
                leaves_none=leaves_none,
                finishes_run=is_last,
                screening=screening_of(sifted),
            )
            fault_point("publish.decided")
            self._store.publish(publication, current.number, now)
            fault_point("publish.recorded")
        LOGGER.info(
            "run %s: round %d merged %d deltas into revision %d",
            run.run, current.number, len(sifted.merging), revision.manifest.number,
        )  # fmt: skip
        return True

    def _merge(
        self,
        run: RunRecord,
        base: RevisionRecord,
        taken: Iterable[WaitingDelta],
        sifted: Sifted,
        now: float,
    ) -> tuple[RevisionRecord, list[MergeRecord]]:
        bases = self._bases(run.run, taken)
        arrivals = [
            Arrival(
                Contributor(delta.assignment_id, delta.num_examples, delta.chance),
                sifted.merging[delta.assignment_id],
                bases[delta.base_revision].versions,
                self._deltas.path(delta.assignment_id),
            )
            for delta in taken
            if delta.assignment_id in sifted.merging
        ]
        with disk_errors("merging"):
            return merged_revision(
                base, arrivals, run.spec, self._blobs, now=now, scales=sifted.scales
            )

    def _too_stale(
        self, run: RunRecord, revision: RevisionRecord, *, is_last: bool
    ) -> list[AssignmentId]:
        """Name the slices at work whose deltas nobody will take once a revision is published."""
        pending = self._store.pending_slices(run.run)
        if is_last:
            return [held.assignment_id for held in pending]
        bases = self._bases(run.run, pending)
        versions = {number: base.version_by_piece for number, base in bases.items()}
        present = revision.version_by_piece
        return too_stale(pending, versions, present, run.spec.staleness_limit)

    def _bases(self, run: RunId, held: Iterable[HeldSlice]) -> dict[int, RevisionRecord]:
        numbers = {item.base_revision for item in held}
        return {number: self._store.revision(run, number) for number in numbers}

    def _set_damaged_aside(self, taken: Iterable[WaitingDelta]) -> bool:
        """Refuse admitted deltas whose bytes are altered; tell whether there were any.

        Raises:
            StorageError: A file is not there or cannot be read, which may pass.
        """
        deltas = list(taken)
        try:
            for delta in deltas:
                self._deltas.path(delta.assignment_id).stat()
            damaged = [it for it in deltas if self._deltas.sha256(it.assignment_id) != it.sha256]
        except OSError as error:
            raise StorageError(
                f"an admitted delta cannot be read: {error}", remedy=_LOST
            ) from error
        for delta in damaged:
            file = self._deltas.path(delta.assignment_id)
            LOGGER.error("the stored delta %s is damaged; its run goes on without it", file)
            self._store.settle(
                delta.assignment_id,
                AssignmentState.REFUSED,
                detail="the server's copy of this delta is damaged",
                now=self._clock.now(),
                only_from={AssignmentState.ADMITTED},
            )
        return bool(damaged)
