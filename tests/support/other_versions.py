"""Copies of both packages that speak another version of the protocol, to run as processes."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("fedra_edge", "fedra_server")
_NEWS = '    news_of_{name}: tuple[str, ...] | None = ("unheard", "of")\n'
_TALKATIVE = {
    "deltas.py": ("DeltaManifest", "TrainingReport"),
    "devices.py": ("DeviceProfile", "BlockMemory", "Calibration"),
    "messages.py": (
        "EnrolRequest", "EnrolReceipt", "RejoinRequest", "ClientStatus", "Heartbeat",
        "HeartbeatReceipt", "UploadStatus", "DeltaReceipt", "Health",
    ),
    "problems.py": ("Problem",),
    "rounds.py": ("Train", "Wait", "Stop", "EvaluationTask", "Evaluation"),
    "slices.py": ("TrainingSpec", "RevisionManifest", "LayerRole", "SliceManifest"),
    "trust.py": ("Authority", "Challenge", "SessionRequest", "SessionReceipt", "KeyChange"),
}  # fmt: skip
"""Messages that a later version could add an optional field to."""


def speaking(version: str, directory: Path) -> Mapping[str, str]:
    """Copy both packages and let the copy speak a later version; give the environment for it.

    It adds a field of its own to every message.
    """
    for package in _PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / package, directory / package, ignore=ignored)
    protocol = directory / "fedra_edge" / "protocol"
    _replace(protocol / "version.py", r'(PROTOCOL_VERSION: Final = )"[^"]+"', rf'\1"{version}"')
    for file, messages in _TALKATIVE.items():
        for message in messages:
            _add_field(protocol / file, message)
    return {"PYTHONPATH": str(directory), "PYTHONSAFEPATH": "1"}


def _add_field(path: Path, message: str) -> None:
    source = path.read_text(encoding="utf-8")
    docstring = _class_in(source, message).body[0]
    assert isinstance(docstring, ast.Expr)
    assert docstring.end_lineno is not None
    lines = source.splitlines(keepends=True)
    lines.insert(docstring.end_lineno, "\n" + _NEWS.format(name=message.lower()))
    path.write_text("".join(lines), encoding="utf-8")


def _class_in(source: str, name: str) -> ast.ClassDef:
    [found] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return found


def _replace(path: Path, pattern: str, by: str) -> None:
    changed, count = re.subn(pattern, by, path.read_text(encoding="utf-8"))
    assert count == 1, f"{pattern} is {count} times in {path}"
    path.write_text(changed, encoding="utf-8")
