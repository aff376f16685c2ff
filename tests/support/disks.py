"""A real disk that is really small, where the machine lets us make one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a disk of this size, or skip the test where mounting is not permitted."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("there is no mount command")
    directory.mkdir()
    options = f"size={size_bytes}"
    command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        yield directory
    finally:
        subprocess.run([umount, "-l", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Write until no byte is left; removing the file that this gives frees them again."""
    filler = directory / "filler"
    chunk = bytes(4096)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(chunk):
            pass
    return filler
