"""Audits a home: every file that a record names, every rule, and every revision computed again.

Reads only, also while a server works on the home: records are read as of one moment per run, and
what the server removes meanwhile, it first records as pruned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.models import BlobRef
from fedra_server.audit_rules import BrokenRule, broken_rules
from fedra_server.audit_screening import judgements_of, wrong_measures
from fedra_server.config import ServerHome
from fedra_server.errors import NotFoundError
from fedra_server.recomputing import Difference, first_difference, first_difference_of_start
from fedra_server.runs import AssignmentState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from fedra_server.storage.trails import RunTrail

_MISSING: Final = "is missing"
_DONE_WITH: Final = frozenset({AssignmentState.MERGED, AssignmentState.DISCARDED})
_KEPT: Final = _DONE_WITH | {AssignmentState.ADMITTED, AssignmentState.QUARANTINED}


class RunAudit(BaseModel):
    """What was looked at of a run; ``pruned`` revisions are too old to be computed again."""

    model_config = ConfigDict(frozen=True)

    run: str
    revisions: int
    recomputed: int
    pruned: int
    deltas: int


class AuditReport(BaseModel):
    """What an audit found; ``difference`` is the first, by run and revision."""

    model_config = ConfigDict(frozen=True)

    runs: tuple[RunAudit, ...]
    blobs: int
    difference: Difference | None
    broken: tuple[BrokenRule, ...]

    @property
    def is_clean(self) -> bool:
        """Tell whether all is as it must be."""
        return self.difference is None and not self.broken


def audit(
    store: Store,
    blobs: BlobStore,
    home: ServerHome,
    *,
    run: str | None = None,
    revision: int | None = None,
) -> AuditReport:
    """Audit one run or all of them, and compute one revision or all of them again.

    Raises:
        NotFoundError: No such run or revision.
    """
    names = store.run_names()
    if run is not None and run not in names:
        raise NotFoundError(f"there is no run {run!r}", remedy="See `fedra-server run list`.")
    found = _Audit(store, blobs, home)
    for name in names if run is None else [run]:
        found.look_at(name, revision)
    if revision is not None and all(revision >= looked.revisions for looked in found.runs):
        raise NotFoundError(f"there is no revision {revision}")
    if run is None:
        found.look_at_models_and_references()
    return AuditReport(
        runs=tuple(found.runs),
        blobs=len(found.checked),
        difference=found.difference,
        broken=tuple(found.broken),
    )


@dataclass
class _Audit:
    """What was found so far; a blob that several records name is read once."""

    store: Store
    blobs: BlobStore
    home: ServerHome
    runs: list[RunAudit] = field(default_factory=list)
    broken: list[BrokenRule] = field(default_factory=list)
    difference: Difference | None = None
    checked: dict[BlobRef, str | None] = field(default_factory=dict)
    unread: set[AssignmentId] = field(default_factory=set)

    def look_at(self, run: str, revision: int | None) -> None:
        """Audit a run; records that make no sense at all end it."""
        try:
            self._look_at(self.store.trail(run), revision)
        except (NotFoundError, ValueError, LookupError, TypeError) as error:
            detail = f"they cannot be understood: {_in_words(error)}"
            self.broken.append(BrokenRule(run=run, what="records", detail=detail))

    def _look_at(self, trail: RunTrail, revision: int | None) -> None:
        self.broken += broken_rules(trail)
        self._look_at_deltas(trail)
        self._look_at_blobs(trail)
        self._look_at_measures(trail)
        numbers = [it for it in range(len(trail.revisions)) if revision in {None, it}]
        outcomes = [self._recompute(trail, number) for number in numbers]
        self.runs.append(
            RunAudit(
                run=trail.run.run,
                revisions=len(trail.revisions),
                recomputed=outcomes.count(True),
                pruned=sum(self._is_pruned(trail, number) for number in numbers),
                deltas=sum(work.state in _KEPT for work in trail.work.values()),
            )
        )

    def look_at_models_and_references(self) -> None:
        """Audit what belongs to no run."""
        for model in self.store.models():
            if model.model_id != model.spec.model_id:
                self._note(None, f"model {model.spec.name}", "it is not the one its id names")
            for blob in _blobs_in(model.spec.model_dump()):
                self._look_at_blob(None, f"model {model.spec.name}", blob)
        for table, target, count in self.store.dangling_rows():
            self._note(None, f"table {table}", f"{count} rows refer to no row of {target}")

    def _look_at_deltas(self, trail: RunTrail) -> None:
        """Every delta that counts is on the disk as it was admitted, unless it was let go."""
        last_merge: dict[AssignmentId, int] = {}
        for number, merges in sorted(trail.merges.items()):
            last_merge |= dict.fromkeys((merge.assignment_id for merge in merges), number)
        for work in trail.work.values():
            if work.state not in _KEPT or work.delta is None:
                continue
            why = _why_not(self.home.delta_file(work.assignment_id), work.delta)
            is_let_go = (
                why == _MISSING
                and work.state in _DONE_WITH
                and self._is_pruned(trail, last_merge.get(work.assignment_id, work.round_number))
            )
            if why:
                self.unread.add(work.assignment_id)
            if why and not is_let_go:
                self._note(trail, f"delta {work.assignment_id}", f"its file {why}")

    def _look_at_blobs(self, trail: RunTrail) -> None:
        """Every blob that the run names is there, but those that only pruned revisions name."""
        for blob in _blobs_in(trail.run.spec.model_dump()):
            self._look_at_blob(trail, "its graphs", blob)
        for number, revision in enumerate(trail.revisions):
            moments = (blob for blob in revision.moments if blob is not None)
            for blob in (*revision.blobs, *moments):
                is_let_go = not self.blobs.has(blob.sha256) and self._is_pruned(trail, number + 1)
                if not is_let_go:
                    self._look_at_blob(trail, f"revision {number}", blob)

    def _look_at_measures(self, trail: RunTrail) -> None:
        """Measure what was judged together again, unless one of the files is gone or altered."""
        for group in judgements_of(trail):
            if not self.unread.isdisjoint(row.assignment_id for row in group):
                continue
            try:
                for what, detail in wrong_measures(trail, group, self.home.delta_file, self.blobs):
                    self._note(trail, what, detail)
            except (NotFoundError, OSError, ValueError, LookupError) as error:
                if not self._is_pruned(trail, group[0].revision):
                    what = f"judgement {group[0].judgement}"
                    self._note(trail, what, f"it cannot be measured again: {_in_words(error)}")

    def _look_at_blob(self, trail: RunTrail | None, what: str, blob: BlobRef) -> None:
        if blob not in self.checked:
            is_there = self.blobs.has(blob.sha256)
            self.checked[blob] = (
                _why_not(self.blobs.path(blob.sha256), blob) if is_there else _MISSING
            )
        why = self.checked[blob]
        if why:
            self._note(trail, what, f"blob {blob.sha256} {why}")

    def _recompute(self, trail: RunTrail, number: int) -> bool:
        """Compute a revision again; tell whether that could be done."""
        if self._is_pruned(trail, number):
            return False
        try:
            found = _recomputed(trail, number, self.home, self.blobs)
        except (NotFoundError, OSError, ValueError, LookupError) as error:
            if not self._is_pruned(trail, number):
                why = _in_words(error)
                self._note(trail, f"revision {number}", f"it cannot be computed again: {why}")
            return False
        self.difference = self.difference or found
        return True

    def _is_pruned(self, trail: RunTrail, number: int) -> bool:
        """Tell whether a revision was too old to be kept computable, as of now."""
        pruned_through = self.store.run(trail.run.run).pruned_through
        return number <= pruned_through and pruned_through > 0

    def _note(self, trail: RunTrail | None, what: str, detail: str) -> None:
        run = None if trail is None else trail.run.run
        self.broken.append(BrokenRule(run=run, what=what, detail=detail))


def _recomputed(
    trail: RunTrail, number: int, home: ServerHome, blobs: BlobStore
) -> Difference | None:
    revision, run_spec = trail.revisions[number], trail.run.spec
    if number == 0:
        return first_difference_of_start(revision, trail.model.spec, run_spec, blobs)
    return first_difference(
        trail.revisions[number - 1],
        revision,
        trail.merges.get(number, []),
        home.delta_file,
        run_spec=run_spec,
        blobs=blobs,
    )


def _why_not(path: Path, expected: BlobRef) -> str | None:
    """Tell what is wrong with a file; None when it is the one expected."""
    try:
        size_bytes, sha256 = path.stat().st_size, sha256_of_file(path)
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if (sha256, size_bytes) != (expected.sha256, expected.size_bytes):
        return f"is altered: sha256 {sha256}, {size_bytes} bytes; recorded {expected.sha256}"
    return None


def _in_words(error: Exception) -> str:
    """Tell an error without what is only for programmers."""
    match error:
        case OSError(strerror=str(said)):
            name = "" if error.filename is None else f"{Path(error.filename).name}: "
            return f"{name}{said[:1].lower()}{said[1:]}"
        case KeyError() | IndexError():
            return f"nothing is known of {error.args[0] if error.args else 'a part'}"
        case _:
            return str(error)


def _blobs_in(value: object) -> Iterator[BlobRef]:
    """Find every blob that a dumped value names, however deep."""
    match value:
        case {"sha256": str(sha256), "size_bytes": int(size_bytes)}:
            yield BlobRef(sha256=sha256, size_bytes=size_bytes)
        case dict():
            for item in value.values():
                yield from _blobs_in(item)
        case list() | tuple():
            for item in value:
                yield from _blobs_in(item)
        case _:
            pass
