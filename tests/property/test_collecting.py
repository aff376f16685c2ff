"""Whatever a record refers to is never collected; what nobody refers to is, when it is old."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import insert, update
from typing_extensions import override

from fedra_edge.protocol.ids import AssignmentId, RevisionNumber, RunId
from fedra_edge.protocol.models import BlobRef
from fedra_edge.protocol.slices import RevisionManifest
from fedra_server.clock import SystemClock
from fedra_server.config import ServerHome
from fedra_server.runs import AssignmentState
from fedra_server.storage import tables
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.collecting import Collector
from fedra_server.storage.records import MergeRecord, RevisionRecord
from fedra_server.storage.rows import assignment_values, merge_values, revision_values, round_values
from fedra_server.storage.store import Store
from tests.support.builders import (
    RUN,
    make_assignment,
    make_client,
    make_model_spec,
    make_revision,
    make_round,
    make_run,
)

CONTENTS = st.integers(0, 9)


@dataclass
class Expected:
    """What must be on the disk, kept by hand: the digests of each revision and assignment."""

    revisions: dict[int, set[str]] = field(default_factory=dict)
    pending: dict[str, set[str]] = field(default_factory=dict)
    admitted: set[str] = field(default_factory=set)
    merged_into: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    oldest: int = 0

    @property
    def blobs(self) -> set[str]:
        kept = [held for number, held in self.revisions.items() if number >= self.oldest]
        return set().union(*kept, *self.pending.values())

    @property
    def deltas(self) -> set[str]:
        merged = {name for name, into in self.merged_into.items() if into > self.oldest}
        return merged | self.admitted


class HomeOverTime(RuleBasedStateMachine):
    """One run that is published, pruned and collected, with work that starts and ends."""

    @initialize()
    def make_home(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.home = ServerHome(self.place)
        self.home.create()
        self.store = Store.open(self.place)
        self.blobs = BlobStore(self.home.blobs)
        self.collector = Collector(self.store, self.blobs, self.home, SystemClock())
        self.expected = Expected()
        self.put: set[str] = set()
        self.store.add_model(make_model_spec(), now=0)
        self.store.add_client(make_client(), "0" * 64)
        first = self.revision(0, [0])
        self.store.add_run(make_run(), first)
        self.expected.revisions[0] = self.digests(first)

    def blob(self, content: int) -> BlobRef:
        ref = self.blobs.put_bytes(f"blob {content}".encode())
        self.put.add(ref.sha256)
        return ref

    def revision(self, number: int, contents: list[int]) -> RevisionRecord:
        held = [self.blob(content) for content in contents]
        manifest = RevisionManifest(
            number=RevisionNumber(number), layers=tuple(held), head=self.blob(100 + number)
        )
        moments = (*(None for _ in held), self.blob(200 + number))
        return replace(make_revision(number), manifest=manifest, moments=moments)

    def digests(self, revision: RevisionRecord) -> set[str]:
        return {ref.sha256 for ref in (*revision.blobs, *revision.moments) if ref is not None}

    @rule(content=CONTENTS)
    def put_without_a_record(self, content: int) -> None:
        self.blob(content)

    @rule(contents=st.lists(CONTENTS, min_size=1, max_size=3), is_merged=st.booleans())
    def publish(self, contents: list[int], *, is_merged: bool) -> None:
        number = max(self.expected.revisions) + 1
        revision = self.revision(number, contents)
        merged = f"merged-{number}"
        assignment = make_assignment(merged, round_number=number, state=AssignmentState.MERGED)
        with self.store.writing() as connection:
            connection.execute(insert(tables.rounds).values(round_values(make_round(number))))
            connection.execute(insert(tables.revisions).values(revision_values(revision)))
            if is_merged:
                row = MergeRecord(AssignmentId(merged), "head", RunId(RUN), number, 1.0, 0)
                connection.execute(insert(tables.assignments).values(assignment_values(assignment)))
                connection.execute(insert(tables.merges).values(merge_values(row)))
        self.expected.revisions[number] = self.digests(revision)
        if is_merged:
            self.home.delta_file(AssignmentId(merged)).write_bytes(b"delta")
            self.expected.merged_into[merged] = number

    @rule(content=CONTENTS)
    def assign(self, content: int) -> None:
        name = f"work-{len(self.expected.pending)}-{len(self.expected.refused)}"
        number = max(self.expected.revisions)
        if number == 0 or name in self.expected.pending:
            return
        base = replace(self.revision(number, [content]), moments=())
        work = make_assignment(name, round_number=number, revision=base.manifest)
        with self.store.writing() as connection:
            connection.execute(insert(tables.assignments).values(assignment_values(work)))
        self.expected.pending[name] = self.digests(base)

    @rule(is_good=st.booleans())
    def deliver(self, *, is_good: bool) -> None:
        waiting = [name for name in self.expected.pending if name not in self.expected.admitted]
        for name in waiting[:1]:
            self.home.delta_file(AssignmentId(name)).write_bytes(b"delta")
            state = "admitted" if is_good else "refused"
            change = update(tables.assignments).where(tables.assignments.c.assignment_id == name)
            with self.store.writing() as connection:
                connection.execute(change.values(state=state, settled_at=1.0))
            if is_good:
                self.expected.admitted.add(name)
            else:
                del self.expected.pending[name]
                self.expected.refused.add(name)

    @rule()
    def merge_the_rest_of_a_delta(self) -> None:
        number = max(self.expected.revisions)
        kept = self.expected.deltas & self.expected.merged_into.keys()
        for name in sorted(it for it in kept if self.expected.merged_into[it] < number)[-1:]:
            row = MergeRecord(AssignmentId(name), f"layers.{number}", RunId(RUN), number, 1.0, 0)
            with self.store.writing() as connection:
                connection.execute(insert(tables.merges).values(merge_values(row)))
            self.expected.merged_into[name] = number

    @rule()
    def refuse_what_is_merged_in_part(self) -> None:
        """Its file was found damaged, and may be brought back."""
        for name in sorted(self.expected.deltas & self.expected.merged_into.keys())[-1:]:
            change = update(tables.assignments).where(tables.assignments.c.assignment_id == name)
            with self.store.writing() as connection:
                connection.execute(change.values(state="refused", settled_at=1.0))

    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        planned = self.collector.find(self.store.cut_keeping(RUN, keep)).as_collected()
        self.store.make_cut(RUN, keep)
        self.expected.oldest = max(self.expected.oldest, max(self.expected.revisions) + 1 - keep)
        assert self.collector.find().as_collected() == planned

    @rule()
    def collect_young(self) -> None:
        there = {blob.sha256 for blob in self.blobs.stored()}
        self.collector.collect()
        assert {blob.sha256 for blob in self.blobs.stored()} >= there & self.expected.blobs

    @rule()
    def collect_old(self) -> None:
        for path in (*self.home.blobs.glob("??/*"), *self.home.deltas.iterdir()):
            os.utime(path, (1.0, 1.0))
        self.collector.collect()
        assert {blob.sha256 for blob in self.blobs.stored()} == self.expected.blobs
        assert {path.stem for path in self.home.deltas.iterdir()} == self.expected.deltas

    @invariant()
    def whatever_is_referenced_is_there(self) -> None:
        if hasattr(self, "expected"):
            assert {blob.sha256 for blob in self.blobs.stored()} >= self.expected.blobs
            assert {path.stem for path in self.home.deltas.iterdir()} >= self.expected.deltas

    @override
    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.place)


TestHomeOverTime = HomeOverTime.TestCase
TestHomeOverTime.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_cut_never_goes_back(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    try:
        store.add_model(make_model_spec(), now=0)
        store.add_run(make_run(), make_revision())
        for number in range(1, 6):
            with store.writing() as connection:
                values = revision_values(make_revision(number))
                connection.execute(insert(tables.revisions).values(values))
        assert store.make_cut(RUN, 2).through == 4
        assert store.make_cut(RUN, 5).through == 4
        assert store.run(RUN).pruned_through == 4
        with pytest.raises(Exception, match="no run"):
            store.make_cut("unknown", 1)
    finally:
        store.close()


def test_a_refused_delta_stays_as_long_as_what_was_merged_of_it() -> None:
    home = HomeOverTime()
    home.make_home()
    try:
        home.publish([1], is_merged=True)
        home.refuse_what_is_merged_in_part()
        home.collect_old()
        home.publish([2], is_merged=False)
        home.prune(keep=1)
        home.collect_old()
    finally:
        home.teardown()
