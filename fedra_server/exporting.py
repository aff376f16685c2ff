"""Writes a revision as plain files: a Hugging Face base with a peft adapter, or one ONNX model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from fedra_edge.protocol.families import ONNX_FAMILY, Family, family_named
from fedra_edge.protocol.layers import HEAD, LORA_A, LORA_B, STEM, TensorKey, layer_piece
from fedra_edge.protocol.models import AdapterSpec, BlobRef, ImageInput, ModelSpec, TokenInput
from fedra_edge.protocol.slices import RevisionManifest
from fedra_edge.protocol.tensors import TensorInfo, iterate_float32, read_header
from fedra_server.errors import ConfigurationError, ConflictError
from fedra_server.storage.blobs import BlobStore

_PEFT_PREFIX: Final = "base_model.model."
_PEFT_FACTORS: Final[Mapping[str, str]] = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}
_ALIGNMENT: Final = 8
_FLOAT32_BYTES: Final = 4
_BILINEAR: Final = 2

_README: Final = """# {name}, revision {number}

`base/` is the model as it was registered, `adapter/` what was tuned on top of it: LoRA of rank
{rank} on every layer, and the head. `model.json` describes the model to fedra; `graphs/`, where
there is one, is for computing it without PyTorch.

```python
from peft import PeftModel
from transformers import {base_class}, {prepare_class}

prepare = {prepare_class}.from_pretrained("base")
base = {base_class}.from_pretrained("base")
model = PeftModel.from_pretrained(base, "adapter").eval()
```

`fedra-edge evaluate --export DIR --data DIR` measures its accuracy on a folder of {examples}.
"""
_ONNX_README: Final = """# {name}, revision {number}

`base/` holds the model's weights as they were registered, `adapter/` what was tuned on top of
them: LoRA of rank {rank} on every layer, and the head. `graphs/` is how they compute.

`fedra-edge evaluate --export DIR --data DIR` measures its accuracy on a folder of {examples};
`fedra-server export --format onnx` writes one model instead, for any ONNX runtime.
"""
_IMAGE_WORDS: Final = {
    "base_class": "AutoModelForImageClassification",
    "prepare_class": "AutoImageProcessor",
    "examples": "images",
}
_TEXT_WORDS: Final = {
    "base_class": "AutoModelForSequenceClassification",
    "prepare_class": "AutoTokenizer",
    "examples": "texts",
}


@dataclass(frozen=True)
class _Source:
    """A tensor inside a file, and the name it gets in the export."""

    name: str
    path: Path
    info: TensorInfo


def export_revision(
    spec: ModelSpec,
    adapter: AdapterSpec,
    revision: RevisionManifest,
    blobs: BlobStore,
    out: Path,
) -> None:
    """Write a revision to a new directory; nothing large is held in memory.

    The directory gets its name when it is complete. The graphs of ``spec`` go with it, for
    clients without PyTorch; they must be those of the adapter's targets.

    Raises:
        ConflictError: The directory exists already and is not empty.
        ConfigurationError: The directory cannot be written.
    """
    family = family_named(spec.family)
    with _new_directory(out) as partial:
        _write_base(spec, family, blobs, partial / "base")
        _write_adapter(family, revision, blobs, partial / "adapter")
        peft_config = _peft_config(spec, family, adapter)
        _write_json(partial / "adapter" / "adapter_config.json", peft_config)
        _write_graphs(spec, blobs, partial / "graphs")
        _write_text(partial / "model.json", spec.model_dump_json(indent=2))
        _write_text(partial / "README.md", _readme(spec, adapter, revision))


def export_onnx(
    spec: ModelSpec,
    adapter: AdapterSpec,
    revision: RevisionManifest,
    blobs: BlobStore,
    out: Path,
) -> None:
    """Write a revision to a new directory as one ONNX model, adapters fused into its weights.

    The directory gets its name when it is complete.

    Raises:
        ConflictError: The directory exists already and is not empty.
        ConfigurationError: The directory cannot be written, the model has no graphs, or the
            package onnx is not installed.
    """
    if spec.graphs is None:
        raise ConfigurationError(
            f"model {spec.name} was registered without ONNX graphs",
            remedy="Export without --format, or register the model with graphs.",
        )
    try:
        from fedra_server.modelbook.graphs.fusing import FusedModel
    except ImportError as error:
        raise ConfigurationError(
            "writing ONNX models needs the package onnx",
            remedy="Install it: pip install 'fedra[modelbook]'",
        ) from error
    with _new_directory(out) as partial:
        FusedModel(spec, spec.graphs, adapter, revision, blobs).write(partial / "model.onnx")
        if isinstance(spec.input, TokenInput):
            shutil.copyfile(blobs.path(spec.input.tokenizer.sha256), partial / "tokenizer.json")


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Give a directory to fill, which gets the name ``out`` when nothing went wrong."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConflictError(f"{out} exists already", remedy="Name a new directory.")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        raise ConfigurationError(f"cannot write {out}: {error}") from error


def _write_base(spec: ModelSpec, family: Family, blobs: BlobStore, directory: Path) -> None:
    pieces = {STEM: spec.stem, HEAD: spec.head}
    pieces |= {layer_piece(index): spec.layers[index] for index in spec.layer_ids}
    sources = [
        _Source(family.full_name(TensorKey(piece, name)), path, info)
        for piece, held in pieces.items()
        for name, path, info in _tensors(held.weights, blobs)
    ]
    directory.mkdir(parents=True)
    _concatenate(sources, directory / "model.safetensors")
    if isinstance(spec.input, TokenInput):
        shutil.copyfile(blobs.path(spec.input.tokenizer.sha256), directory / "tokenizer.json")
    if family.name != ONNX_FAMILY:
        _write_configs(spec, family, directory)


def _write_configs(spec: ModelSpec, family: Family, directory: Path) -> None:
    """Say to transformers what the model is and how its input is prepared."""
    _write_json(directory / "config.json", spec.config)
    if isinstance(spec.input, TokenInput):
        _write_json(directory / "tokenizer_config.json", _tokenizer_config(spec.input))
    else:
        _write_json(directory / "preprocessor_config.json", _preprocessor(spec.input, family))


def _write_adapter(
    family: Family, revision: RevisionManifest, blobs: BlobStore, directory: Path
) -> None:
    sources = [
        _Source(_peft_name(TensorKey.parse(name), family), path, info)
        for ref in (*revision.layers, revision.head)
        for name, path, info in _tensors(ref, blobs)
    ]
    directory.mkdir(parents=True)
    _concatenate(sources, directory / "adapter_model.safetensors")


def _write_graphs(spec: ModelSpec, blobs: BlobStore, directory: Path) -> None:
    """Copy the graphs that clients without PyTorch compute with, if the model has any."""
    if spec.graphs is None:
        return
    directory.mkdir()
    for name, ref in spec.graphs.by_name.items():
        shutil.copyfile(blobs.path(ref.sha256), directory / f"{name}.onnx")


def _tensors(ref: BlobRef, blobs: BlobStore) -> Iterator[tuple[str, Path, TensorInfo]]:
    path = blobs.path(ref.sha256)
    for name, info in read_header(path).items():
        yield name, path, info


def _peft_name(key: TensorKey, family: Family) -> str:
    module, _, last = family.full_name(key).rpartition(".")
    return f"{_PEFT_PREFIX}{module}.{_PEFT_FACTORS.get(last, last)}"


def _peft_config(spec: ModelSpec, family: Family, adapter: AdapterSpec) -> Mapping[str, JsonValue]:
    """Describe the adapter to peft; modules are named in full, so that no other one matches."""
    targets: list[JsonValue] = [
        family.full_name(TensorKey(layer_piece(layer_id), target))
        for layer_id in spec.layer_ids
        for target in adapter.targets
    ]
    trained_modules: list[JsonValue] = list(family.trained_head_modules)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": trained_modules,
        "inference_mode": True,
    }


def _readme(spec: ModelSpec, adapter: AdapterSpec, revision: RevisionManifest) -> str:
    words = _TEXT_WORDS if isinstance(spec.input, TokenInput) else _IMAGE_WORDS
    text = _ONNX_README if spec.family == ONNX_FAMILY else _README
    return text.format(name=spec.name, number=revision.number, rank=adapter.rank, **words)


def _tokenizer_config(wanted: TokenInput) -> Mapping[str, JsonValue]:
    """Make transformers take tokenizer.json as it is."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": wanted.max_tokens}


def _preprocessor(wanted: ImageInput, family: Family) -> Mapping[str, JsonValue]:
    size_px = wanted.size_px
    return {
        "image_processor_type": family.image_processor,
        "do_resize": True,
        "size": {"height": size_px, "width": size_px},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(wanted.mean),
        "image_std": list(wanted.std),
    }


def _concatenate(sources: list[_Source], out: Path) -> None:
    """Write one float32 safetensors file from tensors of others, in bounded chunks."""
    header: dict[str, JsonValue] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source in sources:
        end = offset + _FLOAT32_BYTES * math.prod(source.info.shape)
        header[source.name] = {
            "dtype": "F32",
            "shape": list(source.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with out.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for source in sources:
            file.writelines(iterate_float32(source.path, source.info))


def _write_json(path: Path, content: Mapping[str, JsonValue]) -> None:
    _write_text(path, json.dumps(content, indent=2))


def _write_text(path: Path, content: str) -> None:
    path.write_text(content + "\n", encoding="utf-8", newline="\n")
