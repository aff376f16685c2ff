"""The rules of a round: when it merges, and when a client that failed may try again. Pure."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto
from typing import Final

from fedra_server.runs import AssignmentState

_FIRST_REST_S: Final = 5.0
_LONGEST_REST_S: Final = 600.0


class RoundStep(Enum):
    """What to do with an open round."""

    WAIT = auto()
    MERGE = auto()
    RECRUIT = auto()


def next_step(
    states: Collection[AssignmentState], *, min_participants: int, is_overdue: bool
) -> RoundStep:
    """Decide from the states of a round's assignments.

    A round merges as soon as nobody is awaited and enough deltas are admitted, and at its
    deadline with whatever is admitted if that is enough. With too few it never closes: it
    recruits further clients, and what was admitted stays admitted.
    """
    is_enough = _count(states, AssignmentState.ADMITTED) >= min_participants
    is_awaiting = _count(states, AssignmentState.PENDING) > 0
    if is_awaiting and not is_overdue:
        return RoundStep.WAIT
    return RoundStep.MERGE if is_enough else RoundStep.RECRUIT


def rest_s(failures: int) -> float:
    """How long a client rests before it is drawn again, after so many failures in a round."""
    return min(_FIRST_REST_S * 2.0 ** (failures - 1), _LONGEST_REST_S) if failures else 0.0


def _count(states: Collection[AssignmentState], wanted: AssignmentState) -> int:
    return sum(1 for state in states if state is wanted)
