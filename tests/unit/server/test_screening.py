"""Deltas that screening holds back, what an operator decides, and layers that too few hold."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_edge.protocol.layers import HEAD
from fedra_server.auditing import AuditReport, audit
from fedra_server.cli.app import app
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.runs import AssignmentState, RunState
from fedra_server.screening import Outcome, Verdict
from fedra_server.storage.collecting import Collector
from fedra_server.storage.records import AssignmentRecord
from tests.support.builders import RUN
from tests.support.headless import Headless

DEADLINE_S = 100.0
MERGED, ADMITTED = AssignmentState.MERGED, AssignmentState.ADMITTED
QUARANTINED, DISCARDED = AssignmentState.QUARANTINED, AssignmentState.DISCARDED
HUGE = 1000.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Headless]:
    headless = Headless(tmp_path)
    yield headless
    headless.store.close()


def with_clients(server: Headless, count: int, **run: object) -> list[AssignmentRecord]:
    """Create a run and as many clients; give their work in the first round."""
    defaults = {
        "rounds": 50, "deadline_s": DEADLINE_S, "merge_weighting": "uniform",
        "min_participants": count,
    }  # fmt: skip
    server.create_run(RunState.RUNNING, **{**defaults, **run})
    clients = [server.enrol(f"client-{index}") for index in range(count)]
    server.coordinator.advance()
    return [work(server, client_id) for client_id in clients]


def work(server: Headless, client_id: ClientId) -> AssignmentRecord:
    assignment = server.store.open_assignment(client_id)
    assert assignment is not None
    return assignment


def play(server: Headless, given: list[AssignmentRecord], *fills: float) -> None:
    """Deliver deltas whose values are all the same."""
    for assignment, fill in zip(given, fills, strict=True):
        server.deliver(assignment, fill=fill)
    server.coordinator.advance()


def revision(server: Headless) -> int:
    return server.store.revision(RUN).manifest.number


def state(server: Headless, assignment: AssignmentRecord) -> AssignmentState:
    return server.store.assignment(assignment.assignment_id).state


def merged(server: Headless, number: int) -> set[tuple[AssignmentId, str]]:
    return {(it.assignment_id, it.piece) for it in server.store.merges(RUN, number)}


def audited(server: Headless) -> AuditReport:
    report = audit(server.store, server.blobs, server.home, run=RUN)
    assert report.is_clean, report
    return report


def test_a_huge_delta_is_quarantined_and_the_round_goes_on(server: Headless) -> None:
    *honest, hostile = given = with_clients(server, 4)
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    assert revision(server) == 1
    assert [state(server, it) for it in given] == [MERGED] * 3 + [QUARANTINED]
    assert {name for name, _ in merged(server, 1)} == {it.assignment_id for it in honest}
    held = server.store.held_screenings(RUN)
    assert {it.assignment_id for it in held} == {hostile.assignment_id}
    assert {it.piece for it in held} == {HEAD, *(f"layers.{it}" for it in range(4))}
    assert all("norm" in it.reason and it.scale < 1 for it in held)
    assert server.home.delta_file(hostile.assignment_id).exists()
    assert audited(server).runs[0].deltas == 4


def test_a_client_that_is_quarantined_again_rests_longer(server: Headless) -> None:
    given = with_clients(server, 4, min_participants=3)
    hostile = given[-1].client_id
    for failures in (1, 2, 3):
        play(server, given, 1.0, 1.1, 0.9, HUGE)
        setback = server.store.setbacks(RUN)[hostile]
        assert setback.failures == failures
        assert "quarantined" in setback.detail
        current = server.store.current_round(RUN)
        assert current is not None
        at_work = {it.client_id for it in server.store.assignments(RUN, current.number)}
        assert hostile not in at_work
        play(server, [work(server, it.client_id) for it in given[:-1]], 1.0, 1.0, 1.0)
        server.clock.time = setback.rests_until
        for assignment in given:
            server.store.touch(assignment.client_id, server.clock.now())
        play(server, [work(server, it.client_id) for it in given[:-1]], 1.0, 1.0, 1.0)
        given = [work(server, it.client_id) for it in given]


def test_a_long_delta_is_scaled_down_to_the_bound(server: Headless) -> None:
    given = with_clients(server, 4)
    play(server, given, 1.0, 1.0, 1.0, 5.0)
    rows = server.store.screenings_of(given[-1].assignment_id)
    assert {(it.verdict, it.scale) for it in rows} == {(Verdict.CLIPPED, 3 / 5)}
    scales = {it.scale for it in server.store.merges(RUN, 1)}
    assert scales == {1.0, 3 / 5}
    audited(server)


def test_what_an_operator_releases_merges_with_the_next_publication(server: Headless) -> None:
    given = with_clients(server, 4, max_staleness=3, min_participants=3)
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    hostile = given[-1].assignment_id
    released = server.store.release(hostile)
    assert {it.piece for it in released} == {HEAD, *(f"layers.{it}" for it in range(4))}
    assert state(server, given[-1]) is ADMITTED
    audited(server)
    server.store.touch(given[0].client_id, server.clock.now())
    play(server, [work(server, it.client_id) for it in given[:-1]], 1.0, 1.1, 0.9)
    assert (revision(server), state(server, given[-1])) == (2, MERGED)
    rows = {it.piece: it for it in server.store.merges(RUN, 2) if it.assignment_id == hostile}
    assert len(rows) == 5
    assert server.store.merged_in(hostile) == dict.fromkeys(rows, 2)
    server.home.config_file.write_text("")
    show = ["quarantine", "show", hostile, "--home", str(server.home.path)]
    shown = CliRunner().invoke(app, show).output
    assert "the delta is merged" in shown
    assert shown.count("revision 2") == len(rows)
    assert all(it.scale < 1 and it.staleness == 1 and it.weight < 1 for it in rows.values())
    outcomes = {it.outcome for it in server.store.screenings_of(hostile)}
    assert outcomes == {Outcome.RELEASED}
    audited(server)
    with pytest.raises(NotFoundError, match="nothing of delta"):
        server.store.release(hostile)


def test_what_is_too_stale_cannot_be_released_but_discarded(server: Headless) -> None:
    given = with_clients(server, 4)
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    hostile = given[-1].assignment_id
    with pytest.raises(ConflictError, match="merged 1 times since revision 0"):
        server.store.release(hostile)
    server.store.discard(hostile)
    assert state(server, given[-1]) is DISCARDED
    assert server.store.held_screenings() == []
    audited(server)
    with pytest.raises(NotFoundError):
        server.store.discard(hostile)


def test_what_was_discarded_goes_with_its_round(server: Headless) -> None:
    given = with_clients(server, 4, min_participants=3)
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    file = server.home.delta_file(given[-1].assignment_id)
    collector = Collector(server.store, server.blobs, server.home, server.clock)
    server.store.make_cut(RUN, 1)
    collector.collect()
    assert file.exists()
    server.store.discard(given[-1].assignment_id)
    collector.collect()
    assert not file.exists()
    audited(server)


def test_a_client_whose_receipt_was_lost_still_hears_that_its_delta_is_in(
    server: Headless,
) -> None:
    given = with_clients(server, 4)
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    receipt = server.deliver(given[-1], fill=HUGE)
    assert receipt.assignment_id == given[-1].assignment_id


def test_screening_can_be_off(server: Headless) -> None:
    given = with_clients(server, 4, screening={"enabled": False})
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    assert {state(server, it) for it in given} == {MERGED}
    assert server.store.held_screenings() == []
    audited(server)


@pytest.mark.parametrize("kind", ["fedavgm", "fedyogi"])
@pytest.mark.parametrize("merge", ["coordinate-median", "trimmed-mean", "norm-clipped-mean"])
def test_a_layer_that_too_few_hold_stays_as_it_is_to_the_bit(
    server: Headless, merge: str, kind: str
) -> None:
    """Its moments stay too; and every client may drop all of the others from its machine."""
    given = with_clients(
        server, 5, merge=merge, max_layers=2, trim_fraction=0.3, server_optimizer={"kind": kind}
    )
    before = server.store.revision(RUN)
    holders = [sum(layer in it.manifest.trained_layer_ids for it in given) for layer in range(4)]
    needed = server.store.run(RUN).spec.holders_needed
    assert sum(count >= needed for count in holders) == 10 // needed
    play(server, given, 1.0, 2.0, 3.0, 4.0, 5.0)
    after = server.store.revision(RUN)
    assert {state(server, it) for it in given} == {MERGED}
    for layer, count in enumerate(holders):
        is_merged = count >= needed
        assert (after.blobs[layer] != before.blobs[layer]) is is_merged
        assert (after.moments[layer] != before.moments[layer]) is is_merged
        assert after.versions[layer] == is_merged
    audited(server)


def test_a_buffered_layer_waits_until_enough_clients_hold_it(server: Headless) -> None:
    given = with_clients(
        server, 3, merge="coordinate-median", mode="buffered", buffer_size=3, max_layers=1
    )
    layers = {it.manifest.trained_layer_ids for it in given}
    assert len(layers) == 1, "the planner gives all three the same layer"
    play(server, given[:2], 1.0, 2.0)
    server.clock.time += 2 * DEADLINE_S
    server.coordinator.advance()
    assert revision(server) == 0
    play(server, given[2:], 3.0)
    assert revision(server) == 1
    audited(server)


def test_a_quick_client_has_one_say_in_a_median(server: Headless) -> None:
    quick, *others = with_clients(
        server, 3, merge="coordinate-median", mode="buffered", buffer_size=3
    )
    first = quick
    play(server, [quick], 5.0)
    for _ in range(3):
        quick = work(server, quick.client_id)
        play(server, [quick], 5.0)
    play(server, others, 1.0, 1.0)
    assert revision(server) == 1
    assert len({it for it, _ in merged(server, 1)}) == 3
    rows = server.store.screenings_of(first.assignment_id)
    assert server.store.waiting_deltas(RUN) == []
    assert {it.outcome for it in rows} <= {None, Outcome.LEFT}
    audited(server)


def test_an_absurd_claim_buys_no_weight(server: Headless) -> None:
    given = with_clients(server, 3, merge_weighting="num_examples")
    for assignment in given[:2]:
        server.deliver(assignment, fill=1.0)
    upload = server.announce(given[2], fill=1.0)
    claim = upload.delta.model_copy(update={"num_examples": 2**31})
    part = server.home.upload_part(upload.upload_id)
    server.coordinator.intake.admit(upload.__class__(**{**vars(upload), "delta": claim}), part)
    server.coordinator.advance()
    weights = sorted({it.weight for it in server.store.merges(RUN, 1)})
    assert weights == [100.0, 1000.0]
    audited(server)


def test_an_audit_finds_altered_measures_and_verdicts(server: Headless) -> None:
    given = with_clients(server, 4)
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    for statement, told in (
        ("UPDATE screenings SET norm = norm * 1.0000001 WHERE piece = 'head'", "its file gives"),
        ("UPDATE screenings SET verdict = 'accepted', reason = ''", "the rules give"),
        ("DELETE FROM screenings WHERE verdict = 'accepted'", "was not judged"),
    ):
        with server.store.writing() as connection:
            connection.exec_driver_sql(statement)
        details = [it.detail for it in audit(server.store, server.blobs, server.home).broken]
        assert any(told in detail for detail in details), details


def test_the_commands_list_show_release_and_discard(server: Headless) -> None:
    given = with_clients(server, 4, max_staleness=3)
    play(server, given, 1.0, 1.1, 0.9, HUGE)
    server.home.config_file.write_text("")
    home = ["--home", str(server.home.path)]
    hostile = given[-1].assignment_id
    runner = CliRunner()

    def told(*arguments: str) -> str:
        done = runner.invoke(app, ["quarantine", *arguments, *home])
        assert done.exit_code == 0, done.output
        return done.output

    listed = json.loads(told("list", "--json"))["deltas"]
    assert [it["delta"] for it in listed] == [hostile]
    assert listed[0]["client_id"] == given[-1].client_id
    assert f"{RUN} (running)" in told("list", RUN)
    assert "far above the median" in told("show", hostile)
    shown = json.loads(told("show", hostile, "--json"))
    assert {it["verdict"] for it in shown["pieces"]} == {"quarantined"}
    assert {it["merged_in"] for it in shown["pieces"]} == {None}
    assert (shown["run_state"], "since" in shown) == ("running", False)
    assert "Released" in told("release", hostile)
    assert "Nothing is quarantined" in told("list")
    assert state(server, given[-1]) is ADMITTED
    done = runner.invoke(app, ["quarantine", "discard", hostile, *home])
    assert isinstance(done.exception, NotFoundError)


def test_the_plan_says_which_layers_too_few_would_train(server: Headless) -> None:
    with_clients(server, 5, merge="coordinate-median", max_layers=2)
    server.home.config_file.write_text("heartbeat_timeout_s = 86400\n")
    for client in server.store.clients():
        server.store.touch(client.client_id, time.time())
    home = ["--home", str(server.home.path)]
    told = CliRunner().invoke(app, ["run", "plan", RUN, "--explain", *home]).output
    assert "coordinate-median needs 3 holders of a layer; layers" in told, told
    assert "the machines together train 10 layers, and 12 would do" in told
    shown = json.loads(CliRunner().invoke(app, ["run", "plan", RUN, "--json", *home]).output)
    assert shown["holders_needed"] == 3
    assert sum(count >= 3 for count in shown["coverage"]) == 3


def test_a_round_with_too_few_holders_goes_on_recruiting(server: Headless) -> None:
    given = with_clients(server, 3, merge="coordinate-median")
    play(server, given[:2], 1.0, 2.0)
    server.clock.time += 2 * DEADLINE_S
    server.coordinator.advance()
    assert revision(server) == 0
    play(server, given[2:], 3.0)
    assert revision(server) == 1
    audited(server)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--merge", "coordinate-median", "--min-participants", "2"], "--min-participants 3"),
        (["--merge", "coordinate-median", "--min-participants", "2"], "bear 1 attacker a layer"),
        (
            ["--merge", "trimmed-mean", "--mode", "buffered", "--buffer-size", "2"],
            "--buffer-size 5",
        ),
        (["--merge", "trimmed-mean", "--tolerate", "2", "--min-participants", "9"], "10 holders"),
        (["--trim-fraction", "0.1"], "--merge trimmed-mean"),
        (["--tolerate", "2"], "no use with --merge mean"),
        (["--no-screening", "--cosine-floor=-0.5"], "need --screening"),
        (["--no-screening", "--clip-factor", "2"], "needs --screening"),
    ],
)
def test_a_run_that_cannot_have_its_holders_is_refused_at_once(
    server: Headless, options: list[str], told: str
) -> None:
    server.create_run(RunState.CREATED)
    server.home.config_file.write_text("")
    model = server.store.model(server.store.run(RUN).model_id).spec.name
    create = ["run", "create", "other", "--model", model, "--home", str(server.home.path)]
    done = CliRunner().invoke(app, [*create, *options])
    assert done.exit_code == 2
    assert told in " ".join(done.output.replace("│", " ").split()), done.output


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ([], (2, 2)),
        (["--merge", "norm-clipped-mean"], (3, 2)),
        (["--merge", "trimmed-mean"], (5, 2)),
        (["--merge", "coordinate-median", "--tolerate", "2", "--mode", "buffered"], (5, 5)),
        (["--merge", "coordinate-median", "--min-participants", "7"], (7, 2)),
    ],
)
def test_a_merge_brings_the_numbers_that_it_needs(
    server: Headless, options: list[str], numbers: tuple[int, int]
) -> None:
    server.create_run(RunState.CREATED)
    server.home.config_file.write_text("")
    model = server.store.model(server.store.run(RUN).model_id).spec.name
    create = ["run", "create", "other", "--model", model, "--home", str(server.home.path)]
    done = CliRunner().invoke(app, [*create, *options])
    assert done.exit_code == 0, done.output
    spec = server.store.run("other").spec
    assert (spec.min_participants, spec.buffer_size) == numbers


def test_a_run_keeps_the_merge_that_it_was_created_with(server: Headless) -> None:
    server.create_run(RunState.CREATED)
    server.home.config_file.write_text("")
    model = server.store.model(server.store.run(RUN).model_id).spec.name
    create = ["run", "create", "other", "--model", model, "--home", str(server.home.path)]
    chosen = ["--merge", "norm-clipped-mean", "--tolerate", "2", "--min-participants", "5"]
    done = CliRunner().invoke(app, [*create, *chosen, "--quarantine-factor", "9"])
    assert done.exit_code == 0, done.output
    spec = server.store.run("other").spec
    assert (spec.merge, spec.tolerated_attackers) == ("norm-clipped-mean", 2)
    assert (spec.holders_needed, spec.clip_factor) == (5, 1.0)
    assert spec.screening.quarantine_factor == 9
