"""Files and functions stay small enough to read at once, and say what they are for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SOURCES = sorted(
    path for package in ("fedra_edge", "fedra_server", "sdk_examples")
    for path in (ROOT / package).rglob("*.py")
)  # fmt: skip
BANNED_NAMES = {"utils", "util", "common", "misc", "helpers"}
BANNED_SUFFIXES = ("Manager", "Handler", "Helper")


def test_there_are_sources() -> None:
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_is_small_and_says_its_responsibility(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the first line must say what the file is for"
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert path.stem not in BANNED_NAMES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first_line = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            length = (node.end_lineno or 0) - (first_line or 0)
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith(BANNED_SUFFIXES), node.name


def test_the_top_level_holds_nothing_unexpected() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    made = {"demo-output", "dist", "build"}
    assert folders - made == {"fedra_edge", "fedra_server", "sdk_examples", "tests"}
