"""A model whose weight files are larger than a site's memory is tuned there and used there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import MODEL, Federation, running_federation
from tests.support.memory_groups import limited_group, why_no_groups
from tests.support.memory_limits import run_limited
from tests.support.sites import SiteData, write_folder
from tests.support.wide_vit import prepare_wide_home

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux"),
]

LIMIT_BYTES: Final = 420 * 10**6
CAP: Final = f"--memory={LIMIT_BYTES}"
NUM_LAYERS: Final = 28
INNER_SIZE: Final = 2**15
RUN = "large"
TRAINING = {"batch_size": 4, "max_steps": 4, "rank": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SiteData:
    return write_folder(tmp_path_factory.mktemp("data") / "site", seed=6)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    place = tmp_path_factory.mktemp("large")
    prepared = prepare_wide_home(place, NUM_LAYERS, INNER_SIZE)
    with running_federation(place / "server", prepared) as federation:
        yield federation


@pytest.fixture
def launcher() -> Iterator[tuple[str, ...]]:
    """Give what starts a process under the limit; nothing where only the site's own cap is left."""
    if why_no_groups():
        yield ()
        return
    with limited_group(LIMIT_BYTES) as group:
        yield group.launcher
        assert group.kills == 0


def tune(federation: Federation, site: EdgeSite) -> None:
    """Let a client tune the model for a round and judge the result."""
    federation.have_running([site])
    federation.start_run(RUN, depth="full", rounds=1, min_participants=1, **TRAINING)
    federation.wait_for_rounds(RUN, 1)
    wait_until("an evaluation", lambda: revisions_evaluated(federation) == [0, 1])
    assert site.client.ask_to_stop() == 0


def revisions_evaluated(federation: Federation) -> list[int]:
    return [it.revision for it in federation.report(RUN).accuracy if it.sites]


def test_a_model_larger_than_memory_is_tuned_and_used(
    federation: Federation, data: SiteData, launcher: tuple[str, ...], tmp_path: Path
) -> None:
    spec = federation.store.model_by_name(MODEL).spec
    pieces = (spec.stem, *spec.layers, spec.head)
    assert sum(piece.weights.size_bytes for piece in pieces) > LIMIT_BYTES
    site = federation.add_site("small", data.path, tmp_path, CAP, poll_s="2", heartbeat_s="0.5")
    site.launcher = launcher
    tune(federation, site)

    assignment = federation.assignments(RUN)["small"]
    assert assignment.delta is not None
    report = assignment.delta.report
    assert len(assignment.manifest.trained_layer_ids) == NUM_LAYERS
    assert report.residency == "streamed"
    assert report.peak_memory_bytes <= min(LIMIT_BYTES, 1.05 * report.predicted_peak_bytes)
    federation.check_merge(RUN, 1)

    export = tmp_path / "tuned"
    federation.operate("export", "--run", RUN, "--out", str(export))
    assert (export / "base" / "model.safetensors").stat().st_size > LIMIT_BYTES
    done = run_limited(
        "evaluate", "--export", export, "--data", data.path, CAP, "--json", launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    [judged] = federation.operate("run", "status", RUN)["accuracy"][-1]["sites"].values()
    assert (told["num_correct"], told["num_examples"]) == (
        judged["num_correct"],
        len(data.held_out),
    )
