"""Fuzzes one target: `python -m tests.fuzz tensors -max_total_time=60`.

Everything after the target's name goes to libFuzzer (https://llvm.org/docs/LibFuzzer.html). An
input that breaks something is kept beside the seeds, where the tests try it from then on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
OPTIONS = ("-timeout=10", "-max_len=65536", "-print_final_stats=1")


def fuzz(name: str, *options: str) -> int:
    """Start from the seeds; whatever is new but harmless is forgotten at the end."""
    seeds = CORPUS / name
    with TemporaryDirectory() as directory:
        Path(directory, "found").mkdir()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "tests.fuzz.guided", name),
                *OPTIONS,
                *(f"-artifact_prefix={seeds}/", *options),
                *("found", *([str(seeds)] if seeds.exists() else [])),
            ],
            cwd=directory,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": directory},
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(fuzz(*sys.argv[1:]))
