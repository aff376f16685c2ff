"""Opens what `fedra-server export` wrote, without a copy of it in memory or on the disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedra_edge.data.tokenizing import TextTokenizer
from fedra_edge.errors import ConfigurationError, FedraEdgeError, SliceError
from fedra_edge.protocol.families import Family, family_named
from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.layers import LORA_A, LORA_B
from fedra_edge.protocol.models import AdapterSpec, GraphContents, ImageInput, ModelSpec
from fedra_edge.protocol.tensors import TensorInfo, read_header, read_tensors
from fedra_edge.slicing import piece_refs
from fedra_edge.training.trainer import GraphFiles, PieceFile, WholeModel

Parsed = TypeVar("Parsed", bound=BaseModel)
_PEFT_PREFIX = "base_model.model."
_PEFT_FACTORS = {"lora_A.weight": LORA_A, "lora_B.weight": LORA_B}


class _PeftConfig(BaseModel):
    """What of peft's own description of an adapter decides its computation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]


def read_export_spec(directory: Path) -> ModelSpec:
    """Read which model an export holds, for its labels and its input.

    Raises:
        ConfigurationError: The directory is no export.
    """
    try:
        return _parsed(ModelSpec, directory / "model.json")
    except (OSError, ValueError) as error:
        if (directory / "model.onnx").exists():
            raise ConfigurationError(
                f"{directory} is an export for onnxruntime, which this program does not read",
                remedy="Export it once more, without --format onnx.",
            ) from error
        raise ConfigurationError(
            f"{directory} is no exported model: {error}",
            remedy="Give the directory that `fedra-server export` wrote.",
        ) from error


def read_model_description(path: Path) -> ModelSpec:
    """Read what a model is: from an export, or from what `fedra-server model show --spec` prints.

    Raises:
        ConfigurationError: It is neither.
    """
    if path.is_dir():
        return read_export_spec(path)
    try:
        return _parsed(ModelSpec, path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} describes no model: {error}",
            remedy="Give what `fedra-server model show NAME --spec` prints, or an exported model.",
        ) from error


@contextmanager
def graphs_of_description(path: Path, spec: ModelSpec) -> Iterator[GraphFiles | None]:
    """Give the graphs that a model's description holds, as files while the context is open.

    Raises:
        ConfigurationError: They are missing or damaged.
    """
    if spec.graphs is None:
        yield None
        return
    with TemporaryDirectory(prefix="fedra-edge-") as place:
        directory = Path(place)
        try:
            given = _parsed(GraphContents, path).graph_contents
            (directory / "graphs").mkdir()
            for name, content in given.items():
                (directory / "graphs" / f"{name}.onnx").write_bytes(content)
            files = _graphs_of(directory, spec)
        except (OSError, ValueError, SliceError) as error:
            raise ConfigurationError(
                f"{path} does not hold the graphs of model {spec.name}: {error}",
                remedy="Have `fedra-server model show NAME --spec` print it once more.",
            ) from error
        yield files


def open_export(directory: Path) -> WholeModel:
    """Open an export: its adapters are read, its base stays in its file until it is used.

    Raises:
        ConfigurationError: The directory is no export, or a damaged one.
    """
    spec = read_export_spec(directory)
    try:
        return _opened(directory, spec)
    except (OSError, ValueError, KeyError, SliceError) as error:
        raise damaged(spec, error) from error


def open_tokenizer(directory: Path, spec: ModelSpec) -> TextTokenizer | None:
    """Open the tokenizer of an export; None when its model reads no texts.

    Raises:
        ConfigurationError: The tokenizer is missing or damaged.
        BackendUnavailableError: The library that reads tokenizers is not installed.
    """
    if isinstance(spec.input, ImageInput):
        return None
    try:
        return TextTokenizer(directory / "base" / "tokenizer.json", spec.input)
    except SliceError as error:
        raise damaged(spec, error) from error


def damaged(spec: ModelSpec, error: Exception) -> ConfigurationError:
    """Make the error for an export in which something is missing or does not fit.

    An error that has a remedy of its own keeps it: then this machine is what is not fit.
    """
    if isinstance(error, FedraEdgeError) and error.remedy:
        message = f"the export of model {spec.name} cannot be used here: {error}"
        return ConfigurationError(message, remedy=error.remedy)
    return ConfigurationError(
        f"the export of model {spec.name} is damaged: {error}",
        remedy="Export the model once more with `fedra-server export`.",
    )


def _opened(directory: Path, spec: ModelSpec) -> WholeModel:
    family = family_named(spec.family)
    config = _parsed(_PeftConfig, directory / "adapter" / "adapter_config.json")
    adapter = _adapter_spec(config, family)
    tensors = read_tensors(directory / "adapter" / "adapter_model.safetensors")
    adapters = {_wire_name(name, family): value for name, value in tensors.items()}
    shapes = spec.delta_shapes(adapter, spec.layer_ids)
    if {name: value.shape for name, value in adapters.items()} != shapes:
        raise SliceError("the exported adapter does not fit the exported model")
    pieces = _pieces_of(directory / "base" / "model.safetensors", family)
    if pieces.keys() != piece_refs(spec, spec.layer_ids).keys():
        raise SliceError("the exported base does not have the exported model's layers")
    return WholeModel(spec, adapter, pieces, adapters, _graphs_of(directory, spec))


def _graphs_of(directory: Path, spec: ModelSpec) -> GraphFiles | None:
    """Give the graphs that came with the export; they must be those that the model names."""
    if spec.graphs is None:
        return None
    refs = spec.graphs.by_name
    files: GraphFiles = {name: directory / "graphs" / f"{name}.onnx" for name in refs}
    for name, path in files.items():
        if sha256_of_file(path) != refs[name].sha256:
            raise SliceError(f"{path.name} in graphs is not what model.json names")
    return files


def _parsed(kind: type[Parsed], path: Path) -> Parsed:
    """Read a JSON file; ValueError says in one line what is wrong with it."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise ValueError(f"{path.name}: {place}: {first['msg']}") from error


def _adapter_spec(config: _PeftConfig, family: Family) -> AdapterSpec:
    targets = {family.locate(f"{name}.weight").name for name in config.target_modules}
    return AdapterSpec(
        rank=config.r,
        alpha=config.lora_alpha,
        targets=tuple(sorted(target.removesuffix(".weight") for target in targets)),
    )


def _wire_name(peft_name: str, family: Family) -> str:
    name = peft_name.removeprefix(_PEFT_PREFIX)
    for suffix, factor in _PEFT_FACTORS.items():
        if name.endswith(f".{suffix}"):
            key = family.locate(f"{name.removesuffix(suffix)}{factor}")
            return str(key)
    return str(family.locate(name))


def _pieces_of(path: Path, family: Family) -> dict[str, PieceFile]:
    """Say which of the base's tensors make each piece."""
    held: defaultdict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for full_name, info in read_header(path).items():
        key = family.locate(full_name)
        held[key.piece][key.name] = info
    return {piece: PieceFile(path, tensors) for piece, tensors in held.items()}
