"""The round loop: opens, waits, merges, recruits; loses nothing and merges nothing twice."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Train, Wait
from fedra_server.auditing import audit
from fedra_server.errors import NotPermittedError, RefusedError
from fedra_server.guidance import guide
from fedra_server.runs import AssignmentState, RunState
from tests.support.builders import RUN, make_calibration, make_delta
from tests.support.headless import Headless

PENDING, ADMITTED, MERGED = (
    AssignmentState.PENDING,
    AssignmentState.ADMITTED,
    AssignmentState.MERGED,
)
EXPIRED, FAILED, REFUSED = (
    AssignmentState.EXPIRED,
    AssignmentState.FAILED,
    AssignmentState.REFUSED,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Headless]:
    headless = Headless(tmp_path)
    yield headless
    headless.store.close()


def with_clients(server: Headless, count: int, **run: object) -> list[ClientId]:
    """Create a run of two participants a round and as many clients."""
    server.create_run(
        RunState.RUNNING, **{"min_participants": 2, "rounds": 2, "deadline_s": 100.0, **run}
    )
    return [server.enrol(f"client-{index}") for index in range(count)]


def fail(server: Headless, client_id: str, round_number: int = 1) -> None:
    assignment = server.assignments(round_number)[client_id]
    server.store.settle(assignment.assignment_id, FAILED, "lost power", server.clock.now())


def test_a_round_opens_only_when_enough_clients_are_there(server: Headless) -> None:
    with_clients(server, 1)
    assert not server.coordinator.advance()
    server.enrol("late")
    assert server.coordinator.advance()
    assert len(server.assignments(1)) == 2
    assert not server.coordinator.advance()


def test_clients_that_are_silent_or_do_not_fit_are_not_drawn(server: Headless) -> None:
    with_clients(server, 2)
    server.enrol("tiny", memory_bytes=1)
    silent = server.enrol("silent")
    server.store.set_offline(silent, server.clock.now())
    server.coordinator.advance()
    assert set(server.assignments(1)) == {"client-0", "client-1"}
    told = guide(server.store, server.store.client(ClientId("tiny")), server.clock.now())
    assert isinstance(told, Wait)
    assert "cannot take part" in told.reason


def test_rounds_follow_each_other_until_the_run_is_finished(server: Headless) -> None:
    with_clients(server, 2)
    for round_number in (1, 2):
        server.coordinator.advance()
        for assignment in server.assignments(round_number).values():
            server.deliver(assignment)
    server.coordinator.advance()
    assert server.store.run(RUN).state is RunState.FINISHED
    assert [record.manifest.number for record in server.store.revisions(RUN)] == [0, 1, 2]
    assert set(server.states(1).values()) == set(server.states(2).values()) == {MERGED}


def test_a_round_waits_for_a_straggler_until_its_deadline_and_no_longer(server: Headless) -> None:
    with_clients(server, 3)
    server.coordinator.advance()
    work = server.assignments(1)
    server.deliver(work["client-0"])
    server.deliver(work["client-1"])
    assert not server.coordinator.advance()
    server.clock.time += 100
    assert server.coordinator.advance()
    assert server.states(1) == {"client-0": MERGED, "client-1": MERGED, "client-2": EXPIRED}


def test_a_late_delta_is_refused_with_its_reason(server: Headless) -> None:
    with_clients(server, 3)
    server.coordinator.advance()
    work = server.assignments(1)
    server.deliver(work["client-0"])
    server.deliver(work["client-1"])
    server.clock.time += 100
    server.coordinator.advance()
    with pytest.raises(RefusedError, match="round 1 of run run ended") as caught:
        server.deliver(work["client-2"])
    assert caught.value.code is ProblemCode.ROUND_CLOSED


def test_too_few_deltas_at_the_deadline_recruit_others_and_keep_what_is_there(
    server: Headless, caplog: pytest.LogCaptureFixture
) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    server.deliver(server.assignments(1)["client-0"])
    server.clock.time += 100
    server.coordinator.advance()
    told = "round 1 was due; 1 of 2 deltas are there; waiting another 100 s"
    assert [it for it in caplog.messages if told in it] == caplog.messages
    current = server.store.current_round(RUN)
    assert current is not None
    assert current.deadline_at == current.opened_at + 200
    server.clock.time += 100
    server.store.touch(ClientId("client-0"), server.clock.now())
    newcomer = server.enrol("newcomer")
    server.store.touch(newcomer, server.clock.now())
    server.coordinator.advance()
    assert server.states(1) == {"client-0": ADMITTED, "client-1": EXPIRED, "newcomer": PENDING}
    server.deliver(server.assignments(1)["newcomer"])
    server.coordinator.advance()
    assert server.states(1) == {"client-0": MERGED, "client-1": EXPIRED, "newcomer": MERGED}


def test_a_failed_participant_is_replaced_at_once(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    server.deliver(server.assignments(1)["client-0"])
    newcomer = server.enrol("newcomer")
    fail(server, "client-1")
    assert server.coordinator.advance()
    assert server.states(1)[newcomer] is PENDING


def test_a_failed_participant_tries_again_after_a_rest_that_doubles(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    server.deliver(server.assignments(1)["client-0"])
    for rest in (5, 10, 20):
        fail(server, "client-1")
        server.clock.time += rest - 1
        assert not server.coordinator.advance()
        server.clock.time += 1
        assert server.coordinator.advance()
        assert server.states(1)["client-1"] is PENDING


def test_a_delta_of_a_given_up_assignment_counts_while_its_round_is_open(
    server: Headless,
) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    fail(server, "client-1")
    server.deliver(server.assignments(1)["client-1"])
    assert server.states(1)["client-1"] is ADMITTED


def test_sending_a_delta_again_changes_nothing(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    assignment = server.assignments(1)["client-0"]
    receipt = server.deliver(assignment)
    assert server.deliver(assignment) == receipt
    with pytest.raises(RefusedError, match="another delta") as caught:
        server.deliver(assignment, seed=2)
    assert caught.value.code is ProblemCode.DELTA_CONFLICT


def test_a_poisoned_delta_settles_its_assignment_and_the_round_goes_on(server: Headless) -> None:
    with_clients(server, 3)
    server.coordinator.advance()
    work = server.assignments(1)
    server.deliver(work["client-0"])
    server.deliver(work["client-1"])
    with pytest.raises(RefusedError) as caught:
        server.deliver(work["client-2"], fill=float("nan"))
    assert caught.value.code is ProblemCode.TENSOR_NOT_FINITE
    assert server.coordinator.advance()
    assert server.states(1) == {"client-0": MERGED, "client-1": MERGED, "client-2": REFUSED}
    with pytest.raises(RefusedError, match="refused before"):
        server.deliver(work["client-2"])


def test_a_client_contributes_to_a_round_once(server: Headless) -> None:
    with_clients(server, 2, min_participants=2)
    server.coordinator.advance()
    first = server.assignments(1)["client-0"]
    fail(server, "client-0")
    fail(server, "client-1")
    server.clock.time += 5
    server.coordinator.advance()
    second = server.assignments(1)["client-0"]
    assert second.assignment_id != first.assignment_id
    server.deliver(first)
    assert server.states(1)["client-0"] is EXPIRED
    with pytest.raises(RefusedError, match="another assignment") as caught:
        server.deliver(second)
    assert caught.value.code is ProblemCode.DELTA_CONFLICT
    server.coordinator.advance()
    assert server.store.current_round(RUN) is not None
    server.deliver(server.assignments(1)["client-1"])
    server.coordinator.advance()
    merged = [item for item in server.store.assignments(RUN, 1) if item.state is MERGED]
    assert {item.client_id for item in merged} == {"client-0", "client-1"}
    assert len(merged) == 2


def test_a_damaged_stored_delta_is_left_out_and_its_round_goes_on(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    work = server.assignments(1)
    server.deliver(work["client-0"])
    stored = server.home.delta_file(work["client-0"].assignment_id)
    stored.write_bytes(b"")
    server.deliver(work["client-1"])
    server.coordinator.advance()
    assert server.states(1) == {"client-0": REFUSED, "client-1": ADMITTED}
    broken = audit(server.store, server.blobs, server.home).broken
    told = [it.what for it in broken if "admitted, and refused" in it.detail]
    assert told == [f"delta {work['client-0'].assignment_id}"]
    server.clock.time += 5
    server.coordinator.advance()
    server.deliver(server.assignments(1)["client-0"])
    server.coordinator.advance()
    assert server.states(1)["client-0"] is MERGED


def test_a_round_waits_for_a_stored_delta_that_is_away_and_says_so_once(
    server: Headless, caplog: pytest.LogCaptureFixture
) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    for assignment in server.assignments(1).values():
        server.deliver(assignment)
    stored = server.home.delta_file(server.assignments(1)["client-0"].assignment_id)
    away = stored.rename(stored.with_suffix(".away"))
    for _ in range(3):
        server.coordinator.advance()
    assert server.states(1) == {"client-0": ADMITTED, "client-1": ADMITTED}
    told = [it.message for it in caplog.records if "cannot go on" in it.message]
    assert len(told) == 1
    assert str(stored) in told[0]
    assert "Bring the file back" in told[0]
    away.rename(stored)
    server.coordinator.advance()
    assert server.states(1) == {"client-0": MERGED, "client-1": MERGED}
    assert server.store.revision(RUN).manifest.number == 1


def test_a_stopped_run_is_not_written_to_when_nobody_is_at_work(
    server: Headless, caplog: pytest.LogCaptureFixture
) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    server.store.set_run_state(RUN, RunState.STOPPED, allowed_from={RunState.RUNNING})
    assert server.coordinator.advance()
    with closing(sqlite3.connect(server.home.database_file, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")  # nobody else can write now
        assert not server.coordinator.advance()
    assert "cannot go on" not in caplog.text


@pytest.mark.parametrize(("examples", "seconds"), [(2**31 - 1, 0.0), (2**31 - 1, 1e-9), (1, 1e9)])
def test_an_absurd_calibration_holds_nobody_up(
    server: Headless, examples: int, seconds: float
) -> None:
    with_clients(server, 2, training={"batch_size": 1})
    liar = server.enrol("liar")
    spec = server.store.model(server.store.run(RUN).model_id).spec
    absurd = make_calibration(spec, forward_s=seconds, backward_s=0.0, train_examples=examples)
    server.store.set_calibration(liar, absurd)
    assert server.coordinator.advance()
    assert {"client-0", "client-1"} <= set(server.assignments(1))
    guide(server.store, server.store.client(liar), server.clock.now())


def test_an_oversized_announcement_settles_its_assignment(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    assignment = server.assignments(1)["client-0"]
    huge = make_delta(assignment.assignment_id, size_bytes=10**9)
    with pytest.raises(RefusedError) as caught:
        server.coordinator.intake.expect(ClientId("client-0"), huge)
    assert caught.value.code is ProblemCode.DELTA_TOO_LARGE
    assert server.states(1)["client-0"] is REFUSED


def test_altered_bytes_are_refused_and_may_be_sent_again(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    upload = server.announce(server.assignments(1)["client-0"])
    part = server.home.upload_part(upload.upload_id)
    sound = part.read_bytes()
    part.write_bytes(sound[:-1] + b"\x00")
    with pytest.raises(RefusedError) as caught:
        server.coordinator.intake.admit(upload, part)
    assert caught.value.code is ProblemCode.DIGEST_MISMATCH
    part.write_bytes(sound)
    server.coordinator.intake.admit(upload, part)
    assert server.states(1)["client-0"] is ADMITTED


def test_foreign_announcements_are_refused(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    assignment = server.assignments(1)["client-0"]
    delta = make_delta(assignment.assignment_id)
    with pytest.raises(NotPermittedError):
        server.coordinator.intake.expect(ClientId("client-1"), delta)


def test_a_restarted_server_continues_the_round_it_was_in(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    before = server.assignments(1)
    server.deliver(before["client-0"])
    server.restarted().advance()
    assert server.states(1) == {"client-0": ADMITTED, "client-1": PENDING}
    assert server.assignments(1)["client-1"] == before["client-1"]
    server.deliver(before["client-1"])
    server.restarted().advance()
    assert set(server.states(1).values()) == {MERGED}


def test_a_paused_run_ends_its_round_but_opens_no_other(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    server.store.set_run_state(RUN, RunState.PAUSED, allowed_from={RunState.RUNNING})
    for assignment in server.assignments(1).values():
        server.deliver(assignment)
    server.coordinator.advance()
    assert set(server.states(1).values()) == {MERGED}
    assert server.store.current_round(RUN) is None
    told = guide(server.store, server.store.client(ClientId("client-0")), server.clock.now())
    assert isinstance(told, Wait)
    assert "paused" in told.reason


def test_a_stopped_run_lets_its_participants_go(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    assignment = server.assignments(1)["client-0"]
    server.store.set_run_state(RUN, RunState.STOPPED, allowed_from={RunState.RUNNING})
    assert server.coordinator.advance()
    assert set(server.states(1).values()) == {EXPIRED}
    with pytest.raises(RefusedError) as caught:
        server.deliver(assignment)
    assert caught.value.code is ProblemCode.ROUND_CLOSED


def test_waiting_clients_are_told_when_the_operator_steers_a_run(server: Headless) -> None:
    server.create_run(RunState.CREATED)
    told = threading.Event()
    server.coordinator.subscribe(told.set)
    server.coordinator.start()
    try:
        for state in (RunState.RUNNING, RunState.PAUSED, RunState.STOPPED):
            assert told.wait(10)
            told.clear()
            server.store.set_run_state(RUN, state, allowed_from=set(RunState))
        assert told.wait(10)
    finally:
        server.coordinator.stop()


def test_a_participant_is_told_its_work_and_the_time_left(server: Headless) -> None:
    with_clients(server, 2)
    server.coordinator.advance()
    server.clock.time += 30
    client = server.store.client(ClientId("client-0"))
    told = guide(server.store, client, server.clock.now())
    assert isinstance(told, Train)
    assert told.manifest.remaining_s == 70
    assert told.evaluate is not None
    assert told.evaluate.revision.number == 0
    elsewhere = replace(client, client_id=ClientId("nobody"), run="other")
    assert isinstance(guide(server.store, elsewhere, server.clock.now()), Wait)
