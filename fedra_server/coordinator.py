"""Moves every run forward: opens rounds, waits, merges, publishes. The only writer of rounds.

All state is in the store, so a restarted server continues the round it was in.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.ids import AssignmentId, ClientId, RunId
from fedra_server.assigning import assign
from fedra_server.choosing import Population
from fedra_server.clock import Clock
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import FedraServerError, StorageError
from fedra_server.intake import Intake
from fedra_server.merging import Contributor
from fedra_server.planning import PlannedSlice, find_unfit, plan_round, round_generator
from fedra_server.publishing import Contribution, merged_revision
from fedra_server.rounds import RoundStep, next_step, rest_s
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import (
    AssignmentRecord,
    ClientRecord,
    RevisionRecord,
    RoundRecord,
    RunRecord,
)
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
        self._blobs = blobs
        self._home = home
        self._config = config
        self._clock = clock
        self._merging = threading.Lock()
        self.intake = Intake(store, home, config, clock, self._merging)
        self._wakeup = threading.Event()
        self._stopping = threading.Event()
        self._states_seen: dict[str, RunState] = {}
        self._listeners: list[Callable[[], None]] = []
        self._unfit_told: dict[tuple[RunId, ClientId], str] = {}
        self._thread = threading.Thread(target=self._loop, name="coordinator")

    def start(self) -> None:
        """Begin to move runs forward."""
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
            LOGGER.error("run %s cannot go on: %s %s", run.run, error, error.remedy)  # noqa: TRY400 - expected, no traceback
        except Exception:
            LOGGER.exception("run %s cannot go on because of a defect; trying again", run.run)
        return changed

    def _step(self, run: RunRecord) -> bool:
        """Do one step of the round loop: open, wait, recruit or merge."""
        if run.state in {RunState.CREATED, RunState.FINISHED}:
            return False
        current = self._store.current_round(run.run)
        if run.state is RunState.STOPPED:
            return current is not None and self._dismiss(run, current)
        if current is None:
            return run.state is RunState.RUNNING and self._open_round(run)
        assignments = self._store.assignments(run.run, current.number)
        step = next_step(
            [assignment.state for assignment in assignments],
            min_participants=run.spec.min_participants,
            is_overdue=self._clock.now() >= current.deadline_at,
        )
        match step:
            case RoundStep.WAIT:
                return False
            case RoundStep.RECRUIT:
                return self._recruit(run, current, assignments)
            case RoundStep.MERGE:
                return self._merge(run, current)

    def _dismiss(self, run: RunRecord, current: RoundRecord) -> bool:
        """Release the participants of a stopped run; what was admitted stays on disk."""
        pending = [
            assignment.assignment_id
            for assignment in self._store.assignments(run.run, current.number)
            if assignment.state is AssignmentState.PENDING
        ]
        for assignment_id in pending:
            self._store.settle(
                assignment_id,
                AssignmentState.EXPIRED,
                detail="the operator stopped the run",
                now=self._clock.now(),
            )
        return bool(pending)

    def _open_round(self, run: RunRecord) -> bool:
        """Draw the next round once enough clients are there."""
        base = self._store.revision(run.run)
        number = base.manifest.number + 1
        planned = self._plan(run, base, number, draw=0, excluded=set())
        if len(planned) < run.spec.min_participants:
            return False
        now = self._clock.now()
        opened = RoundRecord(
            run=run.run,
            number=number,
            base_revision=base.manifest.number,
            draws=1,
            opened_at=now,
            deadline_at=now + run.spec.deadline_s,
            published_at=None,
        )
        self._store.open_round(opened, [assign(run, base, number, item, now) for item in planned])
        LOGGER.info("run %s: round %d opened with %d participants", run.run, number, len(planned))
        return True

    def _recruit(
        self, run: RunRecord, current: RoundRecord, assignments: list[AssignmentRecord]
    ) -> bool:
        """Draw others, or again those that rested after a failure; past the deadline, extend."""
        now = self._clock.now()
        is_overdue = now >= current.deadline_at
        online = {client.client_id for client in self._online_clients()}
        silent = [
            assignment.assignment_id
            for assignment in assignments
            if assignment.state is AssignmentState.PENDING and assignment.client_id not in online
        ]
        excluded = _unavailable(assignments, set(silent), now)
        base = self._store.revision(run.run, current.base_revision)
        planned: list[PlannedSlice] = []
        if run.state is RunState.RUNNING:
            planned = self._plan(run, base, current.number, draw=current.draws, excluded=excluded)
        if not planned and not is_overdue:
            return False
        self._store.extend_round(
            run.run,
            current.number,
            deadline_at=now + run.spec.deadline_s,
            draws=current.draws + bool(planned),
            assignments=[assign(run, base, current.number, item, now) for item in planned],
            expire=silent,
            now=now,
        )
        LOGGER.warning(
            "run %s: round %d has too few deltas; %d silent participants replaced by %d",
            run.run, current.number, len(silent), len(planned),
        )  # fmt: skip
        return bool(planned)

    def _merge(self, run: RunRecord, current: RoundRecord) -> bool:
        """Merge what was admitted and publish it, in one transaction at the end."""
        with self._merging:
            admitted = [
                assignment
                for assignment in self._store.assignments(run.run, current.number)
                if assignment.state is AssignmentState.ADMITTED
            ]
            if self._set_damaged_aside(admitted):
                return True
            base = self._store.revision(run.run, current.base_revision)
            now = self._clock.now()
            contributions = [self._contribution(assignment) for assignment in admitted]
            merged = merged_revision(
                base, contributions, run.spec, self._blobs, round_number=current.number, now=now
            )
            self._store.publish(
                merged,
                run.run,
                current.number,
                merged=[assignment.assignment_id for assignment in admitted],
                now=now,
                finishes_run=current.number >= run.spec.rounds,
            )
        LOGGER.info(
            "run %s: round %d merged %d deltas into revision %d",
            run.run, current.number, len(admitted), merged.manifest.number,
        )  # fmt: skip
        return True

    def _set_damaged_aside(self, admitted: list[AssignmentRecord]) -> bool:
        """Refuse admitted deltas whose file is gone or altered; tell whether there were any."""
        damaged = [item for item in admitted if not self._is_sound(item)]
        for assignment in damaged:
            LOGGER.error(
                "the stored delta %s is damaged or gone; its round goes on without it",
                self._home.delta_file(assignment.assignment_id),
            )
            self._store.settle(
                assignment.assignment_id,
                AssignmentState.REFUSED,
                detail="the server's copy of this delta is damaged or gone",
                now=self._clock.now(),
                only_from={AssignmentState.ADMITTED},
            )
        return bool(damaged)

    def _is_sound(self, assignment: AssignmentRecord) -> bool:
        path = self._home.delta_file(assignment.assignment_id)
        if assignment.delta is None or not path.is_file():
            return False
        return sha256_of_file(path) == assignment.delta.sha256

    def _plan(
        self,
        run: RunRecord,
        base: RevisionRecord,
        number: int,
        *,
        draw: int,
        excluded: set[ClientId],
    ) -> list[PlannedSlice]:
        online = self._online_clients()
        at_work = {it.client_id for it in online if self._store.open_assignment(it.client_id)}
        population = Population(
            online, self._store.calibrations(run.model_id), excluded | at_work, self._seen_since
        )
        candidates = population.candidates(run.run)
        spec = self._store.model(run.model_id).spec
        self._warn_of_unfit(run, find_unfit(candidates, spec, run.spec))
        generator = round_generator(run.spec, number, draw)
        return plan_round(candidates, spec, run.spec, base.last_trained, generator)

    def _warn_of_unfit(self, run: RunRecord, reasons: dict[ClientId, str]) -> None:
        """Tell the operator, once for each reason, who cannot take part and why."""
        for client_id, reason in reasons.items():
            if self._unfit_told.get((run.run, client_id)) != reason:
                self._unfit_told[run.run, client_id] = reason
                LOGGER.warning("run %s: client %s cannot take part: %s", run.run, client_id, reason)

    def _contribution(self, assignment: AssignmentRecord) -> Contribution:
        if assignment.delta is None:
            raise StorageError(f"assignment {assignment.assignment_id} is admitted without a delta")
        return Contribution(
            Contributor(assignment.assignment_id, assignment.delta.num_examples, assignment.chance),
            assignment.manifest.trained_layer_ids,
            self._home.delta_file(assignment.assignment_id),
        )

    @property
    def _seen_since(self) -> float:
        return self._clock.now() - self._config.heartbeat_timeout_s

    def _online_clients(self) -> list[ClientRecord]:
        return [it for it in self._store.clients() if it.is_there(self._seen_since)]


def _unavailable(
    assignments: list[AssignmentRecord], silent: set[AssignmentId], now: float
) -> set[ClientId]:
    """Name the participants that are at work or done, and those that rest after a failure."""
    at_work = {AssignmentState.PENDING, AssignmentState.ADMITTED}
    failed = {AssignmentState.FAILED, AssignmentState.REFUSED}
    failures = Counter(item.client_id for item in assignments if item.state in failed)
    return {
        item.client_id
        for item in assignments
        if (item.state in at_work and item.assignment_id not in silent)
        or (
            item.state in failed and now < (item.settled_at or 0) + rest_s(failures[item.client_id])
        )
    }
