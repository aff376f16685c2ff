"""The README's commands and its Python, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.edges import wait_until
from tests.support.onnx_models import build_model, export_model
from tests.support.sites import write_folder
from tests.support.tiny_vit import build_vit

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOIN_STRING = "JOIN STRING"
"""What stands in the README for a line that is another one each time."""


def commands(section: int) -> list[list[str]]:
    """Give the words of each command in a shell block, counted from the part 'By hand' on."""
    by_hand = README.partition("## By hand")[2]
    blocks = re.findall(r"```sh\n(.*?)```", by_hand, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in blocks[section].splitlines()]
    return [words for words in lines if words and words[0] != "pip"]


class Desk:
    """The directory in which a newcomer types the commands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.join_string = ""
        self.running: list[subprocess.Popen[bytes]] = []

    def _argv(self, words: list[str]) -> list[str]:
        module = {"fedra-server": "fedra_server", "fedra-edge": "fedra_edge"}[words[0]]
        rest = [self.join_string if word == JOIN_STRING else word for word in words[1:]]
        return [sys.executable, "-m", module, *rest]

    def _environment(self) -> dict[str, str]:
        """Any free port, and homes inside the desk instead of the user's own."""
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "FEDRA_SERVER_PORT": "0",
            "FEDRA_EDGE_HOME": str(self.path / "edge-home"),
        }

    def run(self, words: list[str]) -> str:
        """Run a command to its end and give what it prints; ``> FILE`` keeps it as well."""
        words, file = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
        done = subprocess.run(
            self._argv(words), cwd=self.path, env=self._environment(), check=False,
            capture_output=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        if file is not None:
            (self.path / file).write_text(done.stdout, encoding="utf-8")
        return done.stdout

    def start(self, words: list[str]) -> None:
        """Run a command in the background."""
        log = self.path / f"{words[1]}-{len(self.running)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._argv(words), cwd=self.path, env=self._environment(),
                stdout=output, stderr=output,
            )  # fmt: skip
        self.running.append(process)

    def close(self) -> None:
        for process in self.running[::-1]:
            process.terminate()
            assert process.wait(30) == 0


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    build_vit().save_pretrained(tmp_path / "path" / "to" / "model")
    write_folder(tmp_path / "images", seed=1)
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def serve_and_join(desk: Desk) -> None:
    """Do what the README says at headquarters, and at three sites."""
    *prepare, serve = commands(0)
    for words in prepare:
        desk.run(words)
    desk.start(serve)
    place = desk.path / "hq" / "server.json"
    wait_until("the server listens", place.exists)

    invite, profile, join = commands(1)
    desk.join_string = desk.run(invite).strip()
    desk.run(profile)
    desk.start(join)
    second_site = [word.replace("plant-7", "plant-8") for word in join]
    desk.start([*second_site, "--home", "second-home"])

    copy, join_with_stick = commands(7)
    blobs, stick = copy[-2:]
    shutil.copytree(desk.path / blobs, desk.path / stick)
    desk.start(join_with_stick)


def take_the_result_home(desk: Desk) -> None:
    """Wait for the end of the run, audit it and use what it has made."""
    status, audit, export, evaluate, predict = commands(3)

    def is_over() -> bool:
        return bool(json.loads(desk.run([*status, "--json"]))["state"] == "finished")

    wait_until("the run is over", is_over, timeout_s=200)
    desk.run(status)
    desk.run(audit)
    desk.run(export)
    counts = json.loads(desk.run([*evaluate, "--json"]))
    assert counts["num_correct"] > counts["num_examples"] / 3
    desk.run(predict)
    rows = (desk.path / "told.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + len(list((desk.path / "images").rglob("*.png")))


def test_the_commands_by_hand_end_in_an_evaluated_adapter(desk: Desk) -> None:
    serve_and_join(desk)
    take_the_result_home(desk)
    for words in (*commands(2), *commands(8), *commands(9)):
        desk.run(words)

    [fuse], [add] = commands(4), commands(5)
    desk.run(fuse)
    assert (desk.path / "plain" / "model.onnx").is_file()
    export_model(build_model("mixer"), desk.path / "mixer.onnx", dynamo=False)
    desk.run(add)

    describe, promise, plan = commands(6)
    desk.run(describe)
    assert "predicted peak" in desk.run(promise)
    assert "to train on" in desk.run(plan)


def test_the_python_of_the_readme_runs(desk: Desk) -> None:
    snippet = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=desk.path, env=desk._environment(), check=False,
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("starting", "connecting", "waiting"))
