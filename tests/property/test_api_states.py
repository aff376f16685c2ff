"""Clients that do anything in any order: what the server then says agrees with a small model."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from pydantic import BaseModel
from typing_extensions import override

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_edge.protocol.messages import (
    ClientStatus,
    DeltaReceipt,
    FailureReport,
    Heartbeat,
    RejoinRequest,
    UploadStatus,
)
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Train
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.wire import Token
from fedra_server.auditing import audit
from fedra_server.config import ServerHome
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.builders import make_profile
from tests.support.headquarters import (
    Delta,
    Site,
    calibrate,
    connection,
    create_run,
    enrol,
    honest_delta,
    register_model,
)
from tests.support.servers import running_server

NUM_CLIENTS: Final = 3
COUNTED: Final = {AssignmentState.ADMITTED, AssignmentState.MERGED}
CLIENT: Final = st.integers(0, NUM_CLIENTS - 1)
WHOSE: Final = st.sampled_from([None, None, None, 0, 1, 2])
"""None: the client's own."""
SHARE: Final = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, 1.0])
POLL_S: Final = "0.1"
SETTINGS: Final = settings(
    max_examples=int(os.environ.get("FEDRA_FUZZ_EXAMPLES", "12")),
    stateful_step_count=40,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
_RUNS = itertools.count(1)


@dataclass(frozen=True)
class Target:
    """A server process, and its home as an operator's command opens it."""

    url: str
    home: ServerHome
    store: Store
    spec: ModelSpec


@dataclass
class Upload:
    """An upload as its sender knows it: ``sent`` bytes were acknowledged."""

    upload_id: Token
    delta: Delta
    sent: int = 0


@dataclass
class Plant:
    """What a client remembers of its own."""

    site: Site
    has_left: bool = False
    work: list[SliceManifest] = field(default_factory=list)
    uploads: dict[str, Upload] = field(default_factory=dict)
    """By assignment; an assignment has one at a time."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Serve one model; at the end nothing may have gone wrong inside."""
    home = ServerHome(tmp_path_factory.mktemp("home") / "server")
    home.create()
    store = Store.open(home.path)
    spec = register_model(store, BlobStore(home.blobs))
    limits = {
        "max_enrolments_per_minute": "100000",
        "max_clients": "100000",
        "max_requests_per_s": "100000",
        "max_strange_requests_per_s": "100000",
    }
    with running_server(home.path, settings=limits) as server:
        yield Target(server.url, home, store, spec)
        log = server.log.read_text(encoding="utf-8")
        assert "ERROR" not in log
        assert "Traceback" not in log
    store.close()


class AnyOrder(RuleBasedStateMachine):
    """Draws only numbers, never from answers, since the server goes on in the meantime."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.run = f"run-{next(_RUNS)}"
        self.stack = ExitStack()
        self.plants: list[Plant] = []
        self.admitted: set[str] = set()

    @initialize(
        mode=st.sampled_from(["synchronous", "buffered"]),
        min_participants=st.sampled_from([1, 1, 2]),
        max_staleness=st.sampled_from([None, 0, 1]),
    )
    def open_run(self, mode: str, min_participants: int, max_staleness: int | None) -> None:
        target = self.target
        create_run(
            target.store,
            BlobStore(target.home.blobs),
            target.spec,
            self.run,
            rounds=1000,
            mode=mode,
            max_staleness=max_staleness,
            min_participants=min_participants,
        )
        for index in range(NUM_CLIENTS):
            http = self.stack.enter_context(connection(target.url))
            self.plants.append(Plant(enrol(http, f"plant {index}", self.run)))
            calibrate(self.plants[index].site, target.spec)
        self.ask_for_work(0)

    @rule(index=CLIENT, is_measured=st.booleans())
    def come_back(self, index: int, is_measured: bool) -> None:
        """Return, perhaps on another machine, and with or without measuring it."""
        profile = make_profile(memory_bytes=2**40, baseline_bytes=10**8)
        answer = self.call(index, routes.REJOIN, RejoinRequest(profile=profile, run=self.run))
        if answer.status_code == 200:
            assert ClientStatus.model_validate_json(answer.content).is_online
            if is_measured:
                calibrate(self.plants[index].site, self.target.spec)

    @rule(index=CLIENT)
    def ask_for_work(self, index: int) -> None:
        answer = self.call(index, routes.ASSIGNMENT, params={"wait_s": POLL_S})
        if answer.status_code != 200 or answer.json()["kind"] != "train":
            return
        manifest = Train.model_validate_json(answer.content).manifest
        plant = self.plants[index]
        assert manifest.assignment_id not in self.admitted
        assert self.owner_of(manifest.assignment_id) in {None, index}
        assert not plant.work or manifest.round_number >= plant.work[-1].round_number
        if manifest.assignment_id not in {it.assignment_id for it in plant.work}:
            plant.work.append(manifest)

    @rule(index=CLIENT, whose=WHOSE)
    def show_alive(self, index: int, whose: int | None) -> None:
        whose = index if whose is None else whose
        for work in self.plants[whose].work[-1:]:
            beat = Heartbeat(assignment_id=work.assignment_id, steps_done=1, steps_total=2)
            answer = self.call(index, routes.HEARTBEAT, beat)
            if not self.plants[index].has_left:
                assert answer.status_code == (200 if index == whose else 403)
            if answer.status_code == 200 and work.assignment_id in self.admitted:
                assert answer.json() == {"is_wanted": False}

    @rule(index=CLIENT, whose=WHOSE, is_latest=st.booleans(), is_altered=st.booleans())
    def announce(self, index: int, whose: int | None, is_latest: bool, is_altered: bool) -> None:
        """Begin or go on with an upload, perhaps of another's work or of other bytes."""
        whose = index if whose is None else whose
        work = self.plants[whose].work
        if not work:
            return
        delta = honest_delta(self.target.spec, work[-1 if is_latest else 0])
        if is_altered:
            delta = Delta.of(delta.data[:-4] + bytes(4), delta.manifest.assignment_id)
        answer = self.call(index, routes.UPLOAD_CREATE, delta.manifest)
        if self.plants[index].has_left:
            return
        if index != whose:
            assert answer.status_code == 403
        elif answer.status_code == 201:
            self.note_upload(index, delta, UploadStatus.model_validate_json(answer.content))
        else:
            assert answer.status_code == 409, answer.text

    @rule(index=CLIENT, whose=WHOSE)
    def ask_offset(self, index: int, whose: int | None) -> None:
        whose = index if whose is None else whose
        for upload in list(self.plants[whose].uploads.values())[-1:]:
            answer = self.call(
                index, routes.UPLOAD_OFFSET, parts={"upload_id": upload.upload_id}
            )  # fmt: skip
            if self.plants[index].has_left:
                continue
            if index != whose:
                assert answer.status_code in {403, 404}
            elif answer.status_code == 200:
                assert int(answer.headers[routes.UPLOAD_OFFSET_HEADER]) == upload.sent
            else:
                self.expect_discarded(answer, upload)

    @rule(index=CLIENT, whose=WHOSE, share=SHARE, slip=st.sampled_from([0, 0, 0, 0, 1]))
    def send(self, index: int, whose: int | None, share: float, slip: int) -> None:
        """Send the next piece of the last upload, or one a byte further on."""
        whose = index if whose is None else whose
        for upload in list(self.plants[whose].uploads.values())[-1:]:
            rest = upload.delta.data[upload.sent + slip :]
            piece = rest[: round(share * len(rest))]
            is_last = share == 1.0
            answer = self.append(index, upload, piece, offset=upload.sent + slip, is_last=is_last)
            if self.plants[index].has_left:
                continue
            if index != whose:
                assert answer.status_code in {403, 404}
            elif slip and answer.status_code == 409:
                told = answer.headers.get(routes.UPLOAD_OFFSET_HEADER)
                assert told in {None, str(upload.sent)}
            elif answer.status_code == 200:
                self.note_admitted(upload, answer)
            elif answer.status_code == 204:
                upload.sent += len(piece)
                assert answer.headers[routes.UPLOAD_OFFSET_HEADER] == str(upload.sent)
            else:
                self.expect_discarded(answer, upload)

    @rule(order=st.permutations(range(NUM_CLIENTS)), shares=st.tuples(SHARE, SHARE))
    def end_round(self, order: list[int], shares: tuple[float, float]) -> None:
        """Let all do their part, in pieces, so that rounds do end."""
        for index in order:
            self.ask_for_work(index)
            self.announce(index, None, is_latest=True, is_altered=False)
            for share in (*shares, 1.0):
                self.send(index, None, share=share, slip=0)

    @rule(index=CLIENT, whose=WHOSE)
    def fail(self, index: int, whose: int | None) -> None:
        whose = index if whose is None else whose
        for work in self.plants[whose].work[-1:]:
            parts = {"assignment_id": work.assignment_id}
            answer = self.call(index, routes.FAILURE, FailureReport(detail="no memory"), parts)
            if not self.plants[index].has_left:
                assert answer.status_code == (204 if index == whose else 403)

    @rule(index=CLIENT)
    def go_offline(self, index: int) -> None:
        self.call(index, routes.OFFLINE)

    @rule(index=CLIENT, is_sure=st.integers(0, 9).map(lambda number: number == 9))
    def leave(self, index: int, is_sure: bool) -> None:
        if is_sure:
            self.call(index, routes.LEAVE)
            self.plants[index].has_left = True

    @invariant()
    def what_was_admitted_stays_so_and_nothing_else_is(self) -> None:
        counted = {
            assignment_id
            for assignment_id in self.known_assignments()
            if self.target.store.assignment(AssignmentId(assignment_id)).state in COUNTED
        }
        assert counted == self.admitted

    @override
    def teardown(self) -> None:
        """Stop the run, so that none of them disturbs the next."""
        store = self.target.store
        if self.plants:
            store.set_run_state(RunId(self.run), RunState.STOPPED, allowed_from=set(RunState))
        self.stack.close()

    def call(
        self,
        index: int,
        route: routes.Route,
        body: BaseModel | None = None,
        parts: dict[str, str] | None = None,
        params: dict[str, str] | None = None,
    ) -> httpx.Response:
        answer = self.plants[index].site.call(route, body, parts=parts, params=params)
        return self.checked(index, answer)

    def append(
        self, index: int, upload: Upload, piece: bytes, *, offset: int, is_last: bool
    ) -> httpx.Response:
        site = self.plants[index].site
        answer = site.append(upload.upload_id, piece, offset=offset, complete=is_last)
        return self.checked(index, answer)

    def checked(self, index: int, answer: httpx.Response) -> httpx.Response:
        assert answer.status_code < 500, answer.text
        is_turned_away = ProblemCode.CLIENT_REVOKED in answer.text
        assert is_turned_away == self.plants[index].has_left
        return answer

    def owner_of(self, assignment_id: str) -> int | None:
        for index, plant in enumerate(self.plants):
            if any(work.assignment_id == assignment_id for work in plant.work):
                return index
        return None

    def known_assignments(self) -> set[str]:
        return {work.assignment_id for plant in self.plants for work in plant.work}

    def note_upload(self, index: int, delta: Delta, status: UploadStatus) -> None:
        """An upload that was there goes on where it stood; one of other bytes begins anew."""
        uploads = self.plants[index].uploads
        before = uploads.pop(delta.manifest.assignment_id, None)
        if delta.manifest.assignment_id in self.admitted:
            assert before is not None
            assert before.delta.manifest.sha256 == delta.manifest.sha256
            assert status.offset_bytes == status.size_bytes
        elif before is not None and before.upload_id == status.upload_id:
            assert before.delta.manifest.sha256 == delta.manifest.sha256
            assert status.offset_bytes == before.sent
        else:
            assert status.offset_bytes == 0
        uploads[delta.manifest.assignment_id] = Upload(status.upload_id, delta, status.offset_bytes)

    def note_admitted(self, upload: Upload, answer: httpx.Response) -> None:
        receipt = DeltaReceipt.model_validate_json(answer.content)
        assert receipt.assignment_id == upload.delta.manifest.assignment_id
        self.admitted.add(receipt.assignment_id)
        upload.sent = len(upload.delta.data)

    def expect_discarded(self, answer: httpx.Response, upload: Upload) -> None:
        """Only what can no longer be counted is refused, and then its bytes are gone."""
        assert answer.status_code in {404, 409}, answer.text
        assert upload.delta.manifest.assignment_id not in self.admitted


def test_no_order_of_calls_loses_or_doubles_a_delta(target: Target) -> None:
    class Here(AnyOrder):
        def __init__(self) -> None:
            super().__init__(target)

    run_state_machine_as_test(Here, settings=SETTINGS)
    report = audit(target.store, BlobStore(target.home.blobs), target.home)
    assert report.is_clean, (report.difference, report.broken)
