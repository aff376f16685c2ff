"""Tensor files whose headers lie, and the code that each must be refused with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from fedra_edge.protocol.problems import ProblemCode

MALFORMED = ProblemCode.TENSORS_MALFORMED

Header = dict[str, Any]


def with_header(data: bytes, header: bytes) -> bytes:
    """Put another header before the tensors of a file."""
    size_bytes = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + size_bytes :]


def changed(change: Callable[[Header], object]) -> Callable[[bytes], bytes]:
    """Lie in the header of a file."""

    def lie(data: bytes) -> bytes:
        header: Header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        change(header)
        return with_header(data, json.dumps(header).encode())

    return lie


def first_of(header: Header) -> Header:
    entry: Header = header[min(header, key=lambda name: header[name]["data_offsets"])]
    return entry


def swap_offsets(header: Header) -> None:
    entry = first_of(header)
    entry["data_offsets"].reverse()


def repeat_a_name(data: bytes) -> bytes:
    """Have the header name its first tensor twice."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    told = json.loads(header)
    name = min(told)
    again = json.dumps({name: told[name]}).encode()
    return with_header(data, header[:-1] + b"," + again[1:])


LIES: Final[dict[str, tuple[ProblemCode, Callable[[bytes], bytes]]]] = {
    "tensors that overlap": (
        MALFORMED, changed(lambda it: [e.update(data_offsets=[0, 4 * 64]) for e in it.values()])
    ),
    "a tensor behind the end": (
        MALFORMED, changed(lambda it: first_of(it).update(data_offsets=[2**40, 2**40 + 256]))
    ),
    "a tensor before the beginning": (
        MALFORMED, changed(lambda it: first_of(it).update(data_offsets=[-256, 0]))
    ),
    "an end before the beginning": (MALFORMED, changed(swap_offsets)),
    "a shape beyond all memory": (
        MALFORMED, changed(lambda it: first_of(it).update(shape=[2**39, 2**39, 2**39]))
    ),
    "a negative dimension": (MALFORMED, changed(lambda it: first_of(it).update(shape=[-1, -1]))),
    "a dimension in fractions": (MALFORMED, changed(lambda it: first_of(it).update(shape=[1.5]))),
    "a type of no number": (MALFORMED, changed(lambda it: first_of(it).update(dtype="OBJECT"))),
    "a name twice": (MALFORMED, repeat_a_name),
    "a header that is longer than the file": (
        MALFORMED, lambda data: (2**63).to_bytes(8, "little") + data[8:]
    ),
    "a header that is deep": (MALFORMED, lambda data: with_header(data, b"[" * 4000)),
    "a header of nothing": (MALFORMED, lambda data: with_header(data, b"null")),
    "bytes that no tensor covers": (MALFORMED, lambda data: data + bytes(64)),
    "a header and no tensors": (
        MALFORMED, lambda data: data[: 8 + int.from_bytes(data[:8], "little")]
    ),
    "another type": (
        ProblemCode.TENSOR_DTYPE,
        changed(lambda it: [e.update(dtype="I32") for e in it.values()]),
    ),
}  # fmt: skip
