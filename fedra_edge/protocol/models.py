"""What a registered model is: its pieces, shapes and costs, and how adapters attach to it."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import Base64Bytes, Field, model_validator

from fedra_edge.protocol.ids import LayerId, ModelId
from fedra_edge.protocol.layers import HEAD, LORA_A, LORA_B, TensorKey, layer_piece
from fedra_edge.protocol.wire import (
    ByteCount,
    Count,
    Finite,
    HexDigest,
    PlainJson,
    ShortText,
    WireModel,
)

Shape = tuple[Annotated[int, Field(ge=1, le=2**31)], ...]
MAX_LAYERS = 10_000
MAX_TOKENS = 32_768


class BlobRef(WireModel):
    """Bytes named by their content."""

    sha256: HexDigest
    size_bytes: ByteCount


class PieceCost(WireModel):
    """What a piece costs, measured when the model was registered, in float32.

    ``activation_bytes`` is what autograd keeps per example for the backward pass when the
    piece is trained; ``boundary_bytes`` is its output per example; ``forward_flops`` counts
    floating-point operations per example of the forward pass.
    """

    parameter_bytes: ByteCount
    activation_bytes: ByteCount
    boundary_bytes: ByteCount
    forward_flops: Count


class Piece(WireModel):
    """One file of frozen weights and what it costs to use."""

    weights: BlobRef
    cost: PieceCost


class ImageInput(WireModel):
    """What the model eats: square images, scaled to 0..1, then normalised per channel."""

    kind: Literal["image"] = "image"
    size_px: Annotated[int, Field(ge=1, le=4096)]
    channels: Literal[1, 3]
    mean: tuple[Finite, ...]
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]


class TokenInput(WireModel):
    """What the model eats: texts as token ids, by the tokenizer in a tokenizer.json.

    Longer texts are cut after ``max_tokens``; every id is below ``vocabulary_size``.
    """

    kind: Literal["tokens"] = "tokens"
    vocabulary_size: Annotated[int, Field(ge=1, le=2**24)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    tokenizer: BlobRef


ModelInput = Annotated[ImageInput | TokenInput, Field(discriminator="kind")]


class AdapterSpec(WireModel):
    """Which adapters a run trains: LoRA of one rank on exactly the named linear modules.

    ``targets`` are full module names inside a block; they never match by suffix.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0, le=1e4)] = 8.0
    targets: tuple[ShortText, ...]

    @model_validator(mode="after")
    def _targets_differ(self) -> Self:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("a module is named twice among the adapters' targets")
        return self

    @property
    def scale(self) -> float:
        """The factor alpha / rank that multiplies the low-rank product B A."""
        return self.alpha / self.rank


GraphName = Literal["stem", "block", "block_vjp", "head", "head_vjp"]


class PieceGraphs(WireModel):
    """The computations of a model's pieces as ONNX graphs, for clients without PyTorch.

    All weights are inputs, so one block graph serves every layer. ``block`` and ``block_vjp``
    have adapters on exactly ``targets``, of any rank; a vjp maps a gradient of the output to
    gradients of the activations and of what is trained. The wire contract names all inputs.
    """

    targets: tuple[ShortText, ...]
    stem: BlobRef
    block: BlobRef
    block_vjp: BlobRef
    head: BlobRef
    head_vjp: BlobRef

    @property
    def by_name(self) -> dict[GraphName, BlobRef]:
        """All graphs by the names of these fields."""
        return {
            "stem": self.stem,
            "block": self.block,
            "block_vjp": self.block_vjp,
            "head": self.head,
            "head_vjp": self.head_vjp,
        }


class GraphContents(WireModel):
    """What a model's description adds to its ModelSpec: the graphs themselves.

    So a site can measure a block of the model before it is a member and may download anything.
    """

    graph_contents: dict[GraphName, Base64Bytes] = Field(default_factory=dict)


class ModelSpec(WireModel):
    """A registered model: enough to rebuild and check every piece without running its code.

    ``config`` is the architecture's own configuration; ``family`` says which builder reads it.
    ``block_linears`` gives (out_features, in_features) of each linear module of a block;
    ``head_parameters`` are the head's trained tensors with their shapes. ``graphs`` compute its
    pieces with the default targets; a model without them needs PyTorch on the clients.
    """

    name: ShortText
    family: ShortText
    config: dict[str, PlainJson]
    labels: Annotated[tuple[ShortText, ...], Field(min_length=1, max_length=100_000)]
    input: ModelInput
    stem: Piece
    layers: Annotated[tuple[Piece, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    head: Piece
    block_linears: dict[str, tuple[int, int]]
    default_targets: tuple[ShortText, ...]
    head_parameters: dict[str, Shape]
    graphs: PieceGraphs | None = None

    @property
    def model_id(self) -> ModelId:
        """The sha256 of the canonical JSON form: same id, same model."""
        left_out = {"graphs"} if self.graphs is None else None
        told = self.model_dump_json(exclude=left_out)
        return ModelId(hashlib.sha256(told.encode()).hexdigest())

    @property
    def num_layers(self) -> int:
        """How many layers the whole model has."""
        return len(self.layers)

    @property
    def layer_ids(self) -> tuple[LayerId, ...]:
        """All layers of the model, in order."""
        return tuple(LayerId(index) for index in range(self.num_layers))

    def layer_adapter_shapes(self, adapter: AdapterSpec, layer_id: LayerId) -> dict[str, Shape]:
        """Give the name and shape of every adapter tensor of one layer.

        ``lora_a`` is (rank, in_features) and ``lora_b`` is (out_features, rank), so that the
        adapted weight is W + scale * lora_b @ lora_a (LoRA, arXiv 2106.09685, section 4.1).

        Raises:
            ValueError: A target is not a linear module of this model's block.
        """
        shapes: dict[str, Shape] = {}
        for target in adapter.targets:
            if target not in self.block_linears:
                known = ", ".join(sorted(self.block_linears))
                raise ValueError(f"{target!r} is no linear module of a block; there are: {known}")
            out_features, in_features = self.block_linears[target]
            piece = layer_piece(layer_id)
            shapes[str(TensorKey(piece, f"{target}.{LORA_A}"))] = (adapter.rank, in_features)
            shapes[str(TensorKey(piece, f"{target}.{LORA_B}"))] = (out_features, adapter.rank)
        return shapes

    def head_shapes(self) -> dict[str, Shape]:
        """Give the name and shape of every trained tensor of the head."""
        return {str(TensorKey(HEAD, name)): shape for name, shape in self.head_parameters.items()}

    def delta_shapes(
        self, adapter: AdapterSpec, layer_ids: tuple[LayerId, ...]
    ) -> dict[str, Shape]:
        """Give exactly the tensors a delta of these layers must hold: theirs and the head's."""
        shapes = self.head_shapes()
        for layer_id in layer_ids:
            shapes |= self.layer_adapter_shapes(adapter, layer_id)
        return shapes
