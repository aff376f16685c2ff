"""Whatever happens in whatever order, no accepted delta of a run is lost or counted twice."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from typing_extensions import override

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.auditing import audit
from fedra_server.errors import RefusedError
from fedra_server.publishing import trained_pieces
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.records import AssignmentRecord
from tests.support.builders import RUN
from tests.support.headless import Headless

ADMITTED, MERGED = AssignmentState.ADMITTED, AssignmentState.MERGED
CLIENTS = 4
WHO = st.integers(0, CLIENTS - 1)
ROUNDS = 6
MOST_STEPS_TO_THE_END = 100


class RunLife(RuleBasedStateMachine):
    """A run of either kind, its operator, and clients that come, go, fail and deliver late."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Headless(Path(tempfile.mkdtemp(prefix="run-life-")))
        self.accepted: set[AssignmentId] = set()
        self.seed = 0

    @override
    def teardown(self) -> None:
        try:
            if self.accepted:
                self.live_to_the_end()
                assert all(it.state is MERGED for it in self.records if self.is_accepted(it))
                report = audit(self.server.store, self.server.blobs, self.server.home)
                assert report.difference is None
                assert not [it for it in report.broken if it.run is not None]  # weights are made up
        finally:
            self.server.store.close()
            shutil.rmtree(self.server.path)

    @initialize(
        mode=st.sampled_from(["synchronous", "buffered"]),
        max_staleness=st.sampled_from([None, 0, 1, 3]),
        buffer_size=st.integers(1, 3),
        cohort_size=st.sampled_from([None, 2]),
        max_layers=st.integers(1, 4),
    )
    def begin(self, **options: object) -> None:
        self.server.create_run(
            RunState.RUNNING, rounds=ROUNDS, min_participants=2, deadline_s=100.0, **options
        )
        self.clients = [self.server.enrol(f"client-{index}") for index in range(CLIENTS)]
        self.server.coordinator.advance()

    @property
    def records(self) -> list[AssignmentRecord]:
        return self.server.store.assignments(RUN)

    def is_accepted(self, record: AssignmentRecord) -> bool:
        return record.assignment_id in self.accepted

    def open_work(self, client_id: ClientId) -> AssignmentRecord | None:
        return self.server.store.open_assignment(client_id)

    def send(self, record: AssignmentRecord) -> None:
        """Deliver as clients do; only a rule may refuse."""
        self.seed += 1
        try:
            self.server.deliver(record, seed=self.seed)
        except RefusedError as error:
            assert error.code in {ProblemCode.ROUND_CLOSED, ProblemCode.DELTA_CONFLICT}  # noqa: PT017 - a refusal is one of two outcomes
        else:
            self.accepted.add(record.assignment_id)

    @rule(who=WHO, is_seen=st.booleans())
    def deliver(self, who: int, is_seen: bool) -> None:
        work = self.open_work(self.clients[who])
        if work is not None:
            self.send(work)
            assert self.is_accepted(work), "work that is wanted is taken"
        if is_seen:
            self.server.coordinator.advance()

    @rule(which=st.integers(0, 1000))
    def deliver_something_old(self, which: int) -> None:
        old = [it for it in self.records if not self.is_accepted(it)]
        if old:
            self.send(old[which % len(old)])

    @rule(who=WHO)
    def fail(self, who: int) -> None:
        work = self.open_work(self.clients[who])
        if work is not None:
            now = self.server.clock.now()
            self.server.store.settle(work.assignment_id, AssignmentState.FAILED, "lost power", now)

    @rule()
    def advance(self) -> None:
        self.server.coordinator.advance()

    @rule()
    def restart(self) -> None:
        self.server.restarted().advance()

    @rule(seconds=st.sampled_from([5, 30, 100]), there=st.sets(WHO))
    def let_time_pass(self, seconds: int, there: set[int]) -> None:
        self.server.clock.time += seconds
        for who in there:
            self.server.store.touch(self.clients[who], self.server.clock.now())
        self.server.coordinator.advance()

    @rule(pause=st.booleans())
    def steer(self, pause: bool) -> None:
        state = RunState.PAUSED if pause else RunState.RUNNING
        alive = {RunState.RUNNING, RunState.PAUSED}
        if self.server.store.run(RUN).state in alive:
            self.server.store.set_run_state(RUN, state, allowed_from=alive)

    @invariant()
    def what_was_accepted_counts(self) -> None:
        for record in self.records:
            assert (record.state in {ADMITTED, MERGED}) == self.is_accepted(record)

    @invariant()
    def each_piece_is_merged_once_or_waits(self) -> None:
        store = self.server.store
        waiting = {it.assignment_id: sorted(it.pieces) for it in store.waiting_deltas(RUN)}
        merged: dict[AssignmentId, list[str]] = defaultdict(list)
        for revision in store.revisions(RUN):
            for merge in store.merges(RUN, revision.manifest.number):
                merged[merge.assignment_id].append(merge.piece)
        for record in self.records:
            name = record.assignment_id
            pieces = trained_pieces(record.manifest.trained_layer_ids)
            expected = sorted(pieces) if self.is_accepted(record) else []
            assert sorted(merged[name] + waiting.get(name, [])) == expected
            assert (record.state is ADMITTED) == (name in waiting and waiting[name] != [])

    def live_to_the_end(self) -> None:
        """Let everybody work until the run is over; it always ends."""
        self.steer(pause=False)
        for _ in range(MOST_STEPS_TO_THE_END):
            if self.server.store.run(RUN).state is RunState.FINISHED:
                return
            self.let_time_pass(100, set(range(CLIENTS)))
            for who in range(CLIENTS):
                self.deliver(who, is_seen=False)
        raise AssertionError("the run never ends")


TestRunLife = RunLife.TestCase
TestRunLife.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # to shrink a run takes minutes and tells little more
)
