"""What waits in the outbox is delivered before anything new, and its refusal ends the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedra_edge.client import EdgeClient
from fedra_edge.config import EdgeConfig, load_config
from fedra_edge.outbox import Outbox
from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.messages import ClientStatus, DeltaReceipt, UploadStatus
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Stop
from tests.support.builders import make_training_report
from tests.support.edge_site import PATIENCE_S, CountingTrainer, MemoryDataset
from tests.support.gate import Gate, make_member
from tests.support.wire_server import Received, Reply, serving

DELTA = b"x" * 100
BACK = Reply.of(
    ClientStatus(
        client_id="c1",
        name="c1",
        run=None,
        is_online=True,
        rounds_contributed=0,
        open_assignment=None,
    )
)
OVER = Reply.of(Stop(reason="the run is over"))
BEGUN = Reply.of(UploadStatus(upload_id="u1", offset_bytes=0, size_bytes=len(DELTA)), 201)
RECEIPT = Reply.of(DeltaReceipt(assignment_id="a1"))


class ScriptedServer:
    """Knows one client; what it says to an announced delta and to a failure is up to the test."""

    def __init__(self, announced: Callable[[], Reply], failure: Reply) -> None:
        self.announced = announced
        self.failure = failure
        self.asked: list[str] = []
        self.failures: list[str] = []

    def __call__(self, received: Received) -> Reply:
        """Answer a request."""
        path = received.path.partition("?")[0]
        self.asked.append(f"{received.method} {path}")
        if path == routes.FAILURE.fill(assignment_id="a1"):
            self.failures.append(json.loads(received.body)["detail"])
            return self.failure
        answers: dict[str, Callable[[], Reply]] = {
            routes.REJOIN.path: lambda: BACK,
            routes.UPLOAD_CREATE.path: self.announced,
            routes.UPLOAD_APPEND.fill(upload_id="u1"): lambda: RECEIPT,
            routes.ASSIGNMENT.path: lambda: OVER,
        }
        return answers.get(path, lambda: Reply(204))()


def settings_with_a_waiting_delta(url: str, home: Path) -> EdgeConfig:
    config = load_config({"server": url, "home": home})
    outbox = Outbox(config.outbox)
    outbox.put(AssignmentId("a1"), [DELTA], num_examples=1, report=make_training_report())
    return config


def take_part(server: ScriptedServer, home: Path) -> EdgeConfig:
    """Run a client that has a delta in its outbox until the server says that all is over."""
    gate = Gate(behind=server)
    with serving(gate) as wire:
        config = settings_with_a_waiting_delta(wire.url, home)
        gate.public_key = make_member(config)
        client = EdgeClient(config, dataset=MemoryDataset(), trainer=CountingTrainer()).start()
        try:
            assert client.wait(PATIENCE_S)
        finally:
            client.stop()
    return config


@pytest.mark.slow
def test_nothing_new_is_asked_for_before_the_outbox_is_empty(tmp_path: Path) -> None:
    refusals = iter([Reply(507)] * 5)  # as often as one delivery tries
    server = ScriptedServer(lambda: next(refusals, BEGUN), Reply(204))
    config = take_part(server, tmp_path)
    first_question = server.asked.index(f"GET {routes.ASSIGNMENT.path}")
    before = server.asked[:first_question]
    assert before.count(f"POST {routes.UPLOAD_CREATE.path}") == 6
    assert before[-1].startswith("PATCH ")
    assert Outbox(config.outbox).num_waiting == 0
    assert server.failures == []


@pytest.mark.parametrize("failure", [Reply(204), Reply.problem(ProblemCode.NOT_FOUND, 404)])
def test_a_refused_delta_ends_its_assignment(tmp_path: Path, failure: Reply) -> None:
    refusal = Reply.problem(ProblemCode.DELTA_CONFLICT, 409)
    server = ScriptedServer(lambda: refusal, failure)
    config = take_part(server, tmp_path)
    assert server.failures == ["the delta was refused: because of delta-conflict"]
    assert (config.outbox / "refused" / "a1.safetensors").read_bytes() == DELTA
    assert f"GET {routes.ASSIGNMENT.path}" in server.asked


def test_a_refused_delta_that_cannot_be_moved_away_does_not_end_the_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Reply:
        (manifest,) = tmp_path.rglob("a1.json")
        (manifest.parent / "refused").write_bytes(b"in the way")
        return Reply.problem(ProblemCode.DELTA_CONFLICT, 409)

    server = ScriptedServer(refuse, Reply(204))
    config = take_part(server, tmp_path)
    assert f"GET {routes.ASSIGNMENT.path}" in server.asked
    assert "the delta of a1 stays in the outbox" in caplog.text
    assert Outbox(config.outbox).num_waiting == 1
