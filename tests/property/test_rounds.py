"""The round rule: waits, merges or recruits, and never merges too few deltas."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedra_server.rounds import RoundStep, next_step
from fedra_server.runs import AssignmentState

STATES = st.lists(st.sampled_from(AssignmentState), max_size=8)


@given(STATES, st.integers(1, 5), st.booleans())
def test_a_merge_has_enough_deltas_and_awaits_nobody_before_the_deadline(
    states: list[AssignmentState], min_participants: int, is_overdue: bool
) -> None:
    step = next_step(states, min_participants=min_participants, is_overdue=is_overdue)
    admitted = states.count(AssignmentState.ADMITTED)
    is_awaiting = AssignmentState.PENDING in states
    expected = RoundStep.MERGE if admitted >= min_participants else RoundStep.RECRUIT
    assert step is (RoundStep.WAIT if is_awaiting and not is_overdue else expected)
