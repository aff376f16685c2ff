"""Judges once more what was judged: measures from the files, verdicts from the measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from fedra_edge.protocol.ids import AssignmentId
from fedra_server.measuring import measure
from fedra_server.runs import RunSpec
from fedra_server.screening import Measure, Verdict, judge
from fedra_server.sifting import screens
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import MergeRecord, ScreeningRecord
from fedra_server.storage.trails import RunTrail


def broken_screening(trail: RunTrail) -> Iterator[tuple[str, str]]:
    """Hold verdicts against what was measured, and merges against verdicts. Opens no file."""
    for row in trail.screenings:
        work = trail.work.get(row.assignment_id)
        if work is None or row.piece not in work.pieces:
            yield _name(row.assignment_id), f"{row.piece} was judged, but is not of its delta"
            return
    for group in judgements_of(trail):
        yield from _judged_again(trail.run.spec, group, trail)
    yield from _merged_as_judged(trail)


def judgements_of(trail: RunTrail) -> list[list[ScreeningRecord]]:
    """Give the measured rows of each judgement of a run."""
    measured = [row for row in trail.screenings if row.norm is not None]
    measured.sort(key=lambda row: (row.judgement, row.assignment_id, row.piece))
    return [list(group) for _, group in groupby(measured, key=lambda row: row.judgement)]


def wrong_measures(
    trail: RunTrail,
    group: Sequence[ScreeningRecord],
    delta_file: Callable[[AssignmentId], Path],
    blobs: BlobStore,
) -> Iterator[tuple[str, str]]:
    """Measure the deltas of one judgement again, to the last bit.

    Raises:
        NotFoundError: A blob is missing.
        OSError: A delta is missing or cannot be read.
        ValueError: A blob or delta does not hold what it should.
    """
    pieces: defaultdict[AssignmentId, set[str]] = defaultdict(set)
    for row in group:
        pieces[row.assignment_id].add(row.piece)
    holdings = {
        assignment_id: (trail.work[assignment_id].client_id, frozenset(held))
        for assignment_id, held in pieces.items()
    }
    found = measure(trail.revisions[-1], holdings, delta_file, blobs)
    again = {(it.assignment_id, it.piece): (it.norm, it.cosine) for it in found}
    for row in group:
        told, measured = (row.norm, row.cosine), again[row.assignment_id, row.piece]
        if told != measured:
            yield (
                _name(row.assignment_id),
                f"{row.piece} has norm and cosine {told}; its file gives {measured}",
            )


def _judged_again(
    spec: RunSpec, group: Sequence[ScreeningRecord], trail: RunTrail
) -> Iterator[tuple[str, str]]:
    measures = [
        Measure(
            row.assignment_id,
            trail.work[row.assignment_id].client_id,
            row.piece,
            row.norm or 0.0,
            row.cosine,
        )
        for row in group
    ]
    judgements = judge(spec, measures)
    for row in group:
        expected = judgements[row.assignment_id, row.piece]
        if (row.verdict, row.scale) != (expected.verdict, expected.scale):
            told, ruled = f"{row.verdict} at {row.scale!r}", f"{expected.verdict} at "
            detail = f"{row.piece} is {told}; the rules give {ruled}{expected.scale!r}"
            yield _name(row.assignment_id), detail


def _merged_as_judged(trail: RunTrail) -> Iterator[tuple[str, str]]:
    rows = {(row.assignment_id, row.piece): row for row in trail.screenings}
    for number, merges in trail.merges.items():
        for merge in merges:
            row = rows.get((merge.assignment_id, merge.piece))
            for detail in _unlike_its_row(trail.run.spec, merge, row):
                yield _name(merge.assignment_id), detail
        for piece, holders in _holders(trail, number).items():
            if len(holders) < trail.run.spec.holders_needed:
                detail = f"{piece} is merged of {len(holders)} clients, and needs more"
                yield f"revision {number}", detail


def _holders(trail: RunTrail, number: int) -> dict[str, set[str]]:
    """Give the clients that held each piece that a revision merged, or are quarantined for it."""
    clients: defaultdict[str, set[str]] = defaultdict(set)
    for held in trail.merges[number]:
        if held.assignment_id in trail.work:
            clients[held.piece].add(trail.work[held.assignment_id].client_id)
    for row in trail.screenings:
        is_held = row.revision == number and row.verdict is Verdict.QUARANTINED
        if is_held and row.piece in clients:
            clients[row.piece].add(trail.work[row.assignment_id].client_id)
    return clients


def _unlike_its_row(
    spec: RunSpec, merge: MergeRecord, row: ScreeningRecord | None
) -> Iterator[str]:
    if row is None and screens(spec):
        yield f"{merge.piece} is merged, but was not judged"
    if row is not None and not row.may_merge:
        yield f"{merge.piece} is merged, though it is {row.outcome or row.verdict}"
    scale = 1.0 if row is None else row.scale
    if merge.scale != scale:
        yield f"{merge.piece} is scaled by {merge.scale!r}, and was judged {scale!r}"


def _name(assignment_id: AssignmentId) -> str:
    return f"delta {assignment_id}"
