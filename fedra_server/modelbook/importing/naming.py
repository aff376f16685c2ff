"""Names the weights of a piece, as the model's author did where that can still be told."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import onnx

_TORCH_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_ANONYMOUS: Final = re.compile(r"onnx::.*|/.*|fedra/.*|[A-Za-z]\w*_\d+")
_ROLES: Final[Mapping[str, Mapping[int, str]]] = {
    "MatMul": {0: "weight", 1: "weight"},
    "Transpose": {0: "weight"},
    "Gemm": {1: "weight", 2: "bias"},
    "Conv": {1: "weight", 2: "bias"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "Add": {0: "bias", 1: "bias"},
}
_ATTENTION: Final = re.compile(r"att(n|ention)")
WEIGHT: Final = ".weight"

Use = tuple[onnx.NodeProto, int, str]
"""A node, the position of an input of it, and the name of the weight that goes in there."""


def name_weights(
    uses: Sequence[Sequence[Use]], counts: Counter[str], matrices: set[int], taken: set[str]
) -> list[str]:
    """Name the weights of a piece; ``uses`` has them of all pieces of one structure.

    A weight is called what it is called in the model, without the number of its layer; if that
    name cannot serve, after the module that uses it; else by its place. The weights of linear
    layers, at the places in ``matrices``, get names that end in ``.weight``.
    """
    names: list[str] = []
    for place in range(len(uses[0])):
        same = [each[place] for each in uses]
        own, scoped = _common([_plain(it[2]) for it in same]), _common(list(map(_by_scope, same)))
        is_shared = any(counts[it[2]] > 1 for it in same)
        choices = [scoped, own, _after_number(same)] if is_shared else [own, scoped]
        known = [_as_matrix(it) if place in matrices else it for it in choices if it]
        fallback = f"w{place}{WEIGHT}" if place in matrices else f"w{place}"
        name = next((it for it in known if it not in taken), fallback)
        taken.add(name)
        names.append(name)
    return names


def named_by_index(names: Sequence[str]) -> str | None:
    """Give what follows the layer's number in names that differ in nothing else.

    >>> named_by_index(["layer.3.fc.weight", "layer.4.fc.weight"])
    'fc.weight'
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(it) for it in parts}) > 1:
        return None
    differing = [
        place for place, column in enumerate(zip(*parts, strict=True)) if len({*column}) > 1
    ]
    if len(differing) != 1 or not differing[0] % 2:
        return None
    numbers = [int(it[differing[0]]) for it in parts]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return "".join(parts[0][differing[0] + 1 :]).lstrip("._/") or None


def default_targets(linears: Sequence[str]) -> tuple[str, ...]:
    """Choose the last linear layer of the attention and the last one after it, or all of them."""
    attending = [name for name in linears if _ATTENTION.search(name)]
    others = [name for name in linears if name not in attending]
    return (attending[-1], others[-1]) if attending and others else tuple(linears)


def _common(names: Sequence[str | None]) -> str | None:
    known = [name for name in names if name]
    if len(known) < len(names):
        return None
    found = known[0] if len(known) == 1 else named_by_index(known)
    clean = re.sub(r"[^A-Za-z0-9_]+", ".", found or "").strip(".")
    return clean or None


def is_anonymous(name: str) -> bool:
    """Tell whether an exporter made a name up."""
    return _ANONYMOUS.fullmatch(name) is not None


def _plain(name: str) -> str | None:
    return None if is_anonymous(name) else name


def _after_number(uses: Sequence[Use]) -> str | None:
    """Name a weight that all layers share as its first user does, without the layer's number."""
    plain = _plain(uses[0][2])
    return _common([re.split(r"\.\d+\.", plain, maxsplit=1)[-1]]) if plain else None


def _by_scope(use: Use) -> str | None:
    """Name a weight after the module that uses it, which both exporters of PyTorch write down."""
    node, position, _ = use
    scopes = {it.key: it.value for it in node.metadata_props}.get(_TORCH_SCOPES)
    modules = list(map(str, ast.literal_eval(scopes)))[:-1] if scopes else []
    scope = modules[-1] if modules else _module_path(node.name)
    role = _ROLES.get(node.op_type, {}).get(position)
    return f"{scope}.{role}" if scope and role else None


def _module_path(node_name: str) -> str:
    """Read the path off a name such as /blocks.0/tok/tok.0/MatMul, where tok holds tok.0."""
    parts = node_name.strip("/").split("/")[:-1]
    following = [*parts[1:], ""]
    return ".".join(
        part
        for part, after in zip(parts, following, strict=True)
        if not after.startswith(f"{part}.")
    )


def _as_matrix(name: str) -> str:
    stem = re.sub(r"[._]?weight$", "", name)
    return f"{stem or name}{WEIGHT}"
