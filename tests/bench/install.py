"""What installing fedra takes on the disk, by extra.

Each extra is installed into an environment of its own with the pinned versions, without the
installer. ``python -m tests.bench.install [--json]``
"""

from __future__ import annotations

from tests.bench.rows import Row, print_rows
from tests.support.environments import environment

_MEGABYTE = 10**6
_ROLES = {
    "a client without PyTorch": ("onnx",),
    "and that reads texts": ("onnx", "text"),
    "on its training build": ("onnx-training",),
    "a client with PyTorch for CPUs": ("torch",),
    "a server": ("server",),
    "a server that registers models": ("modelbook", "server"),
}


def main() -> None:
    """Install and measure, the client without a runtime first."""
    core = environment().size_bytes / _MEGABYTE
    rows = [Row("no extra", core, "MB")]
    for role, extras in _ROLES.items():
        size = environment(*extras).size_bytes / _MEGABYTE
        rows.append(Row(f"[{','.join(extras)}]: {role}", size, "MB", "no extra", size / core))
    print_rows("install", rows, ["numpy", "onnxruntime", "torch"])


if __name__ == "__main__":
    main()
