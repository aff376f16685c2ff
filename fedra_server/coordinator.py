"""Moves every run forward: opens rounds, hands out work, merges. The only writer of rounds.

All state is in the store, so a restarted server continues the round it was in.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_server.assigning import assign
from fedra_server.clock import Clock
from fedra_server.committing import Committer
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import FedraServerError
from fedra_server.intake import Intake
from fedra_server.planning import PlannedSlice
from fedra_server.recruiting import Recruiter
from fedra_server.rounds import Progress, RoundStep, draw_size, last_handed_out, next_step
from fedra_server.run_locks import RunLocks
from fedra_server.runs import RunState
from fedra_server.stopwatch import Stopwatch
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.delta_files import DeltaFiles
from fedra_server.storage.records import RevisionRecord, RoundRecord, RunRecord
from fedra_server.storage.store import Store

LOGGER = logging.getLogger(__name__)
_TICK_S = 1.0
"""How often runs are looked at without a wake-up: for deadlines and for operators' commands."""


class Coordinator:
    """Runs in a thread of its own; ``wake`` makes it look at once."""

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        home: ServerHome,
        config: ServerConfig,
        clock: Clock,
    ) -> None:
        self._store = store
        self._clock = clock
        locks, deltas = RunLocks(), DeltaFiles(home)
        self.intake = Intake(store, deltas, config, clock, locks)
        self._recruiter = Recruiter(store, config, clock)
        self._committer = Committer(store, blobs, deltas, clock, locks)
        self._wakeup = threading.Event()
        self._stopping = threading.Event()
        self._states_seen: dict[str, RunState] = {}
        self._listeners: list[Callable[[], None]] = []
        self._troubles: dict[RunId, str] = {}
        self._thread = threading.Thread(target=self._loop, name="coordinator")

    @property
    def merging(self) -> Stopwatch:
        """How often this process merged, and how long that took."""
        return self._committer.merging

    def start(self) -> None:
        """Begin to move runs forward; nobody was seen later than now, whatever the clock was."""
        self._store.cap_last_seen(self._clock.now())
        self._thread.start()

    def stop(self) -> None:
        """Finish the step at hand and end the thread."""
        self._stopping.set()
        self._wakeup.set()
        if self._thread.ident is not None:
            self._thread.join()

    def wake(self) -> None:
        """Say that something changed: a client came or went, a delta was admitted."""
        self._wakeup.set()

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call back, from the coordinator's thread, when clients should ask again."""
        self._listeners.append(listener)

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._wakeup.clear()
            try:
                if self.advance() or self._was_steered():
                    for listener in self._listeners:
                        listener()
            except Exception:
                LOGGER.exception("the runs cannot be looked at; trying again")
            self._wakeup.wait(_TICK_S)

    def advance(self) -> bool:
        """Take every active run as far as it can go now; tell whether anything changed."""
        return sum(self._advance_run(run) for run in self._store.runs()) > 0

    def _was_steered(self) -> bool:
        """Tell whether any run is in another state than when this was last asked."""
        before = self._states_seen
        self._states_seen = {run.run: run.state for run in self._store.runs()}
        return self._states_seen != before

    def _advance_run(self, run: RunRecord) -> bool:
        """Step until the run waits; what fails is tried again, and keeps no other run waiting."""
        changed = False
        try:
            while self._step(self._store.run(run.run)):
                changed = True
        except FedraServerError as error:
            self._tell_trouble(run.run, f"{error} {error.remedy}")
        except Exception:
            LOGGER.exception("run %s cannot go on because of a defect; trying again", run.run)
        else:
            self._tell_trouble(run.run, "")
        return changed

    def _tell_trouble(self, run: RunId, trouble: str) -> None:
        """Tell the operator when a run cannot go on, and when it can again, each once."""
        if self._troubles.get(run, "") == trouble:
            return
        self._troubles[run] = trouble
        if trouble:
            LOGGER.error("run %s cannot go on: %s", run, trouble)
        else:
            LOGGER.info("run %s goes on", run)

    def _step(self, run: RunRecord) -> bool:
        """Do one step of a run: let go, open a round, or take the open one further."""
        if run.state in {RunState.CREATED, RunState.FINISHED}:
            return False
        if run.state is RunState.STOPPED:
            now = self._clock.now()
            return self._store.dismiss(run.run, "the operator stopped the run", now) > 0
        current = self._store.current_round(run.run)
        if current is None:
            return self._open(run)
        if run.spec.mode == "buffered":
            return self._committer.commit(run, current) or self._hand_out(run, current)
        return self._step_synchronous(run, current)

    def _open(self, run: RunRecord) -> bool:
        """Open the next round; a buffered one after the first waits for nobody, even if paused."""
        base = self._store.revision(run.run)
        is_flowing = run.spec.mode == "buffered" and base.manifest.number > 0
        if run.state is not RunState.RUNNING and not is_flowing:
            return False
        number = base.manifest.number + 1
        planned: list[PlannedSlice] = []
        if not is_flowing:
            places = draw_size(run.spec)
            planned = self._recruiter.draw(run, number, base.last_trained, draw=0, places=places)
            if len(planned) < run.spec.min_participants:
                return False
        now = self._clock.now()
        opened = RoundRecord(
            run=run.run,
            number=number,
            base_revision=base.manifest.number,
            draws=int(not is_flowing),
            opened_at=now,
            deadline_at=now + run.spec.deadline_s,
            published_at=None,
        )
        fault_point("assign.decided")
        self._store.open_round(opened, [assign(run, base, number, item, now) for item in planned])
        fault_point("assign.recorded")
        if not is_flowing:
            LOGGER.info(
                "run %s: round %d opened with %d participants", run.run, number, len(planned)
            )
        return True

    def _hand_out(self, run: RunRecord, current: RoundRecord) -> bool:
        """Give everybody without work a slice of the newest revision."""
        seen_since = self._recruiter.seen_since
        is_running = run.state is RunState.RUNNING
        if not (is_running and self._store.has_idle_client(run.run, seen_since)):
            return False
        progress = self._store.progress(run.run, seen_since)
        size = draw_size(run.spec)
        places = None if size is None else size - progress.at_work
        if places is not None and places <= 0:
            return False
        base = self._store.revision(run.run, current.base_revision)
        needed = run.spec.holders_needed
        held = self._store.pending_slices(run.run, seen_since)
        if needed > 1:
            held += self._store.waiting_deltas(run.run)
        planned = self._recruiter.draw(
            run,
            current.number,
            last_handed_out(base.last_trained, base.pieces, held, current.number, needed),
            draw=current.draws,
            places=places,
        )
        if planned:
            self._extend(run, current, base, planned, deadline_at=current.deadline_at)
        return bool(planned)

    def _step_synchronous(self, run: RunRecord, current: RoundRecord) -> bool:
        """Wait, recruit or merge."""
        now = self._clock.now()
        deadline_at = min(current.deadline_at, now + run.spec.deadline_s)
        if deadline_at < current.deadline_at:  # the machine's clock was set back
            base = self._store.revision(run.run, current.base_revision)
            self._extend(run, current, base, [], deadline_at=deadline_at)
        progress = self._store.progress(run.run, self._recruiter.seen_since, current.number)
        match next_step(progress, run.spec, is_overdue=now >= deadline_at):
            case RoundStep.WAIT:
                return False
            case RoundStep.RECRUIT:
                return self._recruit(run, current, progress, is_overdue=now >= deadline_at)
            case RoundStep.MERGE:
                if self._committer.commit(run, current):
                    return True
                return self._recruit(run, current, progress, is_overdue=now >= deadline_at)

    def _recruit(
        self, run: RunRecord, current: RoundRecord, progress: Progress, *, is_overdue: bool
    ) -> bool:
        """Draw others in place of who failed or fell silent; past the deadline, extend.

        Who failed may be drawn again once it has rested. A replaced participant's delta still
        counts if it comes while the round is open.
        """
        seen_since = self._recruiter.seen_since
        has_idle = self._store.has_idle_client(run.run, seen_since)
        silent = self._store.silent(run.run, current.number, seen_since)
        base = self._store.revision(run.run, current.base_revision)
        planned: list[PlannedSlice] = []
        if run.state is RunState.RUNNING and has_idle:
            size = draw_size(run.spec)
            planned = self._recruiter.draw(
                run,
                current.number,
                base.last_trained,
                draw=current.draws,
                places=None if size is None else size - progress.admitted - progress.at_work,
                excluded=self._store.contributors(run.run, current.number),
            )
        if not planned and not is_overdue:
            return False
        is_starting_over = is_overdue or not progress.at_work
        replaced = silent[: len(planned)]
        deadline_at = current.deadline_at
        if is_starting_over:
            deadline_at = self._clock.now() + run.spec.deadline_s
        self._extend(run, current, base, planned, deadline_at=deadline_at, expire=replaced)
        if is_overdue:
            LOGGER.warning(
                "run %s: round %d was due; %d of %d deltas are there; waiting another %g s",
                run.run, current.number, progress.admitted, run.spec.min_participants,
                run.spec.deadline_s,
            )  # fmt: skip
        if planned:
            LOGGER.warning(
                "run %s: round %d has too few deltas; %d silent participants replaced by %d",
                run.run, current.number, len(replaced), len(planned),
            )  # fmt: skip
        return bool(planned)

    def _extend(
        self,
        run: RunRecord,
        current: RoundRecord,
        base: RevisionRecord,
        planned: Sequence[PlannedSlice],
        *,
        deadline_at: float,
        expire: Sequence[AssignmentId] = (),
    ) -> None:
        """Hand out further work of an open round."""
        now = self._clock.now()
        self._store.extend_round(
            run.run,
            current.number,
            deadline_at=deadline_at,
            draws=current.draws + bool(planned),
            assignments=[assign(run, base, current.number, item, now) for item in planned],
            expire=expire,
            now=now,
        )
