"""Documents and programs agree: commands, files and links that are named exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "fedra_edge/protocol/*.md", "sdk_examples/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip
COMMANDS = {
    "fedra_edge": [
        "join", "profile", "status", "rotate-key", "leave", "evaluate", "predict", "version",
    ],
    "fedra_server": [
        "init", "serve", "export", "audit", "prune", "version",
        "model add", "model list", "model show", "client list", "client remove", "audit log",
        "operator add", "token create", "token list", "token revoke",
        "run create", "run start", "run pause", "run stop", "run status", "run list", "run plan",
        "quarantine list", "quarantine show", "quarantine release", "quarantine discard",
    ],
}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_and_modules_that_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"`((?:tests|fedra_edge|fedra_server|sdk_examples)/[\w./]+)`", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_single_tests_that_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(tests/[\w./]+)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


GOALS = [
    "install", "demo", "test", "check", "format", "bench", "fuzz", "sbom", "audit-dependencies",
]  # fmt: skip


@pytest.mark.parametrize("goal", GOALS)
def test_make_goals_that_documents_name_exist(goal: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", goal], cwd=ROOT, capture_output=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "command"),
    [(package, command) for package, commands in COMMANDS.items() for command in commands],
)
def test_every_command_has_help_with_an_example(package: str, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", package, *command.split(), "--help"],
        capture_output=True, check=True, encoding="utf-8", cwd=ROOT,
    )  # fmt: skip
    assert "Example" in done.stdout


def test_the_readme_maps_every_package_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in ("fedra_edge", "fedra_server"):
        for folder in (ROOT / package).iterdir():
            if folder.is_dir() and folder.name != "__pycache__":
                assert f"{folder.name}/" in text
