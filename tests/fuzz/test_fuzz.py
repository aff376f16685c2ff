"""Every fuzz target for a few seconds, from seeds that are what they should be."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedra_edge.protocol.tensors import read_header
from fedra_edge.training.graph_checking import check_graph
from fedra_server.admission import check_delta
from tests.fuzz.seeding import CORPUS, SEEDS
from tests.fuzz.targets import DELTA_SHAPES, TARGETS, wire_type

ROOT = Path(__file__).parents[2]
SECONDS = 5
needs_atheris = pytest.mark.skipif(
    find_spec("atheris") is None, reason="atheris has no wheel for this platform"
)


def fuzz(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, f"-artifact_prefix={folder}/", *options],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=120,
    )


@needs_atheris
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_seconds_find_nothing(name: str, tmp_path: Path) -> None:
    done = fuzz(name, tmp_path, f"-max_total_time={SECONDS}")
    assert done.returncode == 0, done.stdout[-5000:]
    assert not list(tmp_path.iterdir())


@needs_atheris
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("defect-error", "IndexError"),
        ("defect-memory", "MemoryError"),
        ("defect-hang", "libFuzzer: timeout"),
    ],
)
def test_what_must_not_be_is_found(name: str, reason: str, tmp_path: Path) -> None:
    done = fuzz(name, tmp_path, "-max_total_time=60", "-timeout=5", "-seed=1")
    assert done.returncode != 0
    assert reason in done.stdout
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", TARGETS)
def test_every_stored_input_is_taken_or_refused(name: str) -> None:
    stored = sorted((CORPUS / name).iterdir())
    assert len(stored) >= 4
    for path in stored:
        TARGETS[name].run(path.read_bytes())


def test_honest_seeds_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "seed"
    for seed in SEEDS["tensors"]():
        path.write_bytes(seed)
        read_header(path)
    path.write_bytes(next(SEEDS["delta"]()))
    check_delta(path, DELTA_SHAPES)
    for seed in SEEDS["graphs"]():
        check_graph(seed, "block")
    for seed in SEEDS["wire"]():
        wire_type(seed).validate_json(seed[1:])
