"""Opens a Hugging Face model directory: local files only, no remote code, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedra_edge.protocol.families import FAMILIES, Family
from fedra_server.errors import ConfigurationError

_WEIGHT_FILES: Final = ("model.safetensors", "model.safetensors.index.json")
_PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


def find_family(directory: Path) -> Family:
    """Tell from config.json which family a model is of.

    Raises:
        ConfigurationError: There is no readable configuration, or we do not know its family.
    """
    config = read_json(directory / "config.json")
    architectures = config.get("architectures") or ["none named"]
    for family in FAMILIES:
        if family.architecture in architectures:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise ConfigurationError(
        f"architecture {', '.join(map(str, architectures))} is not supported",
        remedy=f"Supported architectures: {supported}.",
    )


def load_model(directory: Path, family: Family) -> PreTrainedModel:
    """Load a model in float32, ready for inference, every tensor from its files.

    Raises:
        ConfigurationError: Weights are missing, extra, unreadable, or only there as pickle.
    """
    _check_weight_files(directory)
    architecture = getattr(transformers, family.architecture)
    try:
        with _quiet_progress():
            model, report = architecture.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"cannot load the model in {directory}: {error}") from error
    _check_complete(directory, report)
    loaded: PreTrainedModel = model.eval()
    return loaded


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigurationError: There is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot read {path}: {error}",
            remedy="Give a directory as written by save_pretrained of transformers.",
        ) from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds no JSON object")
    return content


def _check_weight_files(directory: Path) -> None:
    if any((directory / name).is_file() for name in _WEIGHT_FILES):
        return
    pickles = [path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise ConfigurationError(
            f"{directory} holds its weights as pickle ({pickles[0]}), which can run code",
            remedy="Save the model as safetensors: model.save_pretrained(DIR).",
        )
    raise ConfigurationError(f"{directory} has no {_WEIGHT_FILES[0]}")


def _check_complete(directory: Path, report: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind, ()))):
            raise ConfigurationError(
                f"the model in {directory} has {kind.replace('_', ' ')}: {', '.join(names[:5])}",
                remedy="Load it in transformers with the right head and labels, then save it.",
            )


@contextmanager
def _quiet_progress() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # unannotated
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # unannotated
