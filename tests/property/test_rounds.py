"""The rules of rounds: nothing is merged twice, dropped, or kept waiting beyond its time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_edge.protocol.layers import HEAD
from fedra_server.rounds import (
    HeldSlice,
    Progress,
    RoundStep,
    Setback,
    WaitingDelta,
    draw_size,
    due_pieces,
    last_handed_out,
    next_step,
    staleness,
    too_stale,
)
from fedra_server.runs import RunSpec
from tests.support.builders import make_run_spec

PIECES = ("layers.0", "layers.1", "layers.2", "layers.3", HEAD)
COUNTS = st.integers(0, 8)
PROGRESS = st.builds(Progress, admitted=COUNTS, at_work=COUNTS, silent=COUNTS)
DEADLINE_S = 100.0


@given(PROGRESS, st.integers(1, 5), st.booleans())
def test_a_merge_has_enough_deltas_and_awaits_nobody_before_the_deadline(
    progress: Progress, min_participants: int, is_overdue: bool
) -> None:
    step = next_step(
        progress, make_run_spec(min_participants=min_participants), is_overdue=is_overdue
    )
    is_awaiting = progress.at_work + progress.silent > 0
    is_enough = progress.admitted >= min_participants
    assert (step is RoundStep.MERGE) == (is_enough and (is_overdue or not is_awaiting))


@given(PROGRESS, st.integers(1, 5))
def test_before_the_deadline_others_are_sought_when_too_few_are_left(
    progress: Progress, min_participants: int
) -> None:
    run = make_run_spec(min_participants=min_participants)
    step = next_step(progress, run, is_overdue=False)
    is_short = progress.admitted + progress.at_work < min_participants
    assert (step is RoundStep.RECRUIT) == is_short


@given(PROGRESS, st.integers(1, 6), st.floats(0, 2), st.booleans())
def test_a_complete_cohort_merges_at_once_and_an_incomplete_one_is_filled(
    progress: Progress, cohort_size: int, over_provisioning: float, is_overdue: bool
) -> None:
    run = make_run_spec(
        min_participants=1, cohort_size=cohort_size, over_provisioning=over_provisioning
    )
    step = next_step(progress, run, is_overdue=is_overdue)
    if progress.admitted >= cohort_size:
        assert step is RoundStep.MERGE
    elif progress.at_work + progress.silent and not is_overdue:
        wanted = draw_size(run)
        assert wanted is not None
        is_short = progress.admitted + progress.at_work < wanted
        assert step is (RoundStep.RECRUIT if is_short else RoundStep.WAIT)


@given(st.integers(1, 1000), st.integers(0, 300))
def test_over_provisioning_draws_the_exact_ceiling(cohort_size: int, percent: int) -> None:
    run = make_run_spec(
        min_participants=1, cohort_size=cohort_size, over_provisioning=percent / 100
    )
    assert draw_size(run) == -(-cohort_size * (100 + percent) // 100)


@given(st.integers(1, 40), st.floats(1, 1e9))
def test_rests_double_up_to_ten_minutes(failures: int, failed_at: float) -> None:
    setback = Setback(ClientId("client"), failures, failed_at, "")
    expected = min(5.0 * 2 ** (failures - 1), 600.0)
    assert math.isclose(setback.rests_until - failed_at, expected, rel_tol=1e-6, abs_tol=1e-6)


@given(
    st.dictionaries(st.sampled_from(PIECES), st.integers(0, 30), min_size=1),
    st.integers(0, 10),
)
def test_a_slice_is_too_stale_when_any_of_its_pieces_is(moved: dict[str, int], limit: int) -> None:
    base = dict.fromkeys(PIECES, 3)
    present = {piece: 3 + moved.get(piece, 0) for piece in PIECES}
    held = HeldSlice(AssignmentId("a"), 7, tuple(moved))
    assert staleness(held.pieces, base, present) == moved
    expected = [held.assignment_id] if max(moved.values()) > limit else []
    assert too_stale([held], {7: base}, present, limit) == expected


@given(
    st.lists(st.integers(0, 20), min_size=4, max_size=4),
    st.lists(st.sets(st.sampled_from(PIECES)), max_size=5),
)
def test_what_is_handed_out_counts_as_trained_now(
    last_trained: list[int], slices: list[set[str]]
) -> None:
    held = [
        HeldSlice(AssignmentId(str(index)), 0, tuple(pieces)) for index, pieces in enumerate(slices)
    ]
    latest = last_handed_out(last_trained, PIECES, held, 21)
    assert len(latest) == len(last_trained)
    for layer, piece in enumerate(PIECES[:-1]):
        is_out = any(piece in pieces for pieces in slices)
        assert latest[layer] == (21 if is_out else last_trained[layer])


@dataclass
class Held:
    """A delta as the records have it."""

    pieces: frozenset[str]
    admitted_at: float
    client_id: ClientId
    merged: list[str] = field(default_factory=list)


class Merging(RuleBasedStateMachine):
    """Deltas come at any time; a server that looks at every second merges what is due."""

    def __init__(self) -> None:
        super().__init__()
        self.run = self.make_run()
        self.now = 1000.0
        self.deltas: dict[AssignmentId, Held] = {}
        self.versions = dict.fromkeys(PIECES, 0)
        self.is_last = False
        self.is_over = False

    def make_run(self) -> RunSpec:
        return make_run_spec(mode="buffered", buffer_size=3, deadline_s=DEADLINE_S)

    @property
    def waiting(self) -> list[WaitingDelta]:
        return [
            WaitingDelta(
                name,
                0,
                tuple(sorted(held.pieces - set(held.merged))),
                1,
                1.0,
                "",
                held.admitted_at,
                held.client_id,
            )
            for name, held in self.deltas.items()
            if held.pieces - set(held.merged)
        ]

    @precondition(lambda self: not self.is_over)
    @rule(
        layers=st.sets(st.sampled_from(PIECES[:-1]), min_size=1),
        client=st.sampled_from(["quick", "one", "two", "three"]),
    )
    def deliver(self, layers: set[str], client: str) -> None:
        name = AssignmentId(f"delta-{len(self.deltas)}")
        self.deltas[name] = Held(frozenset({*layers, HEAD}), self.now, ClientId(client))
        self.look()

    @precondition(lambda self: not self.is_over)
    @rule()
    def begin_the_last_round(self) -> None:
        self.is_last = len(self.deltas) > 5

    @rule(seconds=st.integers(1, 120))
    def let_time_pass(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.look()

    def look(self) -> None:
        """Merge as the coordinator does."""
        waiting = self.waiting
        due = due_pieces(waiting, self.run, now=self.now, is_last=self.is_last)
        moved = set()
        for delta in waiting:
            for piece in due.intersection(delta.pieces):
                self.deltas[delta.assignment_id].merged.append(piece)
                moved.add(piece)
        assert moved == due, "a piece without holders is never merged"
        for piece in moved:
            self.versions[piece] += 1
        self.is_over = self.is_over or (self.is_last and bool(due))

    @invariant()
    def no_piece_is_merged_twice_or_from_nowhere(self) -> None:
        for held in self.deltas.values():
            assert len(held.merged) == len(set(held.merged))
            assert held.pieces.issuperset(held.merged)

    @invariant()
    def nothing_waits_longer_than_it_may(self) -> None:
        pairs = {(piece, delta.client_id) for delta in self.waiting for piece in delta.pieces}
        counts = Counter(piece for piece, _ in pairs)
        assert all(count < self.run.buffer_size for count in counts.values())
        assert all(self.now - delta.admitted_at < DEADLINE_S for delta in self.waiting)

    @invariant()
    def the_end_leaves_nothing_behind(self) -> None:
        assert not (self.is_over and self.waiting)

    @invariant()
    def a_piece_that_nobody_holds_never_moves(self) -> None:
        held = {piece for delta in self.deltas.values() for piece in delta.pieces}
        assert all(self.versions[piece] == 0 for piece in PIECES if piece not in held)


TestBufferedMerging = Merging.TestCase
TestBufferedMerging.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@given(st.lists(st.sets(st.sampled_from(PIECES), min_size=1), max_size=5), st.booleans())
def test_a_synchronous_merge_takes_all_that_is_held_and_nothing_else(
    held: list[set[str]], is_last: bool
) -> None:
    waiting = [
        WaitingDelta(
            AssignmentId(str(index)), 0, tuple(pieces), 1, 1.0, "", 1000.0, ClientId("client")
        )
        for index, pieces in enumerate(held)
    ]
    due = due_pieces(waiting, make_run_spec(), now=1000.0, is_last=is_last)
    assert due == set().union(*held)


def test_a_delta_from_the_future_does_not_wait_for_it() -> None:
    run = make_run_spec(mode="buffered", buffer_size=9, deadline_s=DEADLINE_S)
    delta = WaitingDelta(AssignmentId("a"), 0, (HEAD,), 1, 1.0, "", 5000.0, ClientId("client"))
    assert due_pieces([delta], run, now=1000.0, is_last=False) == {HEAD}
    assert not due_pieces([delta], run, now=5000.0, is_last=False)
