"""Makes the seeds that fuzzing starts from, of small real files: `python -m tests.fuzz.seeding`."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import save

from fedra_edge.protocol.digests import format_digest
from fedra_edge.protocol.messages import EnrolRequest, FailureReport, Heartbeat, RejoinRequest
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.rounds import Assignment, EvaluationTask, Stop, Train, Wait
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_edge.protocol.trust import (
    Authority,
    Challenge,
    JoinString,
    KeyChange,
    SessionRequest,
)
from fedra_server.modelbook.graphs.making import finish_graphs, forward_graphs, pack_graph
from tests.fuzz.targets import DELTA_SHAPES, WIRE_TYPES
from tests.support.builders import (
    make_adapter,
    make_calibration,
    make_delta,
    make_digest,
    make_evaluation,
    make_manifest,
    make_model_spec,
    make_profile,
    make_revision_manifest,
)

_CERTIFICATE: Final = ssl.DER_cert_to_PEM_cert(bytes(range(90)))
CORPUS: Final = Path(__file__).parent / "corpus"
_VIT: Final = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


def tensors() -> Iterator[bytes]:
    """Files as adapters, as pieces in 16 bits, with metadata, and with nothing in them."""
    yield serialize_tensors({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    yield serialize_tensors({})
    ints = {name: np.arange(3).astype(name) for name in ("int64", "int32", "int8", "uint8", "bool")}
    yield serialize_tensors({**ints, "scalar": np.array(1.0), "empty": np.zeros((0, 2), "<f4")})
    halves = {str(dtype): torch.ones(5, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    yield save(halves, metadata={"format": "pt"})


def delta() -> Iterator[bytes]:
    """A delta that must be admitted, and one for each way to be almost that."""
    good = {name: np.ones(shape, np.float32) for name, shape in DELTA_SHAPES.items()}
    name = min(good)
    yield serialize_tensors(good)
    yield serialize_tensors({**good, name: np.full(good[name].shape, np.nan, np.float32)})
    yield serialize_tensors({**good, name: good[name].astype(np.float16)})
    yield serialize_tensors({**good, "layers.2/q.lora_a": good[name]})


def wire() -> Iterator[bytes]:
    """One message of each type, behind the byte that names it."""
    task = EvaluationTask(
        run="run",
        model_id=make_digest("model"),
        revision=make_revision_manifest(),
        adapter=make_adapter(),
    )
    problem = Problem.of(ProblemCode.NOT_FOUND, status=404, detail="gone", remedy="Look elsewhere.")
    messages: list[tuple[Any, BaseModel]] = [
        (Assignment, Train(manifest=make_manifest(), evaluate=task)),
        (Assignment, Wait(reason="wait", calibrate=make_digest("model"), evaluate=task)),
        (Assignment, Stop(reason="over")),
    ]
    messages += [
        (type(message), message)
        for message in (
            make_delta(),
            EnrolRequest(
                name="plant 7",
                profile=make_profile(max_layers=3),
                run="run",
                public_key="k" * 43,
                join_secret="ab12-secret",  # noqa: S106
                signature="g" * 85 + "w",
            ),
            RejoinRequest(profile=make_profile(), name="plant 8"),
            make_calibration(make_model_spec()),
            make_evaluation(),
            Heartbeat(assignment_id="assignment-1", steps_done=1, steps_total=2),
            FailureReport(detail="no memory"),
            make_model_spec(),
            problem,
            SessionRequest(client_id="client-1", challenge="1.2.3", signature="g" * 85 + "A"),
            KeyChange(
                public_key="k" * 42 + "s",
                signature="g" * 85 + "Q",
                previous_signature="g" * 85 + "w",
            ),
            Authority(ca_pem=_CERTIFICATE, ca_sha256=make_digest("ca")),
            Challenge(challenge="1.2.3", expires_in_s=60),
        )
    ]
    for kind, message in messages:
        yield bytes([WIRE_TYPES.index(kind)]) + message.model_dump_json(exclude_none=True).encode()


def graphs() -> Iterator[bytes]:
    """The graphs of a small vision transformer, as clients get them."""
    made = finish_graphs(
        forward_graphs("vit", _VIT, 3), ("attention.o_proj",), ("classifier.weight",)
    )
    for graph in (made.stem, made.block, made.block_vjp, made.head, made.head_vjp):
        yield pack_graph(graph)


def trust() -> Iterator[bytes]:
    """Join strings for a host, a path and an address; a certificate; a key."""
    for address in ("https://hq.example:8470", "https://hq/fedra", "http://[::1]:8470"):
        yield str(JoinString(address, "ab12-secret", make_digest("ca"))).encode()
    yield _CERTIFICATE.encode()
    yield b"k" * 42 + b"s"


def headers() -> Iterator[bytes]:
    """Sizes with ranges of every form, digests, offsets, and versions of any length."""
    for text in ("100 bytes=0-9", "100 bytes=90-", "100 bytes=-5", "0 bytes=-0", "5 bytes=0-1,3-4"):
        yield text.encode()
    yield b"100 65536"
    yield b"100 1.1"
    yield b"100 " + format_digest(make_digest("body")).encode()
    yield b"100 2" + b"0" * 5000  # as a version and as an offset
    yield b"100 1." + b"9" * 5000


SEEDS: Final = {
    "tensors": tensors, "delta": delta, "wire": wire, "graphs": graphs, "trust": trust,
    "headers": headers,
}  # fmt: skip


def main() -> None:
    """Write what is missing; what fuzzing has added stays."""
    for name, seeds in SEEDS.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, seed in enumerate(seeds()):
            (folder / f"seed-{index}").write_bytes(seed)


if __name__ == "__main__":
    main()
