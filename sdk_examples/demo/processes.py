"""Starts real programs with a log file each, and makes sure that none outlives the demo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_STOP_S: Final = 20.0
_TAIL_LINES: Final = 15
_COMMAND_S: Final = 180.0


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class _Program:
    process: subprocess.Popen[bytes]
    log: Path


class Programs:
    """The programs that run in the background; leaving the ``with`` block ends them all."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._programs: dict[str, _Program] = {}

    def start(self, name: str, module: str, *arguments: object) -> Path:
        """Start ``python -m module`` with its output in a log, and give the log's path."""
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                _command(module, arguments),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
        self._programs[name] = _Program(process, log)
        return log

    def check(self) -> None:
        """Raise ``DemoError`` with the end of its log when a program has failed."""
        for name, program in self._programs.items():
            if code := program.process.poll():
                tail = read_text(program.log).splitlines()[-_TAIL_LINES:]
                told = "\n  ".join(tail) or "(no output)"
                raise DemoError(f"{name} ended with exit code {code}:\n  {told}")

    def has_ended(self, name: str) -> bool:
        """Tell whether a program ended by itself."""
        return self._programs[name].process.poll() is not None

    def stop(self) -> None:
        """Ask all programs to end, the youngest first, and kill those that do not."""
        for program in reversed(self._programs.values()):
            if program.process.poll() is None:
                program.process.terminate()
            try:
                program.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                program.process.kill()
                program.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def run_command(module: str, *arguments: object) -> str:
    """Run ``python -m module`` to its end and give what it printed.

    Raises:
        DemoError: It failed, or took far too long.
    """
    command = _command(module, arguments)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=_environment(),
            timeout=_COMMAND_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{' '.join(command)} did not end in {_COMMAND_S:.0f} s") from error
    if done.returncode:
        raise DemoError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def read_text(path: Path) -> str:
    """Read a log that may be in the middle of being written."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _command(module: str, arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _environment() -> Mapping[str, str]:
    """Give every program one thread, because eight of them share few cores."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FEDRA_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
