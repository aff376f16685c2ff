"""Follows the clients by the progress lines in their logs, which costs them and us nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Standing:
    """Where the cohort stands: the last revision that all clients evaluated, and its accuracy.

    ``revision`` is None before the first one.
    """

    clients_ready: int
    revision: int | None
    accuracy: float


class ClientLogs:
    """The logs of all clients, read on from where the last look ended.

    Args:
        logs: Each client's log, by name.
        held_out: How many images each client evaluates on, by name.
    """

    def __init__(self, logs: Mapping[str, Path], held_out: Mapping[str, int]) -> None:
        self._logs = logs
        self._held_out = held_out
        self._offsets = dict.fromkeys(logs, 0)
        self._right: dict[int, dict[str, float]] = {}
        self._ready: set[str] = set()
        self._details: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' names."""
        return tuple(self._logs)

    @property
    def details(self) -> Mapping[str, str]:
        """Why each client waited last."""
        return dict(self._details)

    def look(self) -> Standing:
        """Read what is new and give the present standing."""
        for name in self._logs:
            for event in self._new_events(name):
                self._note(name, event)
        complete = [
            number for number, right in self._right.items() if right.keys() == self._logs.keys()
        ]
        if not complete:
            return Standing(len(self._ready), None, 0.0)
        revision = max(complete)
        right = sum(self._right[revision].values())
        return Standing(len(self._ready), revision, right / sum(self._held_out.values()))

    def _note(self, name: str, event: Mapping[str, Any]) -> None:
        if event.get("phase") == "waiting":
            self._details[name] = event.get("detail", "")
        if event.get("client_id") is not None:
            self._ready.add(name)
        revision, accuracy = event.get("evaluated_revision"), event.get("accuracy")
        if revision is not None and accuracy is not None:
            self._right.setdefault(revision, {})[name] = accuracy * self._held_out[name]

    def _new_events(self, name: str) -> Iterator[Mapping[str, Any]]:
        with self._logs[name].open("rb") as file:
            file.seek(self._offsets[name])
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offsets[name] += len(whole)
        for line in whole.splitlines():
            if line.startswith(b'{"event": "progress"'):
                yield json.loads(line)
