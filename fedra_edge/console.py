"""What fedra-edge shows: progress as lines, values as text or JSON, errors with their remedy."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from rich.console import Console

from fedra_edge.errors import FedraEdgeError
from fedra_edge.exit_codes import exit_code_of
from fedra_edge.progress import ClientProgress, Phase
from fedra_edge.protocol.plain_text import plain

_STEP_EVERY_S: Final = 2.0
_KILOBYTE: Final = 1000
_OF_A_ROUND: Final = frozenset({Phase.DOWNLOADING, Phase.TRAINING})


class Output:
    """Writes results to standard output and complaints to standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    def show(self, values: Mapping[str, Any]) -> None:
        """Show named values: one per line, or one JSON object."""
        if self._as_json:
            self._write_json(values)
            return
        labels = {name: _label(name) for name in values}
        width = max(map(len, labels.values()))
        for name, value in values.items():
            line = f"{labels[name]:<{width}}  {_readable(name, value)}"
            self._out.print(plain(line), markup=False)

    def fail(self, error: Exception) -> None:
        """Show an error and what to do about it."""
        remedy = error.remedy if isinstance(error, FedraEdgeError) else ""
        message = str(error) or type(error).__name__
        if self._as_json:
            code = exit_code_of(error)
            self._write_json({"event": "error", "code": code, "message": message, "remedy": remedy})
            return
        self._err.print(plain(f"error: {message}"), markup=False)
        if remedy:
            self._err.print(plain(f"  try: {remedy}"), markup=False)

    def note(self, text: str) -> None:
        """Say on standard error how a longer work goes on."""
        self._err.print(text, markup=False)

    def progress(self) -> Callable[[ClientProgress], None]:
        """Give a listener that shows a client's progress as it happens."""
        return ProgressLines(self._write_event if self._as_json else self._write_line)

    def _write_event(self, progress: ClientProgress) -> None:
        self._write_json({"event": "progress", **dataclasses.asdict(progress)})

    def _write_line(self, progress: ClientProgress) -> None:
        style = {Phase.FAILED: "red", Phase.PAUSED: "yellow"}.get(progress.phase)
        clock = time.strftime("%H:%M:%S")
        self._out.print(plain(f"{clock}  {_sentence(progress)}"), style=style, markup=False)

    def _write_json(self, values: Mapping[str, Any]) -> None:
        self._out.file.write(json.dumps(values) + "\n")
        self._out.file.flush()


class Pace:
    """Lets a sign of life through every two seconds."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._last_at = clock()

    def tell(self, text: str) -> None:
        """Write it, unless something was written a moment ago."""
        if self._clock() - self._last_at >= _STEP_EVERY_S:
            self._last_at = self._clock()
            self._write(text)


class ProgressLines:
    """Passes on what is worth a line: every new stage, and steps at a readable pace."""

    def __init__(
        self,
        write: Callable[[ClientProgress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._clock = clock
        self._last: ClientProgress | None = None
        self._last_at = 0.0

    def __call__(self, progress: ClientProgress) -> None:
        """Take note of a change."""
        now = self._clock()
        last = self._last
        is_new = last is None or (progress.phase, progress.detail, progress.round_number) != (
            last.phase,
            last.detail,
            last.round_number,
        )
        is_last_step = 0 < progress.steps_total == progress.steps_done
        is_steady = progress.phase is Phase.TRAINING or progress.transfer_bytes_total > 0
        is_due = is_steady and now - self._last_at >= _STEP_EVERY_S
        if is_new or is_due or (progress.phase is Phase.TRAINING and is_last_step):
            self._last, self._last_at = progress, now
            self._write(progress)


def _sentence(progress: ClientProgress) -> str:
    parts = [f"{progress.phase.value:<11}"]
    if progress.round_number is not None and progress.phase in _OF_A_ROUND:
        parts.append(f"round {progress.round_number}")
    if progress.phase is Phase.TRAINING and progress.steps_done:
        loss = "" if progress.loss is None else f", loss {progress.loss:.4f}"
        parts.append(f"step {progress.steps_done}/{progress.steps_total}{loss}")
    elif progress.detail:
        parts.append(progress.detail)
    if progress.transfer_bytes_total:
        done, total = progress.transfer_bytes_done, progress.transfer_bytes_total
        parts.append(f"{_size(done)} of {_size(total)}")
    return "  ".join(parts)


def _label(name: str) -> str:
    """Name a value without its unit, which stands behind the number."""
    return name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")


def _readable(name: str, value: object) -> str:
    match value:
        case None | "":
            return "any" if name == "run" else "none"
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return _number(name, value)
        case list() | tuple():
            return ", ".join(_readable("", item) for item in value) or "none"
        case dict():
            return ", ".join(f"{key}: {_readable(str(key), item)}" for key, item in value.items())
        case _:
            return str(value)


def _number(name: str, value: float) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return _size(value)
    if name.endswith("_s") and isinstance(value, float):
        return f"{value:.3g} s"
    if name == "accuracy" and isinstance(value, float):
        return f"{value:.1%}"
    return str(value)


def _size(size_bytes: int) -> str:
    """Write a number of bytes in powers of 1000, as the options take it."""
    amount = size_bytes / _KILOBYTE
    for unit in ("KB", "MB"):
        if amount < _KILOBYTE:
            return f"{amount:.1f} {unit}"
        amount /= _KILOBYTE
    return f"{amount:,.1f} GB"
