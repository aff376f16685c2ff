"""The model families we can cut into pieces, and where each piece's tensors live in them.

Names only: which framework code builds the pieces is the business of whoever has a framework.
A further family is a further row of ``FAMILIES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, TensorKey, layer_piece

ONNX_FAMILY: Final = "onnx"
"""The family of models that are only there as graphs, which no framework code can rebuild."""


@dataclass(frozen=True)
class Family:
    """How one architecture of Hugging Face names its modules.

    ``image_processor`` prepares what it eats, and is None where that is text.
    ``stem`` and ``layers`` are module paths inside the whole model; layer i is ``layers.i``.
    ``head`` lists the modules after the last layer, which keep their last name inside the head
    piece. ``head_parameters`` are the tensors of the head piece that are trained in full.
    """

    name: str
    architecture: str
    image_processor: str | None
    stem: str
    layers: str
    head: tuple[str, ...]
    default_targets: tuple[str, ...]
    head_parameters: tuple[str, ...]

    def full_name(self, key: TensorKey) -> str:
        """Name a piece's tensor as the whole model does.

        Raises:
            ValueError: The head has no such module.
        """
        if key.layer_id is not None:
            return f"{self.layers}.{key.layer_id}.{key.name}"
        if key.piece == STEM:
            return f"{self.stem}.{key.name}"
        module, _, rest = key.name.partition(".")
        for path in self.head:
            if path.rpartition(".")[2] == module:
                return f"{path}.{rest}"
        raise ValueError(f"the head of family {self.name} has no module {module!r}")

    def locate(self, full_name: str) -> TensorKey:
        """Find the piece a tensor of the whole model belongs to, and its name there.

        Raises:
            ValueError: The tensor lies in no piece of this family.
        """
        if full_name.startswith(f"{self.stem}."):
            return TensorKey(STEM, full_name.removeprefix(f"{self.stem}."))
        if full_name.startswith(f"{self.layers}."):
            index, _, name = full_name.removeprefix(f"{self.layers}.").partition(".")
            if index.isdecimal() and name:
                return TensorKey(layer_piece(LayerId(int(index))), name)
        for path in self.head:
            if full_name.startswith(f"{path}."):
                module = path.rpartition(".")[2]
                return TensorKey(HEAD, f"{module}.{full_name.removeprefix(f'{path}.')}")
        raise ValueError(f"tensor {full_name!r} lies in no piece of family {self.name}")

    @property
    def trained_head_modules(self) -> tuple[str, ...]:
        """The full paths of the head's modules that are trained."""
        modules = {name.partition(".")[0] for name in self.head_parameters}
        return tuple(path for path in self.head if path.rpartition(".")[2] in modules)


class _OnlyGraphs(Family):
    """Models that are only there as graphs: tensors of the whole are named as on the wire."""

    @override
    def full_name(self, key: TensorKey) -> str:
        return str(key)

    @override
    def locate(self, full_name: str) -> TensorKey:
        return TensorKey.parse(full_name)


FAMILIES: Final = (
    Family(
        name="vit",
        architecture="ViTForImageClassification",
        image_processor="ViTImageProcessor",
        stem="vit.embeddings",
        layers="vit.layers",
        head=("vit.layernorm", "classifier"),
        default_targets=("attention.o_proj", "mlp.fc2"),
        head_parameters=("classifier.weight", "classifier.bias"),
    ),
    Family(
        name="llama",
        architecture="LlamaForSequenceClassification",
        image_processor=None,
        stem="model.embed_tokens",
        layers="model.layers",
        head=("model.norm", "score"),
        default_targets=("self_attn.o_proj", "mlp.down_proj"),
        head_parameters=("score.weight",),
    ),
)


_ONLY_GRAPHS: Final = _OnlyGraphs(
    name=ONNX_FAMILY,
    architecture="",
    image_processor=None,
    stem=STEM,
    layers="layers",
    head=(HEAD,),
    default_targets=(),
    head_parameters=(),
)


def family_named(name: str) -> Family:
    """Look a family up by the name a ModelSpec carries.

    Raises:
        ValueError: There is no such family.
    """
    for family in (*FAMILIES, _ONLY_GRAPHS):
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"no model family {name[:100]!r}; there are: {known}")
