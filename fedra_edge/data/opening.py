"""Chooses how to read the data that a user points at."""

from __future__ import annotations

from pathlib import Path

from fedra_edge.data.dataset import LocalDataset
from fedra_edge.data.image_folder import ImageFolder
from fedra_edge.data.manifest import ManifestDataset
from fedra_edge.errors import DataError


def open_dataset(path: Path) -> LocalDataset:
    """Open a directory as an image folder and a ``.csv`` file as a manifest.

    Raises:
        DataError: The path is neither, does not exist or cannot be read.
    """
    if path.is_dir():
        return ImageFolder(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return ManifestDataset(path)
    problem = "is no directory and no .csv file" if path.exists() else "does not exist"
    raise DataError(
        f"the data path {path} {problem}",
        remedy="Give a directory with one directory of images per class, or a CSV file with "
        "the columns path,label.",
    )
