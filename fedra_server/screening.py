"""Judges each piece of a delta by the other holders of that piece. Pure.

With the holders' norms and their median m, a piece longer than c m is scaled down to c m (norm
clipping, arXiv 1911.07963), and one longer than q m is quarantined. So is a delta that points
away from the others, as one with flipped signs does (FLTrust, arXiv 2012.13995, with the cohort in
place of a root data set): the mean of its pieces' cosines to the mean direction of the others is
below the floor f < 0 and below the median of these means by as much. Sites whose data have
nothing in common all point away from each other, and then nobody is an outlier. Cosines of single
pieces scatter, so a piece alone is held to 3 f. One client counts once, however many deltas it has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_server.runs import RunSpec

HOLDERS_FOR_NORMS: Final = 3
"""The median of three is an honest one's, or between two, whatever one of them is."""
HOLDERS_FOR_COSINES: Final = 4
"""Of three, one that is turned round leaves the others nobody to agree with."""
_ALONE: Final = 3.0
"""How many times the floor a single piece must be turned."""


class Verdict(StrEnum):
    """What was judged of a piece of a delta when it was to be merged."""

    ACCEPTED = "accepted"
    CLIPPED = "clipped"
    QUARANTINED = "quarantined"


class Outcome(StrEnum):
    """What became of a judged piece other than by its verdict.

    ``left`` is a piece that too few held when its round ended, or that another delta of the same
    client stood for.
    """

    RELEASED = "released"
    DISCARDED = "discarded"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Measure:
    """A piece of a delta; the cosine is None where too few hold the piece, or it is all zeros."""

    assignment_id: AssignmentId
    client_id: ClientId
    piece: str
    norm: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, by what to multiply the piece if it is merged, and the verdict's reason."""

    verdict: Verdict
    scale: float
    reason: str = ""


Judgements = dict[tuple[AssignmentId, str], Judgement]


def lower_median(values: Iterable[float]) -> float:
    """Give the middle one of the values, or the lower of two.

    Raises:
        ValueError: There is none.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there is no median of nothing")
    return ordered[(len(ordered) - 1) // 2]


def judge(spec: RunSpec, measures: Sequence[Measure]) -> Judgements:
    """Judge all pieces that are to be merged at one moment, whatever their order."""
    by_piece: defaultdict[str, list[Measure]] = defaultdict(list)
    for measure in sorted(measures, key=lambda it: (it.assignment_id, it.piece)):
        by_piece[measure.piece].append(measure)
    turned = _turned_deltas(spec, measures)
    found: Judgements = {}
    for holders in by_piece.values():
        found |= _judge_piece(spec, holders, turned)
    suspects = {
        assignment_id: piece
        for (assignment_id, piece), it in sorted(found.items(), reverse=True)
        if it.verdict is Verdict.QUARANTINED
    }
    for piece, holders in by_piece.items():
        if len({it.client_id for it in holders}) < HOLDERS_FOR_COSINES:
            found |= _with_their_deltas(found, piece, holders, suspects)
    return found


def _turned_deltas(spec: RunSpec, measures: Iterable[Measure]) -> dict[AssignmentId, str]:
    """Say of deltas that point away from the others, taking all of their pieces together."""
    cosines: defaultdict[AssignmentId, list[float]] = defaultdict(list)
    clients: dict[AssignmentId, ClientId] = {}
    for it in sorted(measures, key=lambda it: (it.assignment_id, it.piece)):
        if it.cosine is not None:
            cosines[it.assignment_id].append(it.cosine)
            clients[it.assignment_id] = it.client_id
    means = {it: sum(found) / len(found) for it, found in cosines.items()}
    by_client = {clients[it]: mean for it, mean in sorted(means.items(), reverse=True)}
    bound = _bound(by_client.values(), spec.screening.cosine_floor)
    return {
        it: f"the mean of its pieces' cosines to the others is {mean:.2f}"
        for it, mean in means.items()
        if mean < bound
    }


def _bound(cosines: Collection[float], floor: float) -> float:
    """Give what a cosine must not be below: the floor, and as much below the median."""
    if len(cosines) < HOLDERS_FOR_COSINES:
        return -math.inf
    return min(floor, lower_median(cosines) + floor)


def _judge_piece(
    spec: RunSpec, holders: Sequence[Measure], turned: Mapping[AssignmentId, str]
) -> Judgements:
    """Judge by norms and directions, where there are enough clients for each."""
    by_client = {it.client_id: it for it in reversed(holders)}
    norms = [it.norm for it in by_client.values()]
    median = math.inf
    if len(norms) >= HOLDERS_FOR_NORMS:
        median = lower_median(norms) or math.inf  # nothing can be held against nothing
    cosines = [it.cosine for it in by_client.values() if it.cosine is not None]
    bound = _bound(cosines, _ALONE * spec.screening.cosine_floor)
    found: Judgements = {}
    for it in holders:
        reasons = []
        if it.norm > spec.screening.quarantine_factor * median:
            reasons.append(f"its norm {it.norm:.4g} is far above the median of {median:.4g}")
        if it.assignment_id in turned:
            reasons.append(turned[it.assignment_id])
        elif it.cosine is not None and it.cosine < bound:
            reasons.append(f"its cosine to the others is {it.cosine:.2f}")
        found[it.assignment_id, it.piece] = _judgement(spec, it.norm, median, reasons)
    return found


def _judgement(spec: RunSpec, norm: float, median: float, reasons: Sequence[str]) -> Judgement:
    longest = math.inf if spec.clip_factor is None else spec.clip_factor * median
    scale = longest / norm if norm > longest else 1.0
    if reasons and spec.screening.enabled:
        return Judgement(Verdict.QUARANTINED, scale, "; ".join(reasons))
    return Judgement(Verdict.CLIPPED if scale < 1 else Verdict.ACCEPTED, scale)


def _with_their_deltas(
    found: Judgements,
    piece: str,
    holders: Iterable[Measure],
    suspects: Mapping[AssignmentId, str],
) -> Judgements:
    """Quarantine pieces that too few hold to judge them, with other pieces of their deltas."""
    return {
        (it.assignment_id, piece): Judgement(
            Verdict.QUARANTINED,
            found[it.assignment_id, piece].scale,
            f"too few hold it to judge it, and {suspects[it.assignment_id]} is quarantined",
        )
        for it in holders
        if it.assignment_id in suspects
        and found[it.assignment_id, piece].verdict is not Verdict.QUARANTINED
    }


def examples_caps(spec: RunSpec, claims: Iterable[tuple[str, int]]) -> dict[str, float]:
    """Give the most examples that a holder of a piece can weigh, by what all holders claim.

    Args:
        spec: The run's rules.
        claims: A piece and the number of examples that one of its holders claims.
    """
    by_piece: defaultdict[str, list[int]] = defaultdict(list)
    for piece, num_examples in claims:
        by_piece[piece].append(num_examples)
    rules = spec.screening
    return {
        piece: rules.examples_factor * lower_median(found) if rules.enabled else math.inf
        for piece, found in by_piece.items()
    }
