"""The records: each method one transaction, conflicts told, published rounds closed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedra_edge.protocol.ids import AssignmentId, ClientId, RunId, UploadId
from fedra_edge.protocol.layers import HEAD
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.rounds import Progress, Setback
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.records import MergeRecord
from fedra_server.storage.rounds import Publication
from fedra_server.storage.store import Store
from tests.support.builders import (
    NOW,
    RUN,
    make_assignment,
    make_calibration,
    make_client,
    make_delta,
    make_digest,
    make_evaluation,
    make_model_spec,
    make_profile,
    make_revision,
    make_round,
    make_run,
    make_upload,
)

ONE, TWO = AssignmentId("assignment-1"), AssignmentId("assignment-2")
CLIENT = ClientId("client-1")


@pytest.fixture
def empty_store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "home")
    yield store
    store.close()


@pytest.fixture
def store(empty_store: Store) -> Store:
    """Give a store with two clients, a model and a running run at revision 0."""
    for client_id in ("client-1", "client-2"):
        empty_store.add_client(make_client(client_id), make_digest(client_id))
    empty_store.add_model(make_model_spec(), NOW)
    empty_store.add_run(make_run(), make_revision())
    return empty_store


@pytest.fixture
def open_store(store: Store) -> Store:
    """Give a store in which both clients have work in round 1."""
    work = [make_assignment(ONE), make_assignment(TWO, "client-2")]
    store.open_round(make_round(), work)
    return store


def admit(store: Store, assignment_id: AssignmentId) -> None:
    delta = make_delta(assignment_id)
    store.settle(assignment_id, AssignmentState.ADMITTED, "", NOW + 5, delta=delta)


def publish(
    store: Store, *merged: AssignmentId, round_number: int = 1, finishes_run: bool = False
) -> None:
    """Merge the heads of some deltas and let all others go."""
    publication = Publication(
        revision=make_revision(round_number),
        merges=[MergeRecord(it, HEAD, RunId(RUN), round_number, 1.0, 0) for it in merged],
        merged=merged,
        expired=[it for it in (ONE, TWO) if it not in merged],
        leaves_none=True,
        finishes_run=finishes_run,
    )
    store.publish(publication, round_number, NOW + 9)


def states(store: Store) -> list[AssignmentState]:
    return [it.state for it in store.assignments(RUN, 1)]


def test_a_client_is_found_by_its_key(store: Store) -> None:
    assert store.client_with_key(make_digest("client-1")) == make_client("client-1")
    assert store.client_and_key(CLIENT) == (make_client("client-1"), make_digest("client-1"))
    assert store.client_with_key(make_digest("stranger")) is None
    store.leave(CLIENT, NOW + 1)
    left = store.client_with_key(make_digest("client-1"))
    assert left is not None
    assert left.has_left
    assert [it.client_id for it in store.clients()] == ["client-2"]
    assert [it.has_left for it in store.clients(include_left=True)] == [True, False]
    with pytest.raises(NotFoundError):
        store.touch(CLIENT, NOW + 2)
    with pytest.raises(ConflictError):
        store.add_client(make_client("client-3"), make_digest("client-1"))


def test_a_client_goes_offline_and_comes_back_on_another_machine(store: Store) -> None:
    store.set_offline(CLIENT, NOW + 1)
    assert not store.client(CLIENT).is_online
    store.touch(CLIENT, NOW + 2)
    assert (store.client(CLIENT).is_online, store.client(CLIENT).last_seen_at) == (True, NOW + 2)
    store.set_offline(CLIENT, NOW + 3)
    profile = make_profile(cpu_count=0.5, max_layers=3)
    back = store.rejoin(CLIENT, profile, RUN, NOW + 4)
    expected = replace(make_client(), profile=profile, run=RUN, last_seen_at=NOW + 4)
    assert back == expected == store.client(CLIENT)
    with pytest.raises(NotFoundError, match="nobody"):
        store.client(ClientId("nobody"))


def test_a_calibration_replaces_the_one_before_and_ends_with_membership(store: Store) -> None:
    spec = make_model_spec()
    store.set_calibration(CLIENT, make_calibration(spec))
    store.set_calibration(CLIENT, make_calibration(spec, forward_s=0.5))
    assert store.calibrations(spec.model_id) == {CLIENT: make_calibration(spec, forward_s=0.5)}
    assert store.calibrations("0" * 64) == {}
    store.leave(CLIENT, NOW)
    assert store.calibrations(spec.model_id) == {}
    with pytest.raises(NotFoundError):
        store.set_calibration(ClientId("nobody"), make_calibration(spec))


def test_a_model_is_registered_once_and_its_name_is_taken(store: Store) -> None:
    again = store.add_model(make_model_spec(), NOW + 99)
    assert again.added_at == NOW
    assert store.model(again.model_id) == store.model_by_name("tiny") == again
    with pytest.raises(ConflictError, match="tiny"):
        store.add_model(make_model_spec(num_layers=5), NOW)
    assert store.models() == [again]
    with pytest.raises(NotFoundError):
        store.model("0" * 64)
    with pytest.raises(NotFoundError, match="huge"):
        store.model_by_name("huge")


def test_a_run_needs_its_model_and_a_name_of_its_own(empty_store: Store) -> None:
    with pytest.raises(NotFoundError):
        empty_store.add_run(make_run(), make_revision())
    empty_store.add_model(make_model_spec(), NOW)
    empty_store.add_run(make_run(), make_revision())
    with pytest.raises(ConflictError, match="exists already"):
        empty_store.add_run(make_run(), make_revision())
    assert empty_store.runs() == [make_run()] == [empty_store.run(RUN)]
    assert empty_store.revision(RUN) == make_revision()


def test_a_run_changes_state_only_from_the_allowed_ones(store: Store) -> None:
    paused = store.set_run_state(RUN, RunState.PAUSED, {RunState.RUNNING})
    assert paused.state is RunState.PAUSED
    with pytest.raises(ConflictError, match="is paused"):
        store.set_run_state(RUN, RunState.PAUSED, {RunState.RUNNING})
    with pytest.raises(NotFoundError):
        store.set_run_state("other", RunState.PAUSED, {RunState.RUNNING})


def test_a_missing_revision_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError, match="revision 7"):
        store.revision(RUN, 7)
    with pytest.raises(NotFoundError, match="other"):
        store.revision("other")


def test_a_run_has_one_open_round(open_store: Store) -> None:
    assert open_store.current_round(RUN) == make_round()
    with pytest.raises(ConflictError, match="open round"):
        open_store.open_round(make_round(2), [])
    assert open_store.rounds(RUN) == [make_round()]
    assert open_store.assignments(RUN) == open_store.assignments(RUN, 1)
    assert open_store.assignment(ONE) == make_assignment(ONE) == open_store.open_assignment(CLIENT)


def test_a_round_with_an_impossible_assignment_is_not_opened_at_all(store: Store) -> None:
    with pytest.raises(ConflictError):
        store.open_round(make_round(), [make_assignment(ONE), make_assignment(TWO, "nobody")])
    assert store.rounds(RUN) == []
    assert store.assignments(RUN) == []


def test_an_extension_expires_only_what_is_pending(open_store: Store) -> None:
    admit(open_store, ONE)
    extended = open_store.extend_round(
        RUN,
        1,
        deadline_at=NOW + 500,
        draws=2,
        assignments=[make_assignment("assignment-3", "client-2")],
        expire=[ONE, TWO],
        now=NOW + 100,
    )
    assert extended == replace(make_round(), deadline_at=NOW + 500, draws=2)
    assert {it.assignment_id: it.state.value for it in open_store.assignments(RUN, 1)} == {
        ONE: "admitted",
        TWO: "expired",
        "assignment-3": "pending",
    }
    assert open_store.assignment(TWO).settled_at == NOW + 100


def test_an_admitted_delta_is_settled_once(open_store: Store) -> None:
    admit(open_store, ONE)
    settled = open_store.assignment(ONE)
    assert settled.delta == make_delta(ONE)
    assert settled.settled_at == NOW + 5
    assert open_store.open_assignment(CLIENT) is None
    with pytest.raises(ConflictError, match="is admitted already"):
        open_store.settle(ONE, AssignmentState.FAILED, "late", NOW + 6)
    assert open_store.assignment(ONE) == settled
    with pytest.raises(NotFoundError):
        open_store.settle(AssignmentId("none"), AssignmentState.FAILED, "", NOW)


def test_publishing_merges_expires_and_closes_in_one_step(open_store: Store) -> None:
    admit(open_store, ONE)
    publish(open_store, ONE)
    assert states(open_store) == [AssignmentState.MERGED, AssignmentState.EXPIRED]
    assert open_store.current_round(RUN) is None
    assert open_store.rounds(RUN)[0].published_at == NOW + 9
    assert open_store.revision(RUN) == make_revision(1) == open_store.revision(RUN, 1)
    assert [it.manifest.number for it in open_store.revisions(RUN)] == [0, 1]
    assert open_store.run(RUN).state is RunState.RUNNING
    assert open_store.rounds_contributed(CLIENT) == 1
    assert open_store.rounds_contributed(ClientId("client-2")) == 0


def test_a_delta_admitted_after_the_merge_began_is_not_lost(open_store: Store) -> None:
    admit(open_store, ONE)
    admit(open_store, TWO)
    with pytest.raises(ConflictError, match="other deltas"):
        publish(open_store, ONE)
    assert states(open_store) == [AssignmentState.ADMITTED, AssignmentState.ADMITTED]
    assert open_store.revision(RUN) == make_revision()
    publish(open_store, TWO, ONE)
    assert states(open_store) == [AssignmentState.MERGED, AssignmentState.MERGED]


def test_a_round_is_published_once_and_takes_nothing_afterwards(open_store: Store) -> None:
    publish(open_store)
    for late in (
        lambda: publish(open_store),
        lambda: open_store.extend_round(
            RUN, 1, deadline_at=NOW, draws=1, assignments=[], expire=[], now=NOW
        ),
    ):
        with pytest.raises(ConflictError, match="is published"):
            late()
    with pytest.raises(ConflictError, match="expired already"):
        admit(open_store, ONE)
    with pytest.raises(NotFoundError):
        publish(open_store, round_number=2)


def test_a_piece_is_merged_once_whatever_is_tried(open_store: Store) -> None:
    admit(open_store, ONE)
    admit(open_store, TWO)
    publish(open_store, ONE, TWO)
    open_store.open_round(make_round(2), [])
    with pytest.raises(ConflictError, match="do not allow"):
        publish(open_store, ONE, round_number=2)
    assert [it.manifest.number for it in open_store.revisions(RUN)] == [0, 1]


def test_work_outlives_its_round_until_it_is_let_go(open_store: Store) -> None:
    admit(open_store, ONE)
    publication = Publication(make_revision(1), [], [ONE], [], True, False)
    open_store.publish(publication, 1, NOW + 9)
    assert open_store.busy_clients() == {"client-2"}
    assert [it.assignment_id for it in open_store.pending_slices(RUN)] == [TWO]
    still = open_store.open_assignment(ClientId("client-2"))
    assert still is not None
    assert still.assignment_id == TWO
    assert open_store.dismiss(RUN, "stopped", NOW + 10) == 1
    assert open_store.open_assignment(ClientId("client-2")) is None


def test_what_waits_of_a_delta_is_what_was_not_merged(open_store: Store) -> None:
    admit(open_store, ONE)
    [waiting] = open_store.waiting_deltas(RUN)
    assert waiting.pieces == ("layers.1", "layers.3", HEAD)
    assert (waiting.assignment_id, waiting.admitted_at) == (ONE, NOW + 5)
    merges = [MergeRecord(ONE, HEAD, RunId(RUN), 1, 1.0, 0)]
    open_store.publish(Publication(make_revision(1), merges, [], [], False, False), 1, NOW + 9)
    [waiting] = open_store.waiting_deltas(RUN)
    assert waiting.pieces == ("layers.1", "layers.3")


def test_progress_tells_who_is_silent_and_awaits_nobody_who_said_goodbye(
    open_store: Store,
) -> None:
    assert open_store.progress(RUN, NOW, 1) == Progress(admitted=0, at_work=2, silent=0)
    assert open_store.progress(RUN, NOW + 1, 1) == Progress(admitted=0, at_work=0, silent=2)
    open_store.set_offline(CLIENT, NOW)
    assert open_store.silent(RUN, 1, NOW) == [ONE]
    admit(open_store, TWO)
    assert open_store.progress(RUN, NOW) == Progress(admitted=1, at_work=0, silent=0)
    assert open_store.contributors(RUN, 1) == {"client-2"}


def test_idle_is_who_is_there_has_no_work_and_may_do_some(open_store: Store) -> None:
    assert not open_store.has_idle_client(RUN, NOW)
    open_store.add_client(make_client("client-3"), make_digest("client-3"))
    assert open_store.has_idle_client(RUN, NOW)
    assert not open_store.has_idle_client(RUN, NOW + 1)
    open_store.rejoin(ClientId("client-3"), make_profile(), "another run", NOW + 2)
    assert not open_store.has_idle_client(RUN, NOW)
    assert open_store.has_idle_client("another run", NOW)


def test_setbacks_count_from_the_last_delivery(open_store: Store) -> None:
    open_store.settle(ONE, AssignmentState.FAILED, "no memory", NOW + 1)
    [setback] = open_store.setbacks(RUN).values()
    assert setback == Setback(CLIENT, 1, NOW + 1, "no memory")
    more = [make_assignment(f"more-{number}") for number in range(3)]
    open_store.extend_round(RUN, 1, deadline_at=NOW, draws=2, assignments=more, expire=[], now=NOW)
    for number, assignment in enumerate(more):
        open_store.settle(
            assignment.assignment_id, AssignmentState.FAILED, f"fault {number}", NOW + 2 + number
        )
    setback = open_store.setbacks(RUN)[CLIENT]
    assert (setback.failures, setback.failed_at, setback.detail) == (4, NOW + 4, "fault 2")
    assert setback.rests_until == NOW + 4 + 40
    assert open_store.setbacks(RUN, CLIENT) == {CLIENT: setback}
    assert open_store.setbacks(RUN, ClientId("client-2")) == {}
    last = make_assignment("last")
    open_store.extend_round(
        RUN, 1, deadline_at=NOW, draws=3, assignments=[last], expire=[], now=NOW
    )
    admit(open_store, last.assignment_id)
    assert open_store.setbacks(RUN) == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [(RunState.PAUSED, RunState.FINISHED), (RunState.STOPPED, RunState.STOPPED)],
)
def test_the_last_round_finishes_a_run_that_was_not_stopped(
    open_store: Store, before: RunState, after: RunState
) -> None:
    open_store.set_run_state(RUN, before, {RunState.RUNNING})
    publish(open_store, finishes_run=True)
    assert open_store.run(RUN).state is after


def test_an_announced_upload_is_found_again_by_its_content(open_store: Store) -> None:
    open_store.add_upload(make_upload())
    assert open_store.upload(UploadId("upload-1")) == make_upload()
    assert open_store.upload_for(ONE, make_delta(ONE).sha256) == make_upload()
    assert open_store.upload_for(ONE, "0" * 64) is None
    assert open_store.uploads_of(TWO) == []
    with pytest.raises(ConflictError):
        open_store.add_upload(make_upload("upload-2", "no-assignment"))
    for _ in range(2):
        open_store.remove_upload(UploadId("upload-1"))
    with pytest.raises(NotFoundError):
        open_store.upload(UploadId("upload-1"))


def test_an_evaluation_replaces_the_one_before(store: Store) -> None:
    assert not store.has_evaluation(CLIENT, RUN, 0)
    store.add_evaluation(CLIENT, make_evaluation())
    store.add_evaluation(CLIENT, make_evaluation(num_correct=15))
    assert store.has_evaluation(CLIENT, RUN, 0)
    [record] = store.evaluations(RUN)
    assert (record.client_id, record.evaluation.num_correct) == (CLIENT, 15)
    with pytest.raises(NotFoundError, match="revision 3"):
        store.add_evaluation(CLIENT, make_evaluation(3))
    with pytest.raises(ConflictError):
        store.add_evaluation(ClientId("nobody"), make_evaluation())


def test_a_history_holds_everything_of_a_run(open_store: Store) -> None:
    open_store.add_evaluation(CLIENT, make_evaluation())
    history = open_store.run_history(RUN)
    assert history.run == make_run()
    assert history.model.spec == make_model_spec()
    assert history.revisions == [make_revision()]
    assert history.rounds == [make_round()]
    assert [it.assignment_id for it in history.assignments] == [ONE, TWO]
    assert len(history.evaluations) == 1
    assert len(history.clients) == 2
    with pytest.raises(NotFoundError):
        open_store.run_history("other")
