"""Evaluates an exported model on a local data folder, without a server."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import ConfigurationError, SliceError
from fedra_edge.protocol.families import Family, family_named
from fedra_edge.protocol.layers import LORA_A, LORA_B, TensorKey
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.tensors import (
    FloatArray,
    read_header,
    read_tensor,
    read_tensors,
    serialize_tensors,
)
from fedra_edge.training import EvaluationCounts, Trainer, WholeModel, load_trainer

_PEFT_PREFIX = "base_model.model."
_PEFT_FACTORS = {"lora_A.weight": LORA_A, "lora_B.weight": LORA_B}


def read_export_spec(directory: Path) -> ModelSpec:
    """Read which model an export holds, for its labels and its input.

    Raises:
        ConfigurationError: The directory is no export.
    """
    try:
        return ModelSpec.model_validate_json((directory / "model.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{directory} is no exported model: {error}",
            remedy="Give the directory that `fedra-server export` wrote.",
        ) from error


def evaluate_export(
    directory: Path, data: MatchedDataset, trainer: Trainer | None = None
) -> EvaluationCounts:
    """Count right answers of an exported model on local data.

    Where the data itself says which examples are held out, those are counted; else all are,
    because nothing here was trained on them.

    Raises:
        ConfigurationError: The directory is no export.
        BackendUnavailableError: No training runtime is installed.
    """
    spec = read_export_spec(directory)
    with TemporaryDirectory(prefix="fedra-evaluate-", ignore_cleanup_errors=True) as scratch:
        try:
            model = _open_export(directory, spec, Path(scratch))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigurationError(f"{directory} is a damaged export: {error}") from error
        counted = replace(data, held_out_indices=_counted_indices(data))
        return (trainer or load_trainer()).evaluate(model, counted, lambda: False)


def _counted_indices(data: MatchedDataset) -> tuple[int, ...]:
    usable = tuple(sorted((*data.train_indices, *data.held_out_indices)))
    stated = tuple(index for index in usable if data.dataset.is_held_out(index))
    return stated or usable


def _open_export(directory: Path, spec: ModelSpec, scratch: Path) -> WholeModel:
    family = family_named(spec.family)
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text("utf-8"))
    adapter = _adapter_spec(config, family)
    tensors = read_tensors(directory / "adapter" / "adapter_model.safetensors")
    adapters = {_wire_name(name, family): value for name, value in tensors.items()}
    shapes = spec.delta_shapes(adapter, spec.layer_ids)
    if {name: value.shape for name, value in adapters.items()} != shapes:
        raise SliceError("the exported adapter does not fit the exported model")
    weights = _split_base(directory / "base" / "model.safetensors", family, scratch)
    return WholeModel(spec, adapter, weights, adapters)


def _adapter_spec(config: Mapping[str, Any], family: Family) -> AdapterSpec:
    targets = {family.locate(f"{name}.weight").name for name in config["target_modules"]}
    return AdapterSpec(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=tuple(sorted(target.removesuffix(".weight") for target in targets)),
    )


def _wire_name(peft_name: str, family: Family) -> str:
    name = peft_name.removeprefix(_PEFT_PREFIX)
    for suffix, factor in _PEFT_FACTORS.items():
        if name.endswith(f".{suffix}"):
            key = family.locate(f"{name.removesuffix(suffix)}{factor}")
            return str(key)
    return str(family.locate(name))


def _split_base(path: Path, family: Family, scratch: Path) -> dict[str, Path]:
    """Write one file per piece, so that evaluation holds one of them at a time."""
    header = read_header(path)
    pieces: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for full_name in header:
        key: TensorKey = family.locate(full_name)
        pieces[key.piece][key.name] = full_name
    files = {}
    for piece, names in pieces.items():
        tensors: dict[str, FloatArray] = {
            name: read_tensor(path, header[full_name]) for name, full_name in names.items()
        }
        files[piece] = scratch / f"{piece}.safetensors"
        files[piece].write_bytes(serialize_tensors(tensors))
    return files
