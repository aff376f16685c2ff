"""The demo follows clients by their logs, also while a line is being written."""

from __future__ import annotations

import json
from pathlib import Path

from sdk_examples.demo.following import ClientLogs, Standing


def say(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(text)


def event(**fields: object) -> str:
    return json.dumps({"event": "progress", "client_id": "c", **fields}) + "\n"


def test_a_revision_counts_when_all_clients_evaluated_it(tmp_path: Path) -> None:
    logs = {name: tmp_path / name for name in ("a", "b")}
    for log in logs.values():
        log.touch()
    followed = ClientLogs(logs, {"a": 10, "b": 30})
    assert followed.look() == Standing(0, None, 0.0)
    say(logs["a"], "not JSON\n" + event(evaluated_revision=0, accuracy=0.5))
    line = event(evaluated_revision=0, accuracy=0.1)
    say(logs["b"], line[:20])
    assert followed.look() == Standing(1, None, 0.0)
    say(logs["b"], line[20:])
    assert followed.look() == Standing(2, 0, 0.2)


def test_why_a_client_waits_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "a"
    say(log, event(phase="waiting", detail="too small"))
    say(log, event(phase="training", detail="training layers 1, 2"))
    followed = ClientLogs({"a": log}, {"a": 1})
    followed.look()
    assert followed.details == {"a": "too small"}
