"""Makes one ONNX model of a revision: its pieces chained, its adapters fused into the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from fedra_edge.protocol.graphs import HIDDEN, INPUTS, LOGITS, OUT
from fedra_edge.protocol.layers import HEAD, LORA_A, LORA_B, STEM, TensorKey, layer_piece
from fedra_edge.protocol.models import AdapterSpec, BlobRef, ImageInput, ModelSpec, PieceGraphs
from fedra_edge.protocol.slices import RevisionManifest
from fedra_edge.protocol.tensors import (
    FloatArray,
    TensorInfo,
    read_header,
    read_tensor,
    read_tensors,
)
from fedra_server.modelbook.graphs.adapters import is_stored_out_first, remove_adapters
from fedra_server.storage.blobs import BlobStore

MOST_INSIDE_BYTES: Final = 2**31 - 2**24
"""What weights may take in the file of the graph; no file of the format is over 2 GiB."""
_BLOCK: Final = "block"
_FLOAT32_BYTES: Final = 4
_PAGE_BYTES: Final = 4096


@dataclass(frozen=True)
class FusedModel:
    """A revision as it computes, without adapters of its own."""

    spec: ModelSpec
    graphs: PieceGraphs
    adapter: AdapterSpec
    revision: RevisionManifest
    blobs: BlobStore

    def write(self, path: Path, *, most_inside_bytes: int = MOST_INSIDE_BYTES) -> None:
        """Write the model; weights that are too large for one file go beside it, to NAME.data."""
        model = self._chained()
        weights = list(model.graph.input[1:])
        del model.graph.input[1:]
        size_bytes = sum(_FLOAT32_BYTES * math.prod(_shape(it)) for it in weights)
        with ExitStack() as stack:
            beside = None
            if size_bytes > most_inside_bytes:
                beside = stack.enter_context(path.with_name(f"{path.name}.data").open("wb"))
            wanted = {it.name for it in weights}
            for key, value in self._weights():
                if str(key) in wanted:
                    model.graph.initializer.append(_stored(str(key), value, beside))
        path.write_bytes(model.SerializeToString())

    def _chained(self) -> onnx.ModelProto:
        """Chain the graphs of all pieces; the weights are still inputs."""
        head = self._read(self.graphs.head)
        model = onnx.ModelProto()
        model.CopyFrom(head)
        model.ClearField("graph")
        whole = model.graph
        whole.name = self.spec.name
        stem = self._read(self.graphs.stem).graph
        whole.input.extend(it for it in stem.input if it.name == INPUTS)
        values = _append(whole, stem, STEM, {INPUTS: INPUTS})
        for layer_id in self.spec.layer_ids:
            result = _append(whole, self._block.graph, layer_piece(layer_id), values, _BLOCK)
            values[HIDDEN] = result[OUT]
        logits = _append(whole, head.graph, HEAD, values)[LOGITS]
        _rename(whole, logits, LOGITS)
        whole.output.extend(it for it in head.graph.output if it.name == LOGITS)
        helper.set_model_props(model, _told(self.spec, self.revision))
        return model

    @cached_property
    def _block(self) -> onnx.ModelProto:
        return remove_adapters(self._read(self.graphs.block))

    def _read(self, ref: BlobRef) -> onnx.ModelProto:
        return onnx.load_model_from_string(self.blobs.path(ref.sha256).read_bytes())

    def _weights(self) -> Iterator[tuple[TensorKey, FloatArray]]:
        """Give every weight as the revision has it, piece by piece."""
        trained = read_tensors(self.blobs.path(self.revision.head.sha256))
        for piece, held in ((STEM, self.spec.stem), (HEAD, self.spec.head)):
            for key, value in _frozen(piece, held.weights, self.blobs):
                yield key, trained.get(str(key), value)
        for layer_id in self.spec.layer_ids:
            piece = layer_piece(layer_id)
            adapters = read_tensors(self.blobs.path(self.revision.layers[layer_id].sha256))
            for key, value in _frozen(piece, self.spec.layers[layer_id].weights, self.blobs):
                yield key, self._fused(key, value, adapters)

    def _fused(
        self, key: TensorKey, weight: FloatArray, adapters: Mapping[str, FloatArray]
    ) -> FloatArray:
        """Give W + scale * B A, whichever way around W is stored."""
        target = key.name.removesuffix(".weight")
        down = adapters.get(str(TensorKey(key.piece, f"{target}.{LORA_A}")))
        up = adapters.get(str(TensorKey(key.piece, f"{target}.{LORA_B}")))
        if down is None or up is None:
            return weight
        product = np.float32(self.adapter.scale) * (up @ down)
        return weight + (product if is_stored_out_first(self._block, target) else product.T)


def _frozen(piece: str, ref: BlobRef, blobs: BlobStore) -> Iterator[tuple[TensorKey, FloatArray]]:
    path = blobs.path(ref.sha256)
    for name, info in read_header(path).items():
        yield TensorKey(piece, name), _float32(path, info)


def _float32(path: Path, info: TensorInfo) -> FloatArray:
    value: FloatArray = read_tensor(path, info).astype(np.float32, copy=False)
    return value


def _append(
    whole: onnx.GraphProto,
    part: onnx.GraphProto,
    piece: str,
    values: Mapping[str, str],
    constants: str = "",
) -> dict[str, str]:
    """Append a piece's graph, its names below the piece's; give the names of its outputs.

    ``values`` are inputs that are computed already. Pieces that name the same ``constants`` are
    of one graph and share them.
    """
    names = {it.name: f"{constants or piece}/{it.name}" for it in part.initializer}
    held = {it.name for it in whole.initializer}
    for it in part.initializer:
        if names[it.name] not in held:
            whole.initializer.add().CopyFrom(it)
            whole.initializer[-1].name = names[it.name]
    for it in part.input:
        names[it.name] = values.get(it.name, f"{piece}/{it.name}")
        if it.name not in values:
            whole.input.add().CopyFrom(it)
            whole.input[-1].name = names[it.name]
    for node in part.node:
        kept = whole.node.add()
        kept.CopyFrom(node)
        kept.name = f"{piece}/{node.name}"
        for own in (kept.input, kept.output):
            own[:] = [names.get(name, f"{piece}/{name}") if name else "" for name in own]
    return {it.name: names.get(it.name, f"{piece}/{it.name}") for it in part.output}


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for own in (node.input, node.output):
            own[:] = [new if name == old else name for name in own]


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _stored(name: str, value: FloatArray, beside: IO[bytes] | None) -> TensorProto:
    """Put a weight into the graph's own file, or into another one that the graph names."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape)
    if beside is None:
        tensor.raw_data = value.tobytes()
        return tensor
    beside.write(b"\0" * (-beside.tell() % _PAGE_BYTES))
    place = {"location": Path(beside.name).name, "offset": beside.tell(), "length": value.nbytes}
    beside.write(value.tobytes())
    tensor.data_location = TensorProto.EXTERNAL
    for key, told in place.items():
        tensor.external_data.add(key=key, value=str(told))
    return tensor


def _told(spec: ModelSpec, revision: RevisionManifest) -> dict[str, str]:
    """Say inside the file what a program must know to use it."""
    wanted = spec.input
    if isinstance(wanted, ImageInput):
        steps = {"resample": "bilinear", "rescale_factor": 1 / 255, "layout": "NCHW"}
    else:
        steps = {"padding": "after the text, with -1", "tokenizer_file": "tokenizer.json"}
    return {
        "model": spec.name,
        "revision": str(revision.number),
        "labels": json.dumps(spec.labels),
        "preprocessing": json.dumps(wanted.model_dump(mode="json") | steps),
    }
