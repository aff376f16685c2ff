"""Valid values of every kind for tests; any field can be chosen by its name."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from fedra_edge.protocol.deltas import DeltaManifest, TrainingReport
from fedra_edge.protocol.devices import BlockMemory, Calibration, DeviceProfile
from fedra_edge.protocol.ids import (
    AssignmentId,
    ClientId,
    ModelId,
    RevisionNumber,
    RunId,
    UploadId,
)
from fedra_edge.protocol.models import (
    AdapterSpec,
    BlobRef,
    ImageInput,
    ModelSpec,
    Piece,
    PieceCost,
)
from fedra_edge.protocol.rounds import Evaluation
from fedra_edge.protocol.slices import RevisionManifest, SliceManifest
from fedra_server.runs import AssignmentState, RunSpec, RunState
from fedra_server.storage.records import (
    AssignmentRecord,
    ClientRecord,
    RevisionRecord,
    RoundRecord,
    RunRecord,
    UploadRecord,
)

RUN = RunId("run")
NOW = 1_000.0
_HIDDEN = 8
_LABELS = ("zero", "one", "two")


def make_digest(text: str) -> str:
    """Give the sha256 of a text, a valid digest for anything that has a name."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_blob(name: str, size_bytes: int = 64) -> BlobRef:
    return BlobRef(sha256=make_digest(name), size_bytes=size_bytes)


def make_profile(**fields: object) -> DeviceProfile:
    return DeviceProfile.model_validate(
        {
            "platform": "Linux-x86_64",
            "python": "3.11.7",
            "backend": "torch",
            "cpu_count": 2.0,
            "memory_bytes": 4 * 2**30,
            "baseline_bytes": 300 * 2**20,
            "disk_free_bytes": 2**36,
            **fields,
        }
    )


def make_piece(name: str) -> Piece:
    cost = PieceCost(
        parameter_bytes=4_000, activation_bytes=10_000, boundary_bytes=512, forward_flops=10_000
    )
    return Piece(weights=make_blob(name, size_bytes=4_000), cost=cost)


def make_model_spec(num_layers: int = 4, **fields: object) -> ModelSpec:
    """Describe a tiny image classifier with two linear modules per block."""
    return ModelSpec.model_validate(
        {
            "name": "tiny",
            "family": "vit",
            "config": {"hidden_size": _HIDDEN, "num_hidden_layers": num_layers},
            "labels": _LABELS,
            "input": ImageInput(size_px=8, channels=1, mean=(0.5,), std=(0.5,)),
            "stem": make_piece("stem"),
            "layers": tuple(make_piece(f"layer {index}") for index in range(num_layers)),
            "head": make_piece("head"),
            "block_linears": {
                "attention.o_proj": (_HIDDEN, _HIDDEN),
                "mlp.fc2": (_HIDDEN, 2 * _HIDDEN),
            },
            "default_targets": ("attention.o_proj", "mlp.fc2"),
            "head_parameters": {
                "classifier.weight": (len(_LABELS), _HIDDEN),
                "classifier.bias": (len(_LABELS),),
            },
            **fields,
        }
    )


def make_adapter(**fields: object) -> AdapterSpec:
    values = {"rank": 2, "alpha": 4.0, "targets": ("attention.o_proj", "mlp.fc2")}
    return AdapterSpec.model_validate({**values, **fields})


def make_run_spec(**fields: object) -> RunSpec:
    return RunSpec.model_validate({"adapter": make_adapter(), **fields})


def make_revision_manifest(number: int = 0, num_layers: int = 4) -> RevisionManifest:
    return RevisionManifest(
        number=RevisionNumber(number),
        layers=tuple(make_blob(f"adapter {number} {index}") for index in range(num_layers)),
        head=make_blob(f"head {number}"),
    )


def make_manifest(**fields: object) -> SliceManifest:
    """Describe a slice of full depth that trains layers 1 and 3 of the tiny model."""
    trained = (1, 3)
    layers = [
        {"layer_id": index, "role": "train" if index in trained else "frozen"} for index in range(4)
    ]
    return SliceManifest.model_validate(
        {
            "assignment_id": "assignment-1",
            "run": RUN,
            "round_number": 1,
            "model_id": make_model_spec().model_id,
            "revision": make_revision_manifest(),
            "adapter": make_adapter(),
            "training": {},
            "layers": layers,
            "depth": "full",
            "residency": "resident",
            "micro_batch": 8,
            "steps": 10,
            "seed": 7,
            "remaining_s": 60.0,
            "predicted_peak_bytes": 2**29,
            **fields,
        }
    )


def make_training_report(**fields: object) -> TrainingReport:
    """Report a short, successful training."""
    return TrainingReport.model_validate(
        {
            "steps": 3,
            "first_loss": 2.0,
            "last_loss": 1.0,
            "train_s": 0.5,
            "peak_memory_bytes": 10**8,
            "predicted_peak_bytes": 11 * 10**7,
            "residency": "resident",
            "micro_batch": 8,
            "bytes_received": 1000,
            "bytes_sent": 1000,
            **fields,
        }
    )


def make_delta(assignment_id: str = "assignment-1", **fields: object) -> DeltaManifest:
    return DeltaManifest.model_validate(
        {
            "assignment_id": assignment_id,
            "sha256": make_digest(f"delta of {assignment_id}"),
            "size_bytes": 1_000,
            "num_examples": 100,
            "report": make_training_report(),
            **fields,
        }
    )


def make_block_memory(**fields: int) -> BlockMemory:
    """Give the memory of a block on a machine where an idle client takes 100 MB."""
    return BlockMemory.model_validate(
        {
            "idle_bytes": 10**8,
            "fixed_bytes": 10**6,
            "working_bytes": 5 * 10**6,
            "kept_bytes": 3 * 10**6,
            "kept_frozen_bytes": 2 * 10**6,
            **fields,
        }
    )


def make_calibration(spec: ModelSpec, **fields: object) -> Calibration:
    return Calibration.model_validate(
        {
            "model_id": spec.model_id,
            "forward_s": 0.001,
            "backward_s": 0.002,
            "memory": make_block_memory(),
            "train_examples": 100,
            "held_out_examples": 25,
            **fields,
        }
    )


def make_evaluation(revision: int = 0, **fields: object) -> Evaluation:
    return Evaluation.model_validate(
        {
            "run": RUN,
            "revision": revision,
            "num_examples": 20,
            "num_correct": 10,
            "loss_sum": 30.0,
            **fields,
        }
    )


def make_client(client_id: str = "client-1", name: str = "") -> ClientRecord:
    return ClientRecord(
        client_id=ClientId(client_id),
        name=name or f"plant {client_id}",
        run=None,
        profile=make_profile(),
        enrolled_at=NOW,
        last_seen_at=NOW,
        is_online=True,
        has_left=False,
    )


def make_run(name: str = RUN, state: RunState = RunState.RUNNING) -> RunRecord:
    model_id = ModelId(make_model_spec().model_id)
    return RunRecord(RunId(name), model_id, make_run_spec(), state, created_at=NOW)


def make_revision(number: int = 0, run: str = RUN) -> RevisionRecord:
    manifest = make_revision_manifest(number)
    return RevisionRecord(
        run=RunId(run),
        manifest=manifest,
        last_trained=(number,) * 4,
        published_at=NOW + number,
        versions=(number,) * 5,
        moments=(None,) * 5,
    )


def make_round(number: int = 1, run: str = RUN) -> RoundRecord:
    return RoundRecord(
        run=RunId(run),
        number=number,
        base_revision=number - 1,
        draws=1,
        opened_at=NOW + number,
        deadline_at=NOW + number + 60,
        published_at=None,
    )


def make_assignment(
    assignment_id: str = "assignment-1",
    client_id: str = "client-1",
    *,
    round_number: int = 1,
    state: AssignmentState = AssignmentState.PENDING,
    **slice_fields: object,
) -> AssignmentRecord:
    """Hand out a slice; further fields are the slice manifest's."""
    fields = {"assignment_id": assignment_id, "round_number": round_number, **slice_fields}
    manifest = make_manifest(**fields)
    record = AssignmentRecord(
        assignment_id=AssignmentId(assignment_id),
        run=RunId(manifest.run),
        round_number=round_number,
        client_id=ClientId(client_id),
        manifest=manifest,
        chance=0.5,
        reason="fits in 4 GB",
        state=state,
        detail="",
        delta=None,
        issued_at=NOW + round_number,
        settled_at=None,
    )
    if state in {AssignmentState.ADMITTED, AssignmentState.MERGED}:
        return replace(record, delta=make_delta(assignment_id), settled_at=NOW + round_number + 1)
    return record


def make_upload(upload_id: str = "upload-1", assignment_id: str = "assignment-1") -> UploadRecord:
    return UploadRecord(
        upload_id=UploadId(upload_id),
        assignment_id=AssignmentId(assignment_id),
        client_id=ClientId("client-1"),
        delta=make_delta(assignment_id),
        created_at=NOW,
    )
