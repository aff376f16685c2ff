"""Judges each piece of a delta by the other holders of that piece. Pure.

With the holders' norms and their median m, a piece longer than c m is scaled down to c m (norm
clipping, arXiv 1911.07963), and one longer than q m is quarantined. A piece is quarantined too
when its cosine to the mean direction of the others is below the floor, as of a flipped sign
(FLTrust, arXiv 2012.13995, with the cohort in place of a root data set), but only while the
holders agree: sites whose data have nothing in common disagree with each other, and then nobody
is an outlier. One client counts once, however many deltas it has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_server.runs import RunSpec

HOLDERS_FOR_NORMS: Final = 3
"""The median of three is an honest one's, or between two, whatever one of them is."""
HOLDERS_FOR_COSINES: Final = 4
"""Of three, one that is turned round leaves the others nobody to agree with."""


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
    found: Judgements = {}
    for holders in by_piece.values():
        found |= _judge_piece(spec, holders)
    suspects = {
        assignment_id: piece
        for (assignment_id, piece), it in sorted(found.items(), reverse=True)
        if it.verdict is Verdict.QUARANTINED
    }
    for piece, holders in by_piece.items():
        if len({it.client_id for it in holders}) < HOLDERS_FOR_COSINES:
            found |= _with_their_deltas(found, piece, holders, suspects)
    return found


def _judge_piece(spec: RunSpec, holders: Sequence[Measure]) -> Judgements:
    """Judge by norms and directions, where there are enough clients for each."""
    by_client = {it.client_id: it for it in reversed(holders)}
    norms = [it.norm for it in by_client.values()]
    median = lower_median(norms) if len(norms) >= HOLDERS_FOR_NORMS else None
    cosines = [it.cosine for it in by_client.values() if it.cosine is not None]
    floor = spec.screening.cosine_floor
    do_agree = len(cosines) >= HOLDERS_FOR_COSINES and lower_median(cosines) >= -floor
    return {
        (it.assignment_id, it.piece): _judge_one(spec, it, median, do_agree=do_agree)
        for it in holders
    }


def _judge_one(
    spec: RunSpec, measure: Measure, median: float | None, *, do_agree: bool
) -> Judgement:
    scale, rules = 1.0, spec.screening
    factor = spec.clip_factor
    if median is not None and factor is not None and measure.norm > factor * median:
        scale = factor * median / measure.norm
    is_long = median is not None and measure.norm > rules.quarantine_factor * median
    is_turned = do_agree and measure.cosine is not None and measure.cosine < rules.cosine_floor
    reasons = []
    if is_long:
        reasons.append(f"its norm {measure.norm:.4g} is far above the median of {median:.4g}")
    if is_turned:
        reasons.append(f"its cosine to the others is {measure.cosine:.2f}, and most of them agree")
    if reasons and rules.enabled:
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
