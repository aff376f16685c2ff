"""Turns a planned slice into the assignment that its client will be handed."""

from __future__ import annotations

import secrets

from fedra_edge.protocol.ids import AssignmentId, RoundNumber
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.planning import PlannedSlice
from fedra_server.runs import AssignmentState
from fedra_server.storage.records import AssignmentRecord, RevisionRecord, RunRecord


def assign(
    run: RunRecord, base: RevisionRecord, round_number: int, planned: PlannedSlice, now: float
) -> AssignmentRecord:
    """Give a planned slice an id of its own, its base revision and the run's settings."""
    work = planned.work
    assignment_id = AssignmentId(secrets.token_urlsafe(16))
    manifest = SliceManifest(
        assignment_id=assignment_id,
        run=run.run,
        round_number=RoundNumber(round_number),
        model_id=run.model_id,
        revision=base.manifest,
        adapter=run.spec.adapter,
        training=run.spec.training,
        layers=planned.layers,
        depth=work.depth,
        residency=work.plan.residency,
        micro_batch=work.plan.micro_batch,
        walk_batch=work.plan.walk_batch,
        steps=work.steps,
        seed=planned.seed,
        remaining_s=run.spec.deadline_s,
        predicted_peak_bytes=work.predicted_peak_bytes,
        graphs=run.spec.graphs,
    )
    return AssignmentRecord(
        assignment_id=assignment_id,
        run=run.run,
        round_number=round_number,
        client_id=planned.client_id,
        manifest=manifest,
        chance=planned.chance,
        reason=work.reason,
        state=AssignmentState.PENDING,
        detail="",
        delta=None,
        issued_at=now,
        settled_at=None,
    )
