"""What is fuzzed: functions of bytes, which raise nothing but what their reader documents."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import deserialize

from fedra_edge.errors import SliceError
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.digests import format_digest, parse_digest
from fedra_edge.protocol.messages import EnrolRequest, FailureReport, Heartbeat, RejoinRequest
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.problems import Problem
from fedra_edge.protocol.rounds import Assignment, Evaluation, Train
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import (
    MalformedTensorsError,
    TensorInfo,
    iterate_float32,
    map_tensor,
    read_header,
    read_tensor,
)
from fedra_edge.protocol.trust import (
    Authority,
    Challenge,
    JoinString,
    KeyChange,
    SessionRequest,
    certificate_sha256,
    from_base64url,
    pinned_pem,
    to_base64url,
)
from fedra_edge.protocol.version import PROTOCOL_VERSION, skew, upgrade_advice
from fedra_edge.protocol.wire import ByteCount, byte_count_of
from fedra_edge.training.graph_checking import check_graph
from fedra_server.admission import check_delta
from fedra_server.errors import RefusedError
from fedra_server.http.blobs import parse_range

DELTA_SHAPES: Final = {
    "head/classifier.bias": (3,),
    "layers.1/q.lora_a": (2, 8),
    "layers.1/q.lora_b": (8, 2),
}
WIRE_TYPES: Final[tuple[Any, ...]] = (
    Assignment, DeltaManifest, EnrolRequest, RejoinRequest, Calibration, Evaluation, Heartbeat,
    FailureReport, ModelSpec, Problem, SessionRequest, KeyChange, Authority, Challenge,
)  # fmt: skip
"""The first byte of an input says which."""
_deserialize: Final[Callable[[bytes], list[tuple[str, object]]]] = deserialize
_OFFSET: Final = TypeAdapter(ByteCount)
_SIZES: Final = TypeAdapter(Annotated[int, Field(ge=0, lt=2**20)])


@dataclass(frozen=True)
class Target:
    """What to run, words that its inputs are made of, and whether those are files of tensors."""

    run: Callable[[bytes], None]
    words: tuple[str, ...]
    has_header: bool = False


def read_tensors(data: bytes) -> None:
    """Read every tensor in every way; the library that others read with must agree."""
    path = _stored(data)
    with suppress(MalformedTensorsError):
        infos = read_header(path)
        assert infos.keys() == {name for name, _ in _deserialize(data)}
        for info in infos.values():
            _read(path, info)


def admit_delta(data: bytes) -> None:
    """Admit only what can be merged."""
    path = _stored(data)
    with suppress(RefusedError):
        check_delta(path, DELTA_SHAPES)
        tensors = {name: read_tensor(path, info) for name, info in read_header(path).items()}
        assert {name: tensor.shape for name, tensor in tensors.items()} == DELTA_SHAPES
        assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def parse_message(data: bytes) -> None:
    """Parse a message of the wire; what is taken can be said again and is the same then."""
    adapter = wire_type(data)
    with suppress(ValidationError):
        message = adapter.validate_json(data[1:])
        again = adapter.validate_json(adapter.dump_json(message))
        assert again == message
        _use(message)


def wire_type(data: bytes) -> TypeAdapter[Any]:
    """Tell what an input's first byte says that it is."""
    return _adapters()[data[0] % len(WIRE_TYPES) if data else 0]


def check_operators(data: bytes) -> None:
    """Check a graph before ONNX Runtime reads it."""
    with suppress(SliceError):
        check_graph(data, "block")


def parse_headers(data: bytes) -> None:
    """Read a Range for a blob whose size comes first; the same text as every other header."""
    text = data.decode("latin-1")
    size, _, wanted = text.partition(" ")
    with suppress(ValidationError):
        assert 0 <= _OFFSET.validate_python(wanted) <= 2**50
    assert (byte_count_of(wanted) or 0) >= 0
    with suppress(RefusedError, ValidationError):
        size_bytes = _SIZES.validate_python(size)
        span = parse_range(wanted, size_bytes)
        assert span is None or 0 <= span.first <= span.last < size_bytes
    digest = parse_digest(wanted)
    assert digest is None or parse_digest(format_digest(digest)) == digest
    assert upgrade_advice(wanted, PROTOCOL_VERSION).endswith(".")
    assert skew(PROTOCOL_VERSION, wanted) in {"", "older", "newer"}


def parse_trust(data: bytes) -> None:
    """Read a join string, a certificate and a key; the same text as each of them."""
    text = data.decode("latin-1")
    with suppress(ValueError):
        join_string = JoinString.parse(text)
        assert JoinString.parse(str(join_string)) == join_string
        assert "secret" not in repr(join_string).replace(join_string.address, "")
    with suppress(ValueError):
        assert to_base64url(from_base64url(text)) == text
    with suppress(ValueError):
        authority = Authority(ca_pem=text, ca_sha256=certificate_sha256(text))
        assert pinned_pem(authority, authority.ca_sha256).count("-----BEGIN") == 1


TARGETS: Final = {
    "tensors": Target(
        read_tensors,
        ("dtype", "shape", "data_offsets", "__metadata__", "F32", "BF16", "BOOL", "I64", "[0,4]"),
        has_header=True,
    ),
    "delta": Target(
        admit_delta,
        (*DELTA_SHAPES, "dtype", "shape", "data_offsets", "F32", "[2,8]", "[0,64]"),
        has_header=True,
    ),
    "wire": Target(
        parse_message, ("kind", "train", "wait", "stop", "null", "true", "1e999", "\\u0000")
    ),
    "graphs": Target(check_operators, ("MatMul", "ai.onnx", "Constant", "Loop", "location")),
    "trust": Target(
        parse_trust,
        (
            "https://",
            "#",
            ".",
            "-",
            "@",
            "-----BEGIN CERTIFICATE-----",
            "-----END CERTIFICATE-----",
        ),
    ),
    "headers": Target(parse_headers, ("bytes=", "-", ",", "0", "999999999999999999", "sha-256=:")),
}


@cache
def _adapters() -> list[TypeAdapter[Any]]:
    return [TypeAdapter(it) for it in WIRE_TYPES]


@cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="fedra-fuzz-"), "input")


def _stored(data: bytes) -> Path:
    """Give bytes as a file; always the same one."""
    _scratch().write_bytes(data)
    return _scratch()


def _read(path: Path, info: TensorInfo) -> None:
    tensor = read_tensor(path, info)
    assert tensor.shape == info.shape
    assert map_tensor(path, info).tobytes() == tensor.tobytes()
    with suppress(MalformedTensorsError):
        chunks = list(iterate_float32(path, info))
        assert b"".join(chunks) == tensor.astype("<f4").tobytes()


def _use(message: object) -> None:
    """Ask of a message what either side asks of it before anything else is checked."""
    match message:
        case ModelSpec():
            assert len(message.model_id) == len("0" * 64)
            message.head_shapes()
        case Train(manifest=SliceManifest() as manifest):
            assert set(manifest.trained_layer_ids) <= set(manifest.layer_ids)
        case _:
            pass
