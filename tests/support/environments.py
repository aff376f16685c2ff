"""Virtual environments as sites make them, from pyproject's extras and the pinned versions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_PLACE: Final = ROOT / ".cache" / "environments"
_MADE: Final = "made"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds some extras of this checkout, and no installer."""

    directory: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def size_bytes(self) -> int:
        """What its files occupy, compiled modules included."""
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files if not path.is_symlink())

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run its interpreter to the end."""
        return subprocess.run(
            [self.python, *arguments], check=False, capture_output=True, encoding="utf-8"
        )


def environment(*extras: str) -> Environment:
    """Give an environment with these extras; it is made once for what pyproject asks for.

    An environment of a torch-free client is ready in half a minute, if pip has the files at hand.
    """
    directory = _PLACE / _recipe() / ("-".join(extras) or "core")
    if not (directory / _MADE).exists():
        _forget_all_but(directory.parent)
        shutil.rmtree(directory, ignore_errors=True)
        venv.create(directory, with_pip=False, symlinks=os.name != "nt")
        _install(Environment(directory), extras)
        (directory / _MADE).touch()
    return Environment(directory)


def _recipe() -> str:
    """Name what the content of environments follows from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    told = json.dumps([project, pins, sys.version], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _forget_all_but(kept: Path) -> None:
    for old in _PLACE.glob("*"):
        if old != kept:
            shutil.rmtree(old)


def _install(made: Environment, extras: tuple[str, ...]) -> None:
    wanted = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    command = [
        sys.executable, "-m", "pip", "--python", str(made.python), "install", "--quiet",
        "--constraint", str(ROOT / "constraints.txt"), "--editable", wanted,
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
