"""Turning rows into records and back; the JSON columns are the protocol's own values."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Row

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.devices import DeviceProfile
from fedra_edge.protocol.ids import AssignmentId, ClientId, ModelId, RunId, UploadId
from fedra_edge.protocol.models import BlobRef, ModelSpec
from fedra_edge.protocol.rounds import Evaluation
from fedra_edge.protocol.slices import RevisionManifest, SliceManifest
from fedra_server.runs import AssignmentState, RunSpec, RunState
from fedra_server.screening import Outcome, Verdict
from fedra_server.storage.records import (
    AssignmentRecord,
    ClientRecord,
    EvaluationRecord,
    MergeRecord,
    ModelRecord,
    RevisionRecord,
    RoundRecord,
    RunRecord,
    ScreeningRecord,
    TokenRecord,
    UploadRecord,
)

Values = dict[str, object]
AnyRow = Row[Any]
_SCREENING_COLUMNS = tuple(column.name for column in fields(ScreeningRecord))
_read_profile = lru_cache(256)(DeviceProfile.model_validate_json)
_read_run_spec = lru_cache(64)(RunSpec.model_validate_json)
_read_manifest = lru_cache(32)(SliceManifest.model_validate_json)
_read_delta = lru_cache(32)(DeltaManifest.model_validate_json)
"""The same texts are read many times while a round goes on; what they say is frozen."""
_NUMBERS = TypeAdapter(tuple[int, ...])
_BLOBS = TypeAdapter(tuple[BlobRef | None, ...])


def client_values(record: ClientRecord, public_key: str) -> Values:
    """Give the columns of a client."""
    return {
        "client_id": record.client_id,
        "name": record.name,
        "public_key": public_key,
        "run": record.run,
        "profile": record.profile.model_dump_json(),
        "enrolled_at": record.enrolled_at,
        "last_seen_at": record.last_seen_at,
        "is_online": record.is_online,
        "has_left": record.has_left,
    }


def client_record(row: AnyRow) -> ClientRecord:
    """Read a client."""
    return ClientRecord(
        client_id=ClientId(row.client_id),
        name=row.name,
        run=row.run,
        profile=_read_profile(row.profile),
        enrolled_at=row.enrolled_at,
        last_seen_at=row.last_seen_at,
        is_online=row.is_online,
        has_left=row.has_left,
    )


def token_values(record: TokenRecord, secret_sha256: str) -> Values:
    """Give the columns of a join token."""
    return {**asdict(record), "secret_sha256": secret_sha256}


def token_record(row: AnyRow) -> TokenRecord:
    """Read a join token."""
    return TokenRecord(
        token_id=row.token_id,
        label=row.label,
        client_id=None if row.client_id is None else ClientId(row.client_id),
        created_at=row.created_at,
        expires_at=row.expires_at,
        uses_allowed=row.uses_allowed,
        uses_left=row.uses_left,
        revoked_at=row.revoked_at,
    )


def model_record(row: AnyRow) -> ModelRecord:
    """Read a model."""
    spec = ModelSpec.model_validate_json(row.spec)
    return ModelRecord(model_id=ModelId(row.model_id), spec=spec, added_at=row.added_at)


def run_values(record: RunRecord) -> Values:
    """Give the columns of a run."""
    return {
        "run": record.run,
        "model_id": record.model_id,
        "spec": record.spec.model_dump_json(),
        "state": record.state.value,
        "created_at": record.created_at,
        "pruned_through": record.pruned_through,
    }


def run_record(row: AnyRow) -> RunRecord:
    """Read a run."""
    return RunRecord(
        run=RunId(row.run),
        model_id=ModelId(row.model_id),
        spec=_read_run_spec(row.spec),
        state=RunState(row.state),
        created_at=row.created_at,
        pruned_through=row.pruned_through,
    )


def revision_values(record: RevisionRecord) -> Values:
    """Give the columns of a revision."""
    return {
        "run": record.run,
        "number": record.manifest.number,
        "manifest": record.manifest.model_dump_json(),
        "last_trained": _NUMBERS.dump_json(record.last_trained).decode(),
        "published_at": record.published_at,
        "versions": _NUMBERS.dump_json(record.versions).decode(),
        "moments": _BLOBS.dump_json(record.moments).decode(),
    }


def revision_record(row: AnyRow) -> RevisionRecord:
    """Read a revision."""
    return RevisionRecord(
        run=RunId(row.run),
        manifest=RevisionManifest.model_validate_json(row.manifest),
        last_trained=_NUMBERS.validate_json(row.last_trained),
        published_at=row.published_at,
        versions=_NUMBERS.validate_json(row.versions),
        moments=_BLOBS.validate_json(row.moments),
    )


def merge_values(record: MergeRecord) -> Values:
    """Give the columns of a merge."""
    return {
        "assignment_id": record.assignment_id,
        "piece": record.piece,
        "run": record.run,
        "revision": record.revision,
        "weight": record.weight,
        "staleness": record.staleness,
        "scale": record.scale,
    }


def merge_record(row: AnyRow) -> MergeRecord:
    """Read a merge."""
    return MergeRecord(
        assignment_id=AssignmentId(row.assignment_id),
        piece=row.piece,
        run=RunId(row.run),
        revision=row.revision,
        weight=row.weight,
        staleness=row.staleness,
        scale=row.scale,
    )


def screening_values(record: ScreeningRecord) -> Values:
    """Give the columns of a screening."""
    columns: Values = {name: getattr(record, name) for name in _SCREENING_COLUMNS}
    outcome = None if record.outcome is None else record.outcome.value
    return {**columns, "verdict": record.verdict.value, "outcome": outcome}


def screening_record(row: AnyRow) -> ScreeningRecord:
    """Read a screening."""
    return ScreeningRecord(
        assignment_id=AssignmentId(row.assignment_id),
        piece=row.piece,
        run=RunId(row.run),
        revision=row.revision,
        judgement=row.judgement,
        norm=row.norm,
        cosine=row.cosine,
        scale=row.scale,
        verdict=Verdict(row.verdict),
        reason=row.reason,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        judged_at=row.judged_at,
    )


def round_values(record: RoundRecord) -> Values:
    """Give the columns of a round."""
    return {
        "run": record.run,
        "number": record.number,
        "base_revision": record.base_revision,
        "draws": record.draws,
        "opened_at": record.opened_at,
        "deadline_at": record.deadline_at,
        "published_at": record.published_at,
    }


def round_record(row: AnyRow) -> RoundRecord:
    """Read a round."""
    return RoundRecord(
        run=RunId(row.run),
        number=row.number,
        base_revision=row.base_revision,
        draws=row.draws,
        opened_at=row.opened_at,
        deadline_at=row.deadline_at,
        published_at=row.published_at,
    )


def assignment_values(record: AssignmentRecord) -> Values:
    """Give the columns of an assignment."""
    return {
        "assignment_id": record.assignment_id,
        "run": record.run,
        "round_number": record.round_number,
        "client_id": record.client_id,
        "manifest": record.manifest.model_dump_json(),
        "chance": record.chance,
        "reason": record.reason,
        "state": record.state.value,
        "detail": record.detail,
        "delta": None if record.delta is None else record.delta.model_dump_json(),
        "issued_at": record.issued_at,
        "settled_at": record.settled_at,
    }


def assignment_record(row: AnyRow) -> AssignmentRecord:
    """Read an assignment."""
    return AssignmentRecord(
        assignment_id=AssignmentId(row.assignment_id),
        run=RunId(row.run),
        round_number=row.round_number,
        client_id=ClientId(row.client_id),
        manifest=_read_manifest(row.manifest),
        chance=row.chance,
        reason=row.reason,
        state=AssignmentState(row.state),
        detail=row.detail,
        delta=None if row.delta is None else _read_delta(row.delta),
        issued_at=row.issued_at,
        settled_at=row.settled_at,
    )


def upload_values(record: UploadRecord) -> Values:
    """Give the columns of an upload."""
    return {
        "upload_id": record.upload_id,
        "assignment_id": record.assignment_id,
        "client_id": record.client_id,
        "delta": record.delta.model_dump_json(),
        "created_at": record.created_at,
    }


def upload_record(row: AnyRow) -> UploadRecord:
    """Read an upload."""
    return UploadRecord(
        upload_id=UploadId(row.upload_id),
        assignment_id=AssignmentId(row.assignment_id),
        client_id=ClientId(row.client_id),
        delta=_read_delta(row.delta),
        created_at=row.created_at,
    )


def evaluation_record(row: AnyRow) -> EvaluationRecord:
    """Read an evaluation."""
    evaluation = Evaluation.model_validate_json(row.evaluation)
    return EvaluationRecord(client_id=ClientId(row.client_id), evaluation=evaluation)
