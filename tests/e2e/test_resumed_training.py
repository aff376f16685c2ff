"""A client that loses power or is stopped amid training goes on where it was, to the same bits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedra_server.runs import AssignmentState
from tests.support.edges import EdgeProcess, EdgeSite, Event, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

STEPS = 1500
WORK = {"seed": 5, "rounds": 1, "min_participants": 1, "batch_size": 6, "local_epochs": 1000,
        "max_steps": STEPS}  # fmt: skip
GOING_ON = re.compile(rf"going on from a checkpoint, after step (\d+) of {STEPS}")


def steps_shown(client: EdgeProcess) -> list[int]:
    """Give the steps of which the client told, in order; it does not tell of each."""
    return [event["steps_done"] for event in client.events if is_amid_training(event)]


def is_amid_training(event: Event) -> bool:
    return event.get("phase") == "training" and event["steps_done"] > 0


def delta_of(federation: Federation, run: str) -> bytes:
    """Give the bytes of the only delta of a run, which must be merged."""
    [record] = federation.store.assignments(run)
    assert record.state is AssignmentState.MERGED
    return federation.home.delta_file(record.assignment_id).read_bytes()


def checkpoints(site: EdgeSite) -> list[Path]:
    return list(site.config.checkpoints.glob("*.safetensors"))


def test_a_training_survives_a_power_cut_and_a_stop(prepared_home: Path, tmp_path: Path) -> None:
    with running_federation(tmp_path / "home", prepared_home) as federation:
        data = write_folder(tmp_path / "data", 0).path
        site = federation.add_site("site", data, tmp_path, "--verbose", backend="torch")
        federation.have_running([site])
        federation.start_run("disturbed", **WORK)
        wait_until("a checkpoint", lambda: checkpoints(site))
        site.client.kill()
        assert site.deltas_waiting == 0

        stopped = site.join()
        stopped.wait_for("training that goes on", is_amid_training)
        assert stopped.ask_to_stop() == 0
        assert len(checkpoints(site)) == 1

        last = site.join()
        federation.wait_for_rounds("disturbed", 1)
        federation.check_merge("disturbed", 1)
        wait_until("an empty outbox", lambda: site.deltas_waiting == 0)
        assert checkpoints(site) == []

        after_cut, after_stop = map(int, GOING_ON.findall(site.complaints()))
        assert 0 < after_cut < steps_shown(stopped)[0]
        assert after_stop >= steps_shown(stopped)[-1]
        assert steps_shown(last)[0] > after_stop

        federation.start_run("undisturbed", **WORK)
        federation.wait_for_rounds("undisturbed", 1)
        assert delta_of(federation, "disturbed") == delta_of(federation, "undisturbed")
        assert len(GOING_ON.findall(site.complaints())) == 2
