"""A run's report: counted from merged work, summed over sites, stable as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_server.cli.run_status import tell_report
from fedra_server.reporting import report_run
from fedra_server.rounds import Setback, WaitingDelta
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.histories import RunHistory
from fedra_server.storage.progress import MergeSummary
from fedra_server.storage.records import EvaluationRecord, ModelRecord
from tests.support.builders import (
    NOW,
    make_assignment,
    make_calibration,
    make_client,
    make_delta,
    make_evaluation,
    make_model_spec,
    make_profile,
    make_revision,
    make_round,
    make_run,
    make_training_report,
)

ONE, TWO, THREE = (ClientId(f"client-{number}") for number in (1, 2, 3))
MERGED, EXPIRED = AssignmentState.MERGED, AssignmentState.EXPIRED


def layers(*trained: int) -> list[dict[str, object]]:
    return [{"layer_id": index, "role": "train"} for index in trained]


def make_history() -> RunHistory:
    """Give a run with two published rounds and an open one; client 3 took no part."""
    first = make_assignment("a1", ONE, state=MERGED, layers=layers(0, 1), depth="reduced")
    heavy = make_training_report(
        last_loss=3.0, peak_memory_bytes=900, bytes_sent=5, bytes_received=7
    )
    second = replace(
        make_assignment("a2", ONE, round_number=2, state=MERGED, layers=layers(1, 2)),
        delta=make_delta("a2", num_examples=300, report=heavy),
    )
    assignments = [
        first,
        make_assignment("b1", TWO, state=EXPIRED, layers=layers(3)),
        second,
        make_assignment("b2", TWO, round_number=2, state=MERGED, layers=layers(1)),
        make_assignment("b3", TWO, round_number=3, layers=layers(0, 3)),
    ]
    spec = make_model_spec()
    evaluations = [
        (ONE, make_evaluation(2, num_examples=30, num_correct=27, loss_sum=3.0)),
        (ONE, make_evaluation(0)),
        (TWO, make_evaluation(2, num_examples=10, num_correct=5, loss_sum=9.0)),
    ]
    return RunHistory(
        run=make_run(),
        model=ModelRecord(spec.model_id, spec, NOW),
        revisions=[make_revision(number) for number in range(3)],
        rounds=[
            replace(make_round(1), published_at=NOW + 10),
            replace(make_round(2), published_at=NOW + 20),
            make_round(3),
        ],
        assignments=assignments,
        evaluations=[EvaluationRecord(client, evaluation) for client, evaluation in evaluations],
        clients=[make_client(client) for client in (ONE, TWO, THREE)],
        calibrations={client: make_calibration(spec) for client in (ONE, TWO)},
        busy_elsewhere=frozenset(),
        merges=[
            MergeSummary(1, "head", 1, 0, 0),
            MergeSummary(1, "layers.0", 1, 0, 0),
            MergeSummary(1, "layers.1", 1, 0, 0),
            MergeSummary(2, "head", 2, 1, 1),
            MergeSummary(2, "layers.1", 2, 2, 2),
            MergeSummary(2, "layers.2", 1, 2, 2),
        ],
        merged_in={AssignmentId("a1"): 1, AssignmentId("a2"): 2, AssignmentId("b2"): 2},
        waiting=[
            WaitingDelta(AssignmentId("b3"), 2, ("layers.0", "head"), 10, 0.5, "", NOW + 30, ONE),
            WaitingDelta(AssignmentId("b4"), 2, ("layers.0",), 10, 0.5, "", NOW + 25, TWO),
        ],
        setbacks={TWO: Setback(TWO, 3, NOW, "no memory")},
    )


def test_coverage_counts_how_often_each_layer_was_trained_and_merged() -> None:
    report = report_run(make_history())
    assert report.coverage == (1, 3, 1, 0)
    assert [it.coverage for it in report.rounds] == [(1, 1, 0, 0), (0, 2, 1, 0)]
    assert [(it.participants, it.merged) for it in report.rounds] == [(2, 1), (2, 2)]
    assert (report.rounds_published, report.revision, report.num_layers) == (2, 2, 4)


def test_staleness_is_told_of_all_merged_pieces() -> None:
    first, second = report_run(make_history()).rounds
    assert (first.mean_staleness, first.max_staleness) == (0.0, 0)
    assert (second.mean_staleness, second.max_staleness) == (1.0, 2)


def test_what_waits_for_each_piece_is_told_with_its_age() -> None:
    buffer = report_run(make_history()).buffer
    assert [(it.piece, it.deltas, it.oldest_at) for it in buffer] == [
        ("head", 1, NOW + 30),
        ("layers.0", 2, NOW + 25),
    ]


def test_who_rests_is_told_until_when_and_why() -> None:
    [resting] = report_run(make_history(), now=NOW + 19).resting
    assert (resting.client_id, resting.failures) == (TWO, 3)
    assert (resting.until_at, resting.reason) == (NOW + 20, "no memory")
    assert report_run(make_history(), now=NOW + 20).resting == ()


def test_a_rounds_loss_is_weighted_by_examples() -> None:
    first, second = report_run(make_history()).rounds
    assert first.mean_loss == pytest.approx(1.0)
    assert second.num_examples == 400
    assert second.mean_loss == pytest.approx((300 * 3.0 + 100 * 1.0) / 400)


def test_the_open_round_shows_each_participants_work() -> None:
    current = report_run(make_history()).round
    assert current is not None
    assert (current.number, current.base_revision) == (3, 2)
    [participant] = current.participants
    assert participant.name == "plant client-2"
    assert participant.trained_layer_ids == (0, 3)
    assert participant.state is AssignmentState.PENDING
    assert participant.reason == "fits in 4 GB"


def reasons(history: RunHistory, seen_since: float = 0.0) -> dict[str, str]:
    waiting = report_run(history, seen_since).waiting
    return {it.name.removeprefix("plant "): it.reason for it in waiting}


def test_who_is_online_without_a_part_in_the_round_is_named_with_the_reason() -> None:
    history = make_history()
    assert reasons(history) == {ONE: "ready", THREE: "not calibrated yet"}
    between = replace(history, rounds=history.rounds[:2], assignments=history.assignments[:4])
    assert reasons(between) == {ONE: "ready", TWO: "ready", THREE: "not calibrated yet"}
    busy = replace(between, busy_elsewhere=frozenset({TWO}))
    assert reasons(busy)[TWO] == "at work for another run"
    small = replace(make_client(ONE), profile=make_profile(memory_bytes=1))
    assert "needs" in reasons(replace(between, clients=[small]))[ONE]


def test_only_members_of_a_running_run_that_are_there_wait_for_it() -> None:
    history = make_history()
    assert reasons(history, seen_since=NOW + 1) == {}
    paused = replace(history.run, state=RunState.PAUSED)
    assert reasons(replace(history, run=paused)) == {}
    away = [
        replace(make_client(ONE), is_online=False),
        replace(make_client(ONE), has_left=True),
        replace(make_client(ONE), run="other"),
    ]
    assert reasons(replace(history, clients=[*away, make_client(TWO)])) == {}


def test_accuracy_is_pooled_over_the_examples_of_all_sites() -> None:
    base, latest = report_run(make_history()).accuracy
    assert (base.revision, base.pooled.accuracy, base.pooled.mean_loss) == (0, 0.5, 1.5)
    assert latest.pooled.accuracy == pytest.approx(32 / 40)
    assert latest.pooled.mean_loss == pytest.approx(12 / 40)
    assert {client: it.accuracy for client, it in latest.sites.items()} == {ONE: 0.9, TWO: 0.5}


def test_costs_are_summed_per_client_and_memory_is_the_highest() -> None:
    one, two = report_run(make_history()).clients
    usual = make_training_report()
    assert one.client_id == ONE
    assert (one.rounds_merged, one.layers_trained, one.num_examples) == (2, 4, 400)
    assert one.bytes_sent == usual.bytes_sent + 5
    assert one.bytes_received == usual.bytes_received + 7
    assert one.peak_memory_bytes == usual.peak_memory_bytes
    assert one.train_s == pytest.approx(2 * usual.train_s)
    assert (two.rounds_merged, two.bytes_sent) == (1, usual.bytes_sent)


def shrunken(history: RunHistory) -> RunHistory:
    """Let the second client's latest delta, of the open round, have had to shrink."""
    report = make_training_report(
        residency="streamed",
        micro_batch=4,
        step_downs=("resident, 8 at once -> streamed, 4 at once: only 400 MB can be used now",),
    )
    *others, latest = history.assignments
    admitted = replace(
        latest, state=AssignmentState.ADMITTED, delta=make_delta("b3", report=report)
    )
    return replace(history, assignments=[admitted, *others])


def test_the_latest_delta_shows_what_was_promised_and_what_it_took() -> None:
    one, two = report_run(shrunken(make_history())).clients
    assert one.last_delta is not None
    assert (one.last_delta.round_number, one.last_delta.peak_memory_bytes) == (2, 900)
    assert two.last_delta is not None
    assert (two.last_delta.round_number, two.last_delta.residency) == (3, "streamed")
    assert two.last_delta.micro_batch == 4
    assert two.last_delta.predicted_peak_bytes == make_training_report().predicted_peak_bytes
    assert "only 400 MB" in two.last_delta.step_downs[0]


def test_people_see_promise_and_peak_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    tell_report(report_run(shrunken(make_history())))
    told = capsys.readouterr().out.partition("Latest deltas")[2]
    head, one, two = told.strip().splitlines()
    assert head.split("  ")[-1] == "STEPPED DOWN"
    assert one.split()[-5:] == ["110.0", "MB", "900", "B", "no"]
    assert "streamed   4        110.0 MB  100.0 MB     resident, 8 at once -> streamed" in two


def test_a_run_that_has_not_begun_has_an_empty_report() -> None:
    history = replace(
        make_history(), rounds=[], assignments=[], evaluations=[], revisions=[make_revision()]
    )
    report = report_run(history)
    assert (report.revision, report.coverage, report.round) == (0, (0, 0, 0, 0), None)
    assert (report.rounds, report.accuracy, report.clients) == ((), (), ())


def test_the_json_form_has_exactly_the_documented_fields() -> None:
    report = json.loads(report_run(make_history()).model_dump_json())
    assert set(report) == {
        "run", "state", "model", "spec", "num_layers", "rounds_planned", "rounds_published",
        "revision", "round", "buffer", "resting", "waiting", "coverage", "rounds", "accuracy",
        "clients",
    }  # fmt: skip
    assert set(report["round"]["participants"][0]) == {
        "client_id", "name", "round_number", "state", "trained_layer_ids", "depth", "residency",
        "micro_batch", "steps", "predicted_peak_bytes", "reason", "detail",
    }  # fmt: skip
    assert set(report["rounds"][0]) == {
        "number", "published_at", "coverage", "participants", "merged", "num_examples",
        "mean_loss", "mean_staleness", "max_staleness",
    }  # fmt: skip
    assert set(report["buffer"][0]) == {"piece", "deltas", "oldest_at"}
    resting = json.loads(report_run(make_history(), now=NOW).model_dump_json())["resting"]
    assert set(resting[0]) == {"client_id", "name", "failures", "until_at", "reason"}
    assert set(report["accuracy"][0]["pooled"]) == {
        "num_examples", "num_correct", "accuracy", "mean_loss",
    }  # fmt: skip
    assert set(report["clients"][0]) == {
        "client_id", "name", "has_left", "rounds_merged", "layers_trained", "num_examples",
        "bytes_received", "bytes_sent", "peak_memory_bytes", "predicted_peak_bytes", "train_s",
        "last_delta",
    }  # fmt: skip
    assert set(report["clients"][0]["last_delta"]) == {
        "round_number", "residency", "micro_batch", "predicted_peak_bytes", "peak_memory_bytes",
        "step_downs",
    }  # fmt: skip
