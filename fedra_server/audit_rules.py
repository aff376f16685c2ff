"""The rules that the records of a run must keep, checked without opening a file. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Final

from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol.ids import AssignmentId
from fedra_server.audit_screening import broken_screening
from fedra_server.merging import Contributor, piece_weight
from fedra_server.runs import AssignmentState, RunState
from fedra_server.screening import examples_caps
from fedra_server.storage.records import MergeRecord, RevisionRecord, ScreeningRecord
from fedra_server.storage.trails import RunTrail, WorkTrail

_DONE_WITH: Final = frozenset({AssignmentState.MERGED, AssignmentState.DISCARDED})
_COUNTED: Final = _DONE_WITH | {AssignmentState.ADMITTED, AssignmentState.QUARANTINED}


class BrokenRule(BaseModel):
    """Something that must never be; ``what`` names the thing, ``detail`` says what is wrong."""

    model_config = ConfigDict(frozen=True)

    run: str | None
    what: str
    detail: str


def broken_rules(trail: RunTrail) -> Iterator[BrokenRule]:
    """Check revisions, rounds, merges and assignments of a run against each other."""
    found = chain(_revisions(trail), _merges(trail), _work(trail), broken_screening(trail))
    for what, detail in found:
        yield BrokenRule(run=trail.run.run, what=what, detail=detail)


def _revisions(trail: RunTrail) -> Iterator[tuple[str, str]]:
    """Revisions follow each other, each published by its round, and count what was merged."""
    numbers = [revision.manifest.number for revision in trail.revisions]
    if numbers != list(range(len(numbers))):
        yield "revisions", f"their numbers have gaps: {numbers}"
        return
    for number, current in trail.rounds.items():
        is_published = 1 <= number < len(numbers)
        if (current.published_at is not None) != is_published:
            state = "is published" if current.published_at is not None else "is open"
            yield f"round {number}", f"it {state}, the latest revision is {numbers[-1]}"
    for number in numbers[1:]:
        if number not in trail.rounds:
            yield f"revision {number}", "there is no round that published it"
    for before, after in pairwise(trail.revisions):
        yield from _succession(trail, before, after)


def _succession(
    trail: RunTrail, before: RevisionRecord, after: RevisionRecord
) -> Iterator[tuple[str, str]]:
    """Hold a revision against the one it was merged onto."""
    what = f"revision {after.manifest.number}"
    merged = {merge.piece for merge in trail.merges.get(after.manifest.number, ())}
    if after.manifest.versions not in {None, after.versions}:
        yield what, "its manifest tells other versions than the records"
    if not merged:
        yield what, "no delta is recorded as merged into it"
    lengths = {len(after.pieces), len(after.versions), len(after.moments), len(before.pieces)}
    if len(lengths) > 1 or len(after.last_trained) != len(after.manifest.layers):
        yield what, "it does not have one version and one place for moments for every piece"
        return
    for index, piece in enumerate(after.pieces):
        for detail in _piece_succession(before, after, index, is_merged=piece in merged):
            yield what, f"{piece} {detail}"


def _piece_succession(
    before: RevisionRecord, after: RevisionRecord, index: int, *, is_merged: bool
) -> Iterator[str]:
    """A merged piece counts one more version; any other keeps its blob, moments and counters."""
    if after.versions[index] != before.versions[index] + is_merged:
        yield f"is at version {after.versions[index]}, which its merges deny"
    was = (before.blobs[index], before.moments[index])
    if not is_merged and was != (after.blobs[index], after.moments[index]):
        yield "has other blobs than before, though nothing was merged into it"
    if index < len(after.last_trained):
        expected = after.manifest.number if is_merged else before.last_trained[index]
        if after.last_trained[index] != expected:
            yield f"claims round {after.last_trained[index]} as its last"


def _merges(trail: RunTrail) -> Iterator[tuple[str, str]]:
    """Every merge is of a piece that the delta has, with the staleness and weight of the rules."""
    versions = [revision.version_by_piece for revision in trail.revisions]
    for number, merges in trail.merges.items():
        if not 1 <= number < len(trail.revisions):
            yield f"revision {number}", f"{len(merges)} merges are recorded, but no such revision"
            continue
        claims = (
            (merge.piece, trail.work[merge.assignment_id].num_examples)
            for merge in merges
            if merge.assignment_id in trail.work
        )
        caps = examples_caps(trail.run.spec, claims)
        for merge in merges:
            work = trail.work.get(merge.assignment_id)
            if work is None:
                yield _name(merge.assignment_id), f"merged into {number}, but not of this run"
            elif merge.piece not in work.pieces:
                yield _name(merge.assignment_id), f"{merge.piece} is merged, but not in its delta"
            else:
                yield from _weight(trail, versions, merge, work, caps[merge.piece])


def _weight(
    trail: RunTrail,
    versions: list[dict[str, int]],
    merge: MergeRecord,
    work: WorkTrail,
    most_examples: float,
) -> Iterator[tuple[str, str]]:
    """Work out staleness and weight of a merge again."""
    current = trail.rounds.get(work.round_number)
    if current is None or not 0 <= current.base_revision < merge.revision:
        yield _name(merge.assignment_id), f"merged into {merge.revision}, before its own base"
        return
    onto, base = versions[merge.revision - 1], versions[current.base_revision]
    staleness = onto[merge.piece] - base[merge.piece]
    contributor = Contributor(merge.assignment_id, work.num_examples, work.chance)
    weight = piece_weight(trail.run.spec, contributor, merge.piece, staleness, most_examples)
    if (merge.staleness, merge.weight) != (staleness, weight):
        recorded = f"weight {merge.weight!r} and staleness {merge.staleness} in {merge.revision}"
        rules = f"the rules give {weight!r} and {staleness}"
        yield _name(merge.assignment_id), f"{merge.piece} has {recorded}; {rules}"


def _work(trail: RunTrail) -> Iterator[tuple[str, str]]:
    """Hold every assignment against what is recorded as merged of its delta."""
    pieces: defaultdict[AssignmentId, list[str]] = defaultdict(list)
    for merges in trail.merges.values():
        for merge in merges:
            pieces[merge.assignment_id].append(merge.piece)
    rows: defaultdict[AssignmentId, list[ScreeningRecord]] = defaultdict(list)
    for row in trail.screenings:
        rows[row.assignment_id].append(row)
    for work in trail.work.values():
        current = trail.rounds.get(work.round_number)
        if current is None or current.base_revision != work.base_revision:
            yield _name(work.assignment_id), f"it is of {work.base_revision}, unlike its round"
        own = rows[work.assignment_id]
        for detail in _end_of_work(trail.run.state, work, pieces[work.assignment_id], own):
            yield _name(work.assignment_id), detail


def _end_of_work(
    run: RunState, work: WorkTrail, merged: list[str], rows: list[ScreeningRecord]
) -> Iterator[str]:
    """An admitted delta is merged, every piece exactly once, or still waits in a run that goes on.

    What screening holds back or a merge passed over is told by its rows. What an operator's stop
    left behind stays admitted.
    """
    passed = [row.piece for row in rows if not row.may_merge]
    is_whole = sorted(merged + passed) == sorted(work.pieces)
    is_held = any(row.is_held for row in rows)
    told = f"merged are {sorted(merged)}, passed over {passed}"
    match work.state:
        case AssignmentState.ADMITTED if is_whole:
            yield "all of its pieces are merged, and yet it waits"
        case AssignmentState.ADMITTED if run is RunState.FINISHED:
            yield "it was admitted, and its run finished without merging it"
        case AssignmentState.ADMITTED:
            pass
        case AssignmentState.QUARANTINED if is_whole and is_held:
            pass
        case state if state in _DONE_WITH and is_whole and not is_held:
            pass
        case state if state in _COUNTED:
            yield f"it is {state} and holds {sorted(work.pieces)}; {told}"
        case state if merged:
            yield f"it is {state}, and yet {sorted(merged)} are merged"
        case _:
            pass
    yield from _file_of_work(work)


def _file_of_work(work: WorkTrail) -> Iterator[str]:
    """What counts was admitted with a file, and what was refused was not."""
    if work.state in _COUNTED and work.delta is None:
        yield f"it is {work.state} without a delta"
    if work.state is AssignmentState.REFUSED and work.delta is not None:
        yield "it was admitted, and refused before any of it was merged"


def _name(assignment_id: AssignmentId) -> str:
    return f"delta {assignment_id}"
