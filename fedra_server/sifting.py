"""Decides what of the deltas at hand is merged now, quarantined, let go or left to wait. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_server.rounds import WaitingDelta
from fedra_server.runs import RunSpec
from fedra_server.screening import Judgement, Measure, Outcome, Verdict, judge
from fedra_server.storage.records import ScreeningRecord

Key = tuple[AssignmentId, str]
_UNMEASURED = Judgement(Verdict.ACCEPTED, 1.0)


@dataclass(frozen=True)
class Occasion:
    """When deltas are judged: for which revision, and as the run's which judgement.

    ``waits`` says that what too few hold may wait for further deltas.
    """

    run: RunId
    revision: int
    judgement: int
    now: float
    waits: bool


@dataclass(frozen=True)
class Sifted:
    """What becomes of the deltas; ``records`` are new or changed, by assignment and piece.

    ``merging`` has the pieces of each delta that are merged now, ``scales`` by what they are
    multiplied; of ``settled`` no piece waits any more; ``quarantined`` says why, and
    ``discarded`` are those of which the operator discarded what was quarantined.
    """

    merging: dict[AssignmentId, tuple[str, ...]]
    scales: dict[Key, float]
    records: list[ScreeningRecord]
    settled: list[AssignmentId]
    quarantined: dict[AssignmentId, str]
    discarded: list[AssignmentId]


def screens(spec: RunSpec) -> bool:
    """Tell whether the pieces of deltas are measured before they are merged."""
    return spec.clip_factor is not None


def fresh_pieces(
    spec: RunSpec, taken: Iterable[WaitingDelta], due: frozenset[str], known: Iterable[Key]
) -> dict[AssignmentId, frozenset[str]]:
    """Name the pieces that nobody has judged and that another delta does not stand for."""
    judged = set(known)
    fresh: defaultdict[AssignmentId, set[str]] = defaultdict(set)
    for piece, holders in _standing(spec, taken, due).items():
        for delta in holders:
            if (delta.assignment_id, piece) not in judged:
                fresh[delta.assignment_id].add(piece)
    return {assignment_id: frozenset(pieces) for assignment_id, pieces in fresh.items()}


def sift(
    spec: RunSpec,
    taken: Sequence[WaitingDelta],
    due: frozenset[str],
    *,
    known: Mapping[Key, ScreeningRecord],
    measures: Sequence[Measure],
    occasion: Occasion,
) -> Sifted:
    """Judge what was measured, and divide the due pieces of all deltas.

    Args:
        spec: The run's rules.
        taken: The admitted deltas that hold a due piece.
        due: The pieces whose turn it is.
        known: What was recorded before of these deltas.
        measures: Of all fresh pieces, when the run screens.
        occasion: When this is.
    """
    judgements = judge(spec, measures)
    measured = {(it.assignment_id, it.piece): it for it in measures}
    records = dict(known) | {
        key: _record(occasion, key, judgements[key], it) for key, it in measured.items()
    }
    merging = _merging(spec, taken, due, records)
    for delta, piece in _let_go(taken, due, merging, waits=occasion.waits):
        key = (delta.assignment_id, piece)
        row = records.get(key) or _record(occasion, key, _UNMEASURED, None)
        records[key] = row if row.is_held else replace(row, outcome=Outcome.LEFT)
    return _sifted(taken, merging, known, records)


def _merging(
    spec: RunSpec,
    taken: Iterable[WaitingDelta],
    due: frozenset[str],
    records: Mapping[Key, ScreeningRecord],
) -> dict[AssignmentId, tuple[str, ...]]:
    """Name what is merged: pieces that may be, of which enough clients hold one.

    Whoever is quarantined counts as a holder, being one of the attackers that the merge bears.
    """
    found: defaultdict[AssignmentId, list[str]] = defaultdict(list)
    for piece, holders in sorted(_standing(spec, taken, due).items()):
        allowed = [
            it
            for it in holders
            if (it.assignment_id, piece) not in records
            or records[it.assignment_id, piece].may_merge
        ]
        if len({it.client_id for it in holders}) >= spec.holders_needed:
            for delta in allowed:
                found[delta.assignment_id].append(piece)
    return {assignment_id: tuple(pieces) for assignment_id, pieces in found.items()}


def _let_go(
    taken: Iterable[WaitingDelta],
    due: frozenset[str],
    merging: Mapping[AssignmentId, Collection[str]],
    *,
    waits: bool,
) -> Iterator[tuple[WaitingDelta, str]]:
    """Name what is passed over by a merge and does not wait for another one."""
    merged = {piece for pieces in merging.values() for piece in pieces}
    passed = merged if waits or not merged else due
    for delta in taken:
        for piece in passed.intersection(delta.pieces):
            if piece not in merging.get(delta.assignment_id, ()):
                yield delta, piece


def _standing(
    spec: RunSpec, taken: Iterable[WaitingDelta], due: frozenset[str]
) -> dict[str, list[WaitingDelta]]:
    """Give the holders of each due piece.

    Where a number of holders is asked for, every client has one say: its freshest delta.
    """
    holders: defaultdict[str, list[WaitingDelta]] = defaultdict(list)
    for delta in sorted(taken, key=lambda it: (-it.base_revision, it.assignment_id)):
        for piece in due.intersection(delta.pieces):
            is_first = delta.client_id not in {it.client_id for it in holders[piece]}
            if is_first or spec.holders_needed == 1:
                holders[piece].append(delta)
    return holders


def _sifted(
    taken: Iterable[WaitingDelta],
    merging: dict[AssignmentId, tuple[str, ...]],
    known: Mapping[Key, ScreeningRecord],
    records: Mapping[Key, ScreeningRecord],
) -> Sifted:
    """Say of each delta how it stands after all this."""
    rows: defaultdict[AssignmentId, list[ScreeningRecord]] = defaultdict(list)
    for (assignment_id, _), row in sorted(records.items()):
        rows[assignment_id].append(row)
    settled, quarantined, discarded = [], {}, []
    for delta in sorted(taken, key=lambda it: it.assignment_id):
        own = rows[delta.assignment_id]
        over = {it.piece for it in own if not it.may_merge}
        over.update(merging.get(delta.assignment_id, ()))
        if not over.issuperset(delta.pieces):
            continue
        held = [it for it in own if it.is_held]
        if held:
            told = "; ".join(f"{it.piece}: {it.reason}" for it in held)
            quarantined[delta.assignment_id] = f"quarantined: {told}"
        elif any(it.outcome is Outcome.DISCARDED for it in own):
            discarded.append(delta.assignment_id)
        else:
            settled.append(delta.assignment_id)
    return Sifted(
        merging=merging,
        scales={
            (assignment_id, piece): records[assignment_id, piece].scale
            for assignment_id, pieces in merging.items()
            for piece in pieces
            if (assignment_id, piece) in records
        },
        records=[row for key, row in sorted(records.items()) if known.get(key) != row],
        settled=settled,
        quarantined=quarantined,
        discarded=discarded,
    )


def _record(
    occasion: Occasion, key: Key, judgement: Judgement, measure: Measure | None
) -> ScreeningRecord:
    return ScreeningRecord(
        assignment_id=key[0],
        piece=key[1],
        run=occasion.run,
        revision=occasion.revision,
        judgement=occasion.judgement,
        norm=None if measure is None else measure.norm,
        cosine=None if measure is None else measure.cosine,
        scale=judgement.scale,
        verdict=judgement.verdict,
        reason=judgement.reason,
        outcome=None,
        judged_at=occasion.now,
    )
