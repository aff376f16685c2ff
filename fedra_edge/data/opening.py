"""Chooses how to read the data that a user points at."""

from __future__ import annotations

from pathlib import Path

from fedra_edge.data.csv_rows import read_columns
from fedra_edge.data.dataset import LocalDataset
from fedra_edge.data.image_folder import ImageFolder
from fedra_edge.data.manifest import ManifestDataset
from fedra_edge.data.text_folder import TextFolder
from fedra_edge.data.text_manifest import TextManifest
from fedra_edge.errors import DataError


def open_dataset(path: Path) -> LocalDataset:
    """Open a directory as a folder of images, else of texts, and a ``.csv`` file as a manifest.

    A manifest with a column ``text`` and none called ``path`` holds texts.

    Raises:
        DataError: The path is neither, does not exist or cannot be read.
    """
    if path.is_dir():
        images = ImageFolder(path)
        return images if len(images) else _texts_or(images)
    if path.is_file() and path.suffix.lower() == ".csv":
        columns = read_columns(path)
        has_texts = "text" in columns and "path" not in columns
        return TextManifest(path) if has_texts else ManifestDataset(path)
    problem = "is no directory and no .csv file" if path.exists() else "does not exist"
    raise DataError(
        f"the data path {path} {problem}",
        remedy="Give a directory with one directory of images or .txt files per class, or a CSV "
        "file with the columns path,label or text,label.",
    )


def _texts_or(images: ImageFolder) -> LocalDataset:
    """Open a folder without images as one of texts; without those either, leave it as it is."""
    texts = TextFolder(images.root)
    return texts if len(texts) else images
