"""Importing the packages is cheap: no training framework comes along, and no server library."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "transformers", "peft", "onnxruntime", "PIL", "sqlalchemy", "fastapi"}
SERVING = ["fedra_server.http.app", "fedra_server.coordinator", "fedra_server.cli"]


def modules_after(statement: str) -> set[str]:
    """Import in a fresh interpreter and name the top-level modules it loaded."""
    script = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize("package", ["fedra_edge", "fedra_server", "fedra_edge.cli"])
def test_importing_a_package_loads_no_framework(package: str) -> None:
    assert not modules_after(f"import {package}") & FRAMEWORKS


@pytest.mark.parametrize("module", SERVING)
def test_the_server_serves_without_a_training_framework(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert not loaded & {"torch", "transformers", "peft", "onnxruntime"}


def test_the_import_contract_names_every_module_of_the_edge_but_the_protocol() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = {
        module
        for contract in contracts["tool"]["importlinter"]["contracts"]
        if contract["source_modules"] == ["fedra_server"]
        for module in contract["forbidden_modules"]
    }
    there = {f"fedra_edge.{path.stem}" for path in (ROOT / "fedra_edge").glob("*.py")}
    there |= {f"fedra_edge.{path.parent.name}" for path in (ROOT / "fedra_edge").glob("*/*.py")}
    assert there - named == {"fedra_edge.__init__", "fedra_edge.protocol"}
