"""Runs that wait for nobody, late deltas, cohorts with clients to spare, and clients that rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from typing_extensions import override

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_edge.protocol.layers import HEAD
from fedra_edge.protocol.messages import DeltaReceipt
from fedra_edge.protocol.models import BlobRef
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Train, Wait
from fedra_server.coordinator import Coordinator
from fedra_server.errors import RefusedError
from fedra_server.guidance import guide
from fedra_server.previewing import preview_round
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.blobs import BlobStore, Buffer
from fedra_server.storage.records import AssignmentRecord, MergeRecord
from tests.support.builders import RUN
from tests.support.headless import Headless
from tests.support.merge_checks import check_revision

PENDING, ADMITTED, MERGED = (
    AssignmentState.PENDING,
    AssignmentState.ADMITTED,
    AssignmentState.MERGED,
)
EXPIRED, FAILED = AssignmentState.EXPIRED, AssignmentState.FAILED
DEADLINE_S = 100.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Headless]:
    headless = Headless(tmp_path)
    yield headless
    headless.store.close()


def with_clients(server: Headless, count: int, **run: object) -> list[ClientId]:
    """Create a run and as many clients, and let it begin."""
    defaults = {"rounds": 50, "deadline_s": DEADLINE_S, "merge_weighting": "uniform"}
    server.create_run(RunState.RUNNING, **{**defaults, **run})
    clients = [server.enrol(f"client-{index}") for index in range(count)]
    server.coordinator.advance()
    return clients


def buffered(server: Headless, count: int, **run: object) -> list[ClientId]:
    return with_clients(server, count, **{"mode": "buffered", "min_participants": count, **run})


def work(server: Headless, client_id: ClientId) -> AssignmentRecord:
    """Give what a client is at work on."""
    assignment = server.store.open_assignment(client_id)
    assert assignment is not None
    return assignment


def state(server: Headless, assignment: AssignmentRecord) -> AssignmentState:
    return server.store.assignment(assignment.assignment_id).state


def revision(server: Headless) -> int:
    return server.store.revision(RUN).manifest.number


def merges_of(server: Headless, assignment: AssignmentRecord) -> dict[str, MergeRecord]:
    found = [
        merge
        for number in range(1, revision(server) + 1)
        for merge in server.store.merges(RUN, number)
    ]
    return {it.piece: it for it in found if it.assignment_id == assignment.assignment_id}


def check_every_revision(server: Headless) -> None:
    for number in range(1, revision(server) + 1):
        check_revision(server.store, server.blobs, server.home, RUN, number)


def test_revisions_follow_while_a_slow_client_works(server: Headless) -> None:
    *quick, slow = buffered(server, 3)
    late = work(server, slow)
    for number in (1, 2, 3):
        for seed, client_id in enumerate(quick):
            server.deliver(work(server, client_id), seed=10 * number + seed)
        assert server.coordinator.advance()
        assert revision(server) == number
    assert work(server, slow) == late
    receipt = server.deliver(late)
    assert receipt.staleness == 3
    server.deliver(work(server, quick[0]))
    server.coordinator.advance()
    assert state(server, late) is MERGED
    merges = merges_of(server, late)
    assert {it.staleness for it in merges.values()} == {3}
    assert {it.weight for it in merges.values()} == {(1 + 3) ** -0.5}
    assert {it.revision for it in merges.values()} == {4}
    check_every_revision(server)


def test_a_client_gets_new_work_of_the_newest_revision_at_once(server: Headless) -> None:
    first, second, third = buffered(server, 3, buffer_size=3)
    server.deliver(work(server, first))
    server.coordinator.advance()
    assert revision(server) == 0
    again = work(server, first)
    assert again.manifest.revision.number == 0
    server.deliver(again, seed=2)
    server.deliver(work(server, second))
    server.deliver(work(server, third))
    server.coordinator.advance()
    assert revision(server) == 1
    assert {work(server, it).manifest.revision.number for it in (first, second, third)} == {1}
    newcomer = server.enrol("newcomer")
    server.coordinator.advance()
    told = guide(server.store, server.store.client(newcomer), server.clock.now())
    assert isinstance(told, Train)
    assert told.manifest.remaining_s == DEADLINE_S


def test_each_piece_merges_when_enough_deltas_wait_for_it_or_its_time_is_up(
    server: Headless,
) -> None:
    first, second = buffered(server, 2, max_layers=2)
    one, two = work(server, first), work(server, second)
    assert not set(one.manifest.trained_layer_ids) & set(two.manifest.trained_layer_ids)
    server.deliver(one)
    server.clock.time += 30
    server.deliver(two, seed=2)
    server.coordinator.advance()
    assert revision(server) == 1
    assert {it.piece for it in server.store.merges(RUN, 1)} == {HEAD}
    assert (state(server, one), state(server, two)) == (ADMITTED, ADMITTED)
    waits = {it.assignment_id: it.pieces for it in server.store.waiting_deltas(RUN)}
    assert HEAD not in waits[one.assignment_id] + waits[two.assignment_id]
    server.clock.time += DEADLINE_S - 30
    server.coordinator.advance()
    assert (state(server, one), state(server, two)) == (MERGED, ADMITTED)
    server.clock.time += 30
    server.coordinator.advance()
    assert state(server, two) is MERGED
    assert server.store.waiting_deltas(RUN) == []
    for record in (one, two):
        assert len(merges_of(server, record)) == 3
    check_every_revision(server)


def test_a_quick_client_alone_makes_nobody_else_too_stale(server: Headless) -> None:
    quick, *slow = buffered(server, 3, rounds=500)
    late = [work(server, it) for it in slow]
    for seed in range(44):
        server.clock.time += 1
        server.deliver(work(server, quick), seed=seed)
        server.coordinator.advance()
    assert revision(server) == 0
    for seed, assignment in enumerate(late):
        assert server.deliver(assignment, seed=100 + seed).staleness is None
    server.coordinator.advance()
    assert [state(server, it) for it in late] == [MERGED, MERGED]
    check_every_revision(server)


def test_clients_drawn_one_by_one_take_different_layers(server: Headless) -> None:
    first, second = buffered(server, 2, max_layers=2, min_participants=1)
    for round_number in range(8):
        server.deliver(work(server, first), seed=round_number)
        server.coordinator.advance()
        others = set(work(server, second).manifest.trained_layer_ids)
        assert not others & set(work(server, first).manifest.trained_layer_ids)
        server.deliver(work(server, second), seed=round_number)
        server.coordinator.advance()


def test_the_last_revision_takes_all_that_waits_and_lets_the_others_go(server: Headless) -> None:
    first, second, slow = buffered(server, 3, max_layers=1, rounds=2)
    late = work(server, slow)
    server.deliver(work(server, first))
    server.deliver(work(server, second))
    server.coordinator.advance()
    assert revision(server) == 1
    assert len(server.store.waiting_deltas(RUN)) == 2
    server.deliver(work(server, first), seed=3)
    server.deliver(work(server, second), seed=4)
    server.coordinator.advance()
    assert server.store.run(RUN).state is RunState.FINISHED
    assert server.store.waiting_deltas(RUN) == []
    assert state(server, late) is EXPIRED
    assert server.store.open_assignment(slow) is None
    with pytest.raises(RefusedError, match="the run is finished") as caught:
        server.deliver(late)
    assert caught.value.code is ProblemCode.ROUND_CLOSED
    check_every_revision(server)


def test_a_delta_that_is_too_stale_is_refused_by_the_numbers(server: Headless) -> None:
    *quick, slow = buffered(server, 3, max_staleness=1)
    late = work(server, slow)
    for number in (1, 2):
        assert state(server, late) is PENDING
        for client_id in quick:
            server.deliver(work(server, client_id), seed=number)
        server.coordinator.advance()
    assert state(server, late) is EXPIRED
    assert work(server, slow).manifest.revision.number == 2
    with pytest.raises(RefusedError) as caught:
        server.deliver(late)
    assert caught.value.code is ProblemCode.ROUND_CLOSED
    assert "merged 2 times since revision 0" in str(caught.value)
    assert "at most 1" in str(caught.value)
    assert "--max-staleness" in caught.value.remedy


def test_a_paused_buffered_run_merges_what_comes_and_hands_nothing_out(server: Headless) -> None:
    clients = buffered(server, 3)
    given = [work(server, it) for it in clients]
    server.store.set_run_state(RUN, RunState.PAUSED, allowed_from={RunState.RUNNING})
    server.deliver(given[0])
    server.deliver(given[1], seed=2)
    server.coordinator.advance()
    assert revision(server) == 1
    assert [server.store.open_assignment(it) for it in clients] == [None, None, given[2]]
    assert server.deliver(given[2], seed=3).staleness == 1
    server.clock.time += DEADLINE_S
    server.coordinator.advance()
    assert state(server, given[2]) is MERGED
    server.store.set_run_state(RUN, RunState.RUNNING, allowed_from={RunState.PAUSED})
    for client_id in clients:
        server.store.touch(client_id, server.clock.now())
    server.coordinator.advance()
    assert {work(server, it).manifest.revision.number for it in clients} == {2}


def test_a_restarted_server_goes_on_with_half_merged_deltas(server: Headless) -> None:
    first, second = buffered(server, 2, max_layers=2)
    given = [work(server, first), work(server, second)]
    server.deliver(given[0])
    server.deliver(given[1], seed=2)
    server.coordinator.advance()
    server.restarted().advance()
    assert revision(server) == 1
    server.clock.time += DEADLINE_S
    server.restarted().advance()
    assert [state(server, it) for it in given] == [MERGED, MERGED]
    check_every_revision(server)


class InterruptedBlobs(BlobStore):
    """Blobs during whose first writing something else happens."""

    def __init__(self, directory: Path, meanwhile: Callable[[], None]) -> None:
        super().__init__(directory)
        self._meanwhile: list[Callable[[], None]] = [meanwhile]

    @override
    def put_all(self, files: Iterable[Iterable[Buffer]]) -> list[BlobRef]:
        while self._meanwhile:
            self._meanwhile.pop()()
        return super().put_all(files)


def test_deltas_are_counted_in_while_a_buffered_merge_goes_on(server: Headless) -> None:
    clients = buffered(server, 3)
    given = [work(server, it) for it in clients]
    server.deliver(given[0])
    server.deliver(given[1], seed=2)
    receipts: list[DeltaReceipt] = []
    blobs = InterruptedBlobs(
        server.home.blobs, lambda: receipts.append(server.deliver(given[2], seed=3))
    )
    server.coordinator = Coordinator(server.store, blobs, server.home, server.config, server.clock)
    server.coordinator.advance()
    assert [it.staleness for it in receipts] == [None]
    assert [state(server, it) for it in given] == [MERGED, MERGED, ADMITTED]
    server.clock.time += DEADLINE_S
    server.coordinator.advance()
    assert state(server, given[2]) is MERGED
    assert {it.staleness for it in merges_of(server, given[2]).values()} == {1}
    check_every_revision(server)


def test_a_late_delta_of_a_synchronous_run_joins_the_next_merge(server: Headless) -> None:
    *quick, slow = with_clients(server, 3, min_participants=2, max_staleness=2)
    late = work(server, slow)
    for client_id in quick:
        server.deliver(work(server, client_id))
    server.clock.time += DEADLINE_S
    for client_id in quick:
        server.store.touch(client_id, server.clock.now())
    server.coordinator.advance()
    assert (revision(server), state(server, late)) == (1, PENDING)
    assert set(server.assignments(2)) == set(quick)
    assert server.deliver(late).staleness == 1
    assert state(server, late) is ADMITTED
    for seed, client_id in enumerate(quick):
        server.deliver(work(server, client_id), seed=5 + seed)
    server.coordinator.advance()
    assert (revision(server), state(server, late)) == (2, MERGED)
    assert {it.weight for it in merges_of(server, late).values()} == {2**-0.5}
    check_every_revision(server)


def test_a_round_draws_clients_to_spare_and_merges_when_its_cohort_is_complete(
    server: Headless,
) -> None:
    with_clients(server, 6, min_participants=1, cohort_size=2, over_provisioning=0.5)
    drawn = server.assignments(1)
    assert len(drawn) == 3
    first, second, third = drawn.values()
    server.deliver(first)
    assert not server.coordinator.advance()
    server.deliver(second, seed=2)
    server.coordinator.advance()
    assert revision(server) == 1
    assert [state(server, it) for it in (first, second, third)] == [MERGED, MERGED, EXPIRED]
    assert len(server.assignments(2)) == 3
    with pytest.raises(RefusedError, match="ended without this delta"):
        server.deliver(third)


def test_who_vanishes_is_replaced_before_the_deadline(server: Headless) -> None:
    clients = with_clients(server, 4, min_participants=1, cohort_size=2)
    drawn = server.assignments(1)
    gone, staying = drawn.values()
    deadline_at = server.store.rounds(RUN)[0].deadline_at
    server.clock.time += server.config.heartbeat_timeout_s + 1
    for client_id in set(clients) - {gone.client_id}:
        server.store.touch(client_id, server.clock.now())
    assert server.clock.now() < deadline_at
    assert server.coordinator.advance()
    states = server.states(1)
    assert (states[gone.client_id], states[staying.client_id]) == (EXPIRED, PENDING)
    assert len([it for it in states.values() if it is PENDING]) == 2
    assert server.store.rounds(RUN)[0].deadline_at == deadline_at
    assert not server.coordinator.advance()


def test_a_buffered_run_keeps_its_number_at_work_when_some_vanish(server: Headless) -> None:
    clients = buffered(server, 4, min_participants=1, cohort_size=2)
    at_work = server.store.busy_clients()
    assert len(at_work) == 2
    server.clock.time += server.config.heartbeat_timeout_s + 1
    for client_id in set(clients) - at_work:
        server.store.touch(client_id, server.clock.now())
    assert server.coordinator.advance()
    assert server.store.busy_clients() == set(clients)


def fail(server: Headless, assignment: AssignmentRecord) -> None:
    server.store.settle(
        AssignmentId(assignment.assignment_id), FAILED, "out of memory", server.clock.now()
    )


def test_a_machine_that_always_fails_rests_longer_and_longer(server: Headless) -> None:
    quick, broken = buffered(server, 2, buffer_size=1)
    for number, rest_s in enumerate((5, 10, 20), start=1):
        fail(server, work(server, broken))
        server.deliver(work(server, quick), seed=number)
        server.coordinator.advance()
        assert revision(server) == number
        told = guide(server.store, server.store.client(broken), server.clock.now())
        assert isinstance(told, Wait)
        assert "out of memory" in told.reason
        assert ("once" if number == 1 else f"{number} times in a row") in told.reason
        server.clock.time += rest_s - 1
        server.coordinator.advance()
        assert server.store.open_assignment(broken) is None
        server.clock.time += 1
        assert server.coordinator.advance()
    server.deliver(work(server, broken))
    assert server.store.setbacks(RUN) == {}


def test_who_failed_in_one_round_rests_in_the_next(server: Headless) -> None:
    *quick, broken = with_clients(server, 3, min_participants=2)
    fail(server, work(server, broken))
    for client_id in quick:
        server.deliver(work(server, client_id))
    server.coordinator.advance()
    assert set(server.assignments(2)) == set(quick)
    preview = preview_round(server.store.run_history(RUN), 0.0, server.clock.now())
    [shown] = [it for it in preview.clients if it.client_id == broken]
    assert "rests until" in shown.reason
    for client_id in quick:
        server.deliver(work(server, client_id), seed=2)
    server.clock.time += 5
    server.coordinator.advance()
    assert set(server.assignments(3)) == {*quick, broken}


def test_a_clock_that_was_set_back_holds_nobody_up(server: Headless) -> None:
    first, second = with_clients(server, 2, min_participants=1)
    server.deliver(work(server, first))
    server.clock.time -= 10 * DEADLINE_S
    server.restarted().advance()
    assert server.store.rounds(RUN)[0].deadline_at == server.clock.now() + DEADLINE_S
    server.store.cap_last_seen(server.clock.now())
    assert server.store.client(second).last_seen_at == server.clock.now()
