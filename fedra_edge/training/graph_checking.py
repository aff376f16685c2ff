"""Checks the bytes of a graph before anything else reads them: arithmetic on its inputs only.

An ONNX file is a protobuf message that may also name other files, hold programs with loops and
call operators of any kind. What is not listed here is refused, whatever a later version of the
format means by it. Protobuf merges a message that occurs twice, so every occurrence is checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from fedra_edge.errors import SliceError
from fedra_edge.protocol.graphs import OPERATORS
from fedra_edge.protocol.models import GraphName

_VARINT: Final = 0
_BYTES: Final = 2
_FIXED_SIZES: Final = {1: 8, 5: 4}
_LONGEST_VARINT: Final = 10

_STANDARD_DOMAINS: Final = frozenset({b"", b"ai.onnx"})
_OPERATORS: Final = frozenset(name.encode() for name in OPERATORS)


@dataclass(frozen=True)
class _Message:
    """A kind of message: its plain fields, its fields that are messages, and its required one.

    ``checked`` are texts that must be among some; of those in ``required`` one must occur.
    """

    name: str
    plain: frozenset[int]
    nested: Mapping[int, _Message] = field(default_factory=dict)
    checked: Mapping[int, frozenset[bytes]] = field(default_factory=dict)
    required: frozenset[int] = frozenset()


def _kind(name: str, *plain: int, **nested: _Message) -> _Message:
    return _Message(name, frozenset(plain), {int(it[1:]): held for it, held in nested.items()})


_ENTRY: Final = _kind("entry", 1, 2)
_TENSOR: Final = _kind("tensor", 1, 2, 4, 5, 7, 8, 9, 10, 11, 12, f16=_ENTRY)  # no other file
_ATTRIBUTE: Final = _kind("attribute", 1, 2, 3, 4, 7, 8, 9, 13, 20, f5=_TENSOR)  # no graph
_NODE: Final = _Message(
    "node",
    frozenset({1, 2, 3, 6}),
    {5: _ATTRIBUTE, 9: _ENTRY},
    checked={4: _OPERATORS, 7: _STANDARD_DOMAINS},
    required=frozenset({4}),
)
_SHAPE: Final = _kind("shape", f1=_kind("dimension", 1, 2, 3))
_TYPE: Final = _kind("type", 6, f1=_kind("tensor type", 1, f2=_SHAPE))
_VALUE: Final = _kind("value", 1, 3, f2=_TYPE, f4=_ENTRY)
_GRAPH: Final = _kind(
    "graph", 2, 10, f1=_NODE, f5=_TENSOR, f11=_VALUE, f12=_VALUE, f13=_VALUE, f16=_ENTRY
)
_OPSET: Final = _Message("opset", frozenset({2}), checked={1: _STANDARD_DOMAINS})
_MODEL: Final = _Message(
    "model",
    frozenset({1, 2, 3, 4, 5, 6}),
    {7: _GRAPH, 8: _OPSET, 14: _ENTRY},
    required=frozenset({7}),
)


def check_graph(content: bytes, what: GraphName) -> None:
    """Make sure that a graph is arithmetic on its inputs and on constants inside it.

    Raises:
        SliceError: It is damaged, or holds or names something else.
    """
    try:
        _check(memoryview(content), _MODEL)
    except _UnknownOperatorError as error:
        raise SliceError(
            f"the model's graph {what!r} uses {error}, which is not computed here",
            remedy="update fedra on this machine",
        ) from None
    except ValueError as error:
        raise SliceError(
            f"the model's graph {what!r} is damaged: {error}",
            remedy="Register the model again on the server, or pip install 'fedra[torch]' here.",
        ) from None


class _UnknownOperatorError(Exception):
    """An operator or a domain of operators that is not listed."""


def _check(message: memoryview, kind: _Message) -> None:
    found = set()
    for number, wire_type, value in _fields(message):
        found.add(number)
        if number in kind.nested or number in kind.checked:
            if wire_type != _BYTES:
                raise ValueError(f"field {number} of a {kind.name} is no message")
        elif number not in kind.plain:
            raise ValueError(f"a {kind.name} has field {number}, which is not allowed")
        if number in kind.nested:
            _check(value, kind.nested[number])
        elif number in kind.checked and bytes(value) not in kind.checked[number]:
            told = ascii(bytes(value[:50]).decode(errors="replace"))
            raise _UnknownOperatorError(f"the {'domain' if number != 4 else 'operator'} {told}")  # noqa: PLR2004
    if not kind.required <= found:
        raise ValueError(f"a {kind.name} is incomplete")


def _fields(message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Give the number, wire type and content of each field; numbers' contents are left empty."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire_type = tag >> 3, tag & 7
        start = place
        if wire_type == _VARINT:
            _, place = _varint(message, place)
            start = place
        elif wire_type == _BYTES:
            size, start = _varint(message, place)
            place = start + size
        elif wire_type in _FIXED_SIZES:
            place += _FIXED_SIZES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type} is not used in it")
        if place > len(message):
            raise ValueError("it ends too early")
        yield number, wire_type, message[start:place]


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, the lowest first, and give where it ends."""
    value = 0
    for index, byte in enumerate(message[place : place + _LONGEST_VARINT]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:  # noqa: PLR2004 (the bit that says there is more)
            return value, place + index + 1
    raise ValueError("it ends too early")
