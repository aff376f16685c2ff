"""`fedra-edge predict`, run as a real process: what it writes and how it exits."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedra_edge.console import Pace
from fedra_edge.exit_codes import ExitCode
from fedra_server.exporting import export_revision
from tests.support.sites import write_folder
from tests.support.tiny_vit import ADAPTER, LABELS, TinyVit

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("FEDRA_")},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    tiny = TinyVit.register(directory)
    export_revision(tiny.spec, ADAPTER, tiny.revision, tiny.blobs, directory / "out")
    return directory / "out"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 images of which one is broken and one has a name that is no text."""
    images = write_folder(tmp_path / "images", seed=4).path / "test"
    (images / "nut" / "000.png").write_bytes(b"no image")
    (images / "nut" / "001.png").rename(images / "nut" / os.fsdecode(b"\xff.png"))
    return images


def predict(*arguments: str | Path) -> Done:
    command = [sys.executable, "-m", "fedra_edge", "predict", *map(str, arguments)]
    return subprocess.run(
        command, check=False, capture_output=True, encoding="utf-8", timeout=120, env=ENVIRONMENT
    )


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_rows_go_to_standard_output_and_nothing_else(exported: Path, images: Path) -> None:
    done = predict("--export", exported, "--data", images, "--top", "2")
    assert done.returncode == ExitCode.OK, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows[0]) == ["key", "label", "probability", "label_2", "probability_2"]
    assert len(rows) == 23
    assert rows[0]["key"] == "bolt/000.png"
    assert rows[14]["key"] == "nut/\\udcff.png"
    for row in rows:
        assert {row["label"], row["label_2"]} < set(LABELS)
        assert float(row["probability"]) >= float(row["probability_2"])
    assert "23 predicted, 1 skipped" in done.stderr
    assert "unreadable image: 1 (nut/000.png)" in done.stderr


def test_json_is_one_object_a_line(exported: Path, images: Path) -> None:
    done = predict("--export", exported, "--data", images, "--json", "--top", "3")
    assert done.returncode == ExitCode.OK, done.stderr
    *told, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last == {"event": "finished", "predicted": 23, "skipped": {"unreadable image": 1}}
    assert {line["event"] for line in told} == {"prediction"}
    assert told[0]["top"][0] == {"label": told[0]["label"], "probability": told[0]["probability"]}
    assert len(told[0]["top"]) == 3


def test_a_file_gets_what_standard_output_would(
    exported: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "told.csv"
    shown = predict("--export", exported, "--data", images)
    done = predict("--export", exported, "--data", images, "--output", out, "--memory", "1GB")
    assert done.returncode == ExitCode.OK, done.stderr
    assert done.stdout == ""
    assert [row["key"] for row in rows_of(out.read_text("utf-8"))] == [
        row["key"] for row in rows_of(shown.stdout)
    ]
    as_json = predict("--export", exported, "--data", images, "--output", out, "--json")
    assert json.loads(as_json.stdout)["predicted"] == 23
    assert len(out.read_text("utf-8").splitlines()) == 23


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        ({"--export": "images"}, ExitCode.CONFIGURATION, "no exported model"),
        ({"--data": "nothing"}, ExitCode.DATA, "does not exist"),
        ({"--data": "nut/000.png"}, ExitCode.DATA, "no example can be used: unreadable image"),
        ({"--output": "no/such/folder.csv"}, ExitCode.STORAGE, "cannot write"),
        ({"--memory": "much"}, ExitCode.CONFIGURATION, "--memory"),
        ({"--backend": "abacus"}, ExitCode.CONFIGURATION, "--backend"),
        ({"--top": "0"}, ExitCode.USAGE, "--top"),
    ],
)
def test_mistakes_are_told_with_their_exit_code(
    exported: Path, images: Path, options: dict[str, str], code: ExitCode, complaint: str
) -> None:
    paths = {name: str(images / options[name]) for name in {"--data", "--output"} & set(options)}
    given = {"--export": str(exported), "--data": str(images)} | options | paths
    done = predict(*(word for option in given.items() for word in option))
    assert done.returncode == code, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_ends_it_quietly(exported: Path, images: Path) -> None:
    arguments = ["--export", str(exported), "--data", str(images)]
    command = [sys.executable, "-m", "fedra_edge", "predict", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == ExitCode.UNEXPECTED
    assert told == b"loading the training runtime\n"


def test_signs_of_life_come_every_two_seconds() -> None:
    now, told = [0.0], list[str]()
    pace = Pace(told.append, clock=lambda: now[0])
    for now[0] in (0.5, 1.9, 2.0, 2.5, 3.9, 4.1, 9.0):
        pace.tell(str(now[0]))
    assert told == ["2.0", "4.1", "9.0"]
