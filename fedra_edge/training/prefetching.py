"""Asks the system to bring a file into its cache while something else is computed."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prefetch(path: Path) -> None:
    """Start reading a file ahead; returns at once and takes no memory of this process.

    Only where the system can be asked (Linux); elsewhere the first use reads the file.
    """
    if sys.platform != "linux":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
