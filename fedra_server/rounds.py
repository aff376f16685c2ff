"""The rules of a round: when it merges what, what came too late, and who rests. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_server.runs import RunSpec

_FIRST_REST_S: Final = 5.0
_LONGEST_REST_S: Final = 600.0
_BEFORE_ALL: Final = -1
_ROUNDING: Final = 1e-9
"""Keeps ``ceil`` from counting what binary fractions add: 10 * (1 + 0.1) is above 11."""


class RoundStep(Enum):
    """What to do with an open synchronous round."""

    WAIT = auto()
    MERGE = auto()
    RECRUIT = auto()


@dataclass(frozen=True)
class Progress:
    """How far work is: deltas admitted, clients at work, and clients that fell silent over it."""

    admitted: int
    at_work: int
    silent: int


@dataclass(frozen=True)
class HeldSlice:
    """A slice handed out: the pieces that it trains, and the revision that it was cut from."""

    assignment_id: AssignmentId
    base_revision: int
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class WaitingDelta(HeldSlice):
    """An admitted delta; ``pieces`` are those that are not merged yet."""

    num_examples: int
    chance: float
    sha256: str
    admitted_at: float
    client_id: ClientId


@dataclass(frozen=True)
class Setback:
    """A client that failed so many times since it last delivered, and how it failed last."""

    client_id: ClientId
    failures: int
    failed_at: float
    detail: str

    @property
    def rests_until(self) -> float:
        """When it may be given work again."""
        return self.failed_at + rest_s(self.failures)


def next_step(progress: Progress, run: RunSpec, *, is_overdue: bool) -> RoundStep:
    """Decide how a synchronous round goes on.

    A round merges as soon as nobody is awaited or the cohort is complete, and at its deadline
    with whatever is admitted, if that is enough. With too few it never closes: it recruits
    further clients, and what was admitted stays admitted. Before the deadline it recruits in
    place of participants that failed or fell silent, as soon as too few are left.
    """
    if run.cohort_size is not None and progress.admitted >= run.cohort_size:
        return RoundStep.MERGE
    if progress.at_work + progress.silent > 0 and not is_overdue:
        wanted = draw_size(run) or run.min_participants
        is_short = progress.admitted + progress.at_work < wanted
        return RoundStep.RECRUIT if is_short else RoundStep.WAIT
    is_enough = progress.admitted >= run.min_participants
    return RoundStep.MERGE if is_enough else RoundStep.RECRUIT


def draw_size(run: RunSpec) -> int | None:
    """Give how many clients to have at work in a round; None for all that are there."""
    if run.cohort_size is None:
        return None
    return math.ceil(run.cohort_size * (1 + run.over_provisioning) - _ROUNDING)


def due_pieces(
    waiting: Collection[WaitingDelta], run: RunSpec, *, now: float, is_last: bool
) -> frozenset[str]:
    """Give the pieces that a merge takes now.

    Synchronous: all that any delta holds; ``next_step`` says when. Buffered: those for which deltas
    of ``buffer_size`` different clients wait, so that no quick one outruns the others alone, or one
    that has waited ``deadline_s``. The last merge of a run leaves nothing behind. A delta from the
    future, as after the clock was set back, is due. Where a piece needs holders, one with fewer is
    not due for itself, and nothing is as long as no piece has enough.
    """
    holders: defaultdict[str, set[ClientId]] = defaultdict(set)
    for delta in waiting:
        for piece in delta.pieces:
            holders[piece].add(delta.client_id)
    enough = {it for it, clients in holders.items() if len(clients) >= run.holders_needed}
    if run.mode == "synchronous":
        return frozenset(holders if enough else ())
    overdue = {
        piece
        for delta in waiting
        if not delta.admitted_at <= now < delta.admitted_at + run.deadline_s
        for piece in enough.intersection(delta.pieces)
    }
    full = {piece for piece, clients in holders.items() if len(clients) >= run.buffer_size}
    return frozenset(holders if is_last and (full or overdue) else full | overdue)


def staleness(
    pieces: Iterable[str], base: Mapping[str, int], present: Mapping[str, int]
) -> dict[str, int]:
    """Give, for each piece, how often it was merged since the revision that a delta is from.

    Args:
        pieces: Pieces of the delta.
        base: How often each piece had been merged in the revision it was trained from.
        present: How often in the revision that it is compared with.
    """
    return {piece: present[piece] - base[piece] for piece in pieces}


def too_stale(
    held: Iterable[HeldSlice],
    versions: Mapping[int, Mapping[str, int]],
    present: Mapping[str, int],
    limit: int,
) -> list[AssignmentId]:
    """Name the slices whose deltas would be refused; ``versions`` are by base revision."""
    return [
        item.assignment_id
        for item in held
        if max(staleness(item.pieces, versions[item.base_revision], present).values()) > limit
    ]


def last_handed_out(
    last_trained: Sequence[int],
    pieces: Sequence[str],
    held: Iterable[HeldSlice],
    round_number: int,
    holders_needed: int = 1,
) -> list[int]:
    """Count what clients are at work on as trained in the present round.

    So those who are drawn one by one take different layers, once a layer has the holders that it
    needs; one that has some of them comes before all others.
    """
    counts = Counter(piece for item in held for piece in item.pieces)

    def last(piece: str, trained: int) -> int:
        if counts[piece] >= holders_needed:
            return round_number
        return _BEFORE_ALL if counts[piece] else trained

    return [
        last(piece, trained)
        for piece, trained in zip(pieces, last_trained, strict=False)  # the head comes last
    ]


def rest_s(failures: int) -> float:
    """How long a client rests before it is drawn again, after so many failures in a row."""
    return min(_FIRST_REST_S * 2.0 ** (failures - 1), _LONGEST_REST_S) if failures else 0.0
