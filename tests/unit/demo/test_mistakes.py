"""Plain mistakes with the examples and the demo give a sentence, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NOWHERE = "http://127.0.0.1:9"


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


@pytest.mark.parametrize("name", ["join.py", "own_dataset.py", "plant_program.py", "cohort.py"])
def test_an_example_without_arguments_tells_its_usage(name: str) -> None:
    done = python(ROOT / "sdk_examples" / name)
    assert done.returncode != 0
    assert f"python {name} " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("join.py", (NOWHERE, "no-such-place")),
        ("own_dataset.py", (NOWHERE, "no-such-place")),
        ("plant_program.py", (NOWHERE, "no-such-place")),
        ("cohort.py", ("no-such-model", "no-such-place", "no-such-home")),
    ],
)
def test_a_wrong_path_is_named(name: str, arguments: tuple[str, ...]) -> None:
    done = python(ROOT / "sdk_examples" / name, *arguments)
    assert done.returncode != 0
    assert "no-such-place" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_demo_into_a_file_says_that_it_cannot(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = python("-m", "sdk_examples.demo", "--out", tmp_path / "file" / below)
    assert done.returncode == 1
    assert "cannot be used" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
