"""Local data: examples are read here and never leave the device."""

from fedra_edge.data.dataset import (
    Example,
    LocalDataset,
    SkipReport,
    TextExample,
    is_held_out_by_key,
)
from fedra_edge.data.image_folder import ImageFolder
from fedra_edge.data.images import prepare_image
from fedra_edge.data.manifest import ManifestDataset
from fedra_edge.data.matching import MatchedDataset, match_labels
from fedra_edge.data.opening import open_dataset
from fedra_edge.data.text_folder import TextFolder
from fedra_edge.data.text_manifest import TextManifest
from fedra_edge.data.tokenizing import TextTokenizer

__all__ = [
    "Example",
    "ImageFolder",
    "LocalDataset",
    "ManifestDataset",
    "MatchedDataset",
    "SkipReport",
    "TextExample",
    "TextFolder",
    "TextManifest",
    "TextTokenizer",
    "is_held_out_by_key",
    "match_labels",
    "open_dataset",
    "prepare_image",
]
