"""Turns a manifest into local work: pieces on disk, adapters in memory, all checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from typing_extensions import override

from fedra_edge.data.tokenizing import TextTokenizer
from fedra_edge.errors import SliceError
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import (
    AdapterSpec,
    BlobRef,
    ModelSpec,
    PieceGraphs,
    Shape,
    TokenInput,
)
from fedra_edge.protocol.rounds import EvaluationTask
from fedra_edge.protocol.slices import RevisionManifest, SliceManifest
from fedra_edge.protocol.tensors import (
    FloatArray,
    MalformedTensorsError,
    read_declared,
    read_header,
)
from fedra_edge.training.trainer import (
    GraphFiles,
    PieceFile,
    SliceWork,
    WholeModel,
)

Key = TypeVar("Key")
Value = TypeVar("Value")


class LayerSource(Protocol):
    """Gives the file of a blob, downloading it when it is not there yet."""

    def path(self, ref: BlobRef, /) -> Path:
        """Give the verified local file."""
        ...


def materialize(manifest: SliceManifest, spec: ModelSpec, layer_cache: LayerSource) -> SliceWork:
    """Fetch a slice's frozen weights and read its adapters.

    Raises:
        SliceError: The manifest does not fit the model, or a blob is not what it should hold.
    """
    _check_manifest(manifest, spec)
    refs = piece_refs(spec, manifest.layer_ids)
    adapters = _read_adapters(
        manifest.revision, manifest.adapter, spec, layer_cache, manifest.layer_ids
    )
    weights = {piece: layer_cache.path(ref) for piece, ref in refs.items()}
    return SliceWork(spec, manifest, weights, adapters, find_graphs(manifest.graphs, layer_cache))


def slice_blobs(manifest: SliceManifest, spec: ModelSpec) -> list[BlobRef]:
    """List what a slice needs, in the order in which it will be read.

    Raises:
        SliceError: The manifest does not fit the model.
    """
    _check_manifest(manifest, spec)
    adapters = (manifest.revision.layers[layer_id] for layer_id in manifest.layer_ids)
    weights = piece_refs(spec, manifest.layer_ids).values()
    return [manifest.revision.head, *adapters, *weights]


def model_blobs(task: EvaluationTask, spec: ModelSpec) -> list[BlobRef]:
    """List what evaluating a revision needs, in the order in which it will be read.

    Raises:
        SliceError: The task does not fit the model.
    """
    _check_model(task.model_id, task.revision, spec)
    weights = piece_refs(spec, spec.layer_ids).values()
    return [task.revision.head, *task.revision.layers, *weights]


def whole_model(task: EvaluationTask, spec: ModelSpec, layer_cache: LayerSource) -> WholeModel:
    """Read all adapters of a revision; weights and graphs are fetched when they are looked up.

    Raises:
        SliceError: The task does not fit the model, or a blob is not what it should hold.
    """
    _check_model(task.model_id, task.revision, spec)
    adapters = _read_adapters(task.revision, task.adapter, spec, layer_cache, spec.layer_ids)
    refs = piece_refs(spec, spec.layer_ids)
    weights = Fetched(refs, lambda ref: PieceFile(layer_cache.path(ref)))
    graphs = find_graphs(task.graphs, layer_cache)
    return WholeModel(spec, task.adapter, weights, adapters, graphs)


def find_graphs(graphs: PieceGraphs | None, layer_cache: LayerSource) -> GraphFiles | None:
    """Say where a model's graphs are, if there are any; a backend without use for them has none."""
    return None if graphs is None else Fetched(graphs.by_name, layer_cache.path)


def fetch_tokenizer(spec: ModelSpec, layer_cache: LayerSource) -> TextTokenizer | None:
    """Fetch and open a model's tokenizer; None when it reads images.

    Raises:
        BackendUnavailableError: The library that reads tokenizers is not installed.
        SliceError: The blob holds no tokenizer.
    """
    if not isinstance(spec.input, TokenInput):
        return None
    return TextTokenizer(layer_cache.path(spec.input.tokenizer), spec.input)


def piece_refs(spec: ModelSpec, layer_ids: Iterable[LayerId]) -> dict[str, BlobRef]:
    """Give the frozen weights that a walk over these layers needs, by piece."""
    layers = {layer_piece(layer_id): spec.layers[layer_id].weights for layer_id in layer_ids}
    return {STEM: spec.stem.weights, **layers, HEAD: spec.head.weights}


class Fetched(Mapping[Key, Value]):
    """Blobs by name, fetched on look-up, so that a small disk can walk over a big model."""

    def __init__(self, refs: Mapping[Key, BlobRef], fetch: Callable[[BlobRef], Value]) -> None:
        self._refs = refs
        self._fetch = fetch

    @override
    def __getitem__(self, name: Key) -> Value:
        return self._fetch(self._refs[name])

    @override
    def __iter__(self) -> Iterator[Key]:
        return iter(self._refs)

    @override
    def __len__(self) -> int:
        return len(self._refs)


def read_checked(path: Path, shapes: Mapping[str, Shape], what: str) -> dict[str, FloatArray]:
    """Read a float32 tensor file that must hold exactly the given tensors.

    Raises:
        SliceError: A tensor is missing, extra, or of another shape or dtype.
    """
    try:
        header = read_header(path)
        if header.keys() != shapes.keys():
            odd = ", ".join(sorted(header.keys() ^ shapes.keys())[:5])
            raise SliceError(f"{what} has missing or extra tensors: {odd}")
        for name, info in header.items():
            if info.dtype != "F32" or info.shape != shapes[name]:
                raise SliceError(
                    f"{what}: {name} is {info.dtype} {info.shape}, not F32 {shapes[name]}"
                )
        return read_declared(path, header)
    except MalformedTensorsError as error:
        raise SliceError(f"{what} is no tensor file: {error}") from error


def _read_adapters(
    revision: RevisionManifest,
    adapter: AdapterSpec,
    spec: ModelSpec,
    layer_cache: LayerSource,
    layer_ids: Iterable[LayerId],
) -> dict[str, FloatArray]:
    adapters = read_checked(
        layer_cache.path(revision.head), spec.head_shapes(), "the head's adapter state"
    )
    for layer_id in layer_ids:
        try:
            shapes = spec.layer_adapter_shapes(adapter, layer_id)
        except ValueError as error:
            raise SliceError(str(error)) from error
        path = layer_cache.path(revision.layers[layer_id])
        adapters |= read_checked(path, shapes, f"the adapter state of layer {layer_id}")
    return adapters


def _check_manifest(manifest: SliceManifest, spec: ModelSpec) -> None:
    _check_model(manifest.model_id, manifest.revision, spec)
    if manifest.layer_ids[-1] >= spec.num_layers:
        raise SliceError(f"the slice has layer {manifest.layer_ids[-1]}, the model does not")
    if manifest.depth == "full" and manifest.layer_ids != spec.layer_ids:
        raise SliceError("a slice of full depth must list every layer of the model")


def _check_model(model_id: str, revision: RevisionManifest, spec: ModelSpec) -> None:
    if model_id != spec.model_id:
        raise SliceError(f"the work is for model {model_id[:12]}, not {spec.model_id[:12]}")
    if len(revision.layers) != spec.num_layers:
        raise SliceError(
            f"the revision has {len(revision.layers)} layers, the model {spec.num_layers}"
        )
