"""Tells a client what to do next, from the records alone. Reads, never writes."""

from __future__ import annotations

from collections.abc import Sequence

from fedra_edge.protocol.fitting import Unfit, fit_work, why_not_on
from fedra_edge.protocol.rounds import Assignment, EvaluationTask, Stop, Train, Wait
from fedra_server.choosing import resting
from fedra_server.runs import RunState
from fedra_server.storage.records import (
    AssignmentRecord,
    ClientRecord,
    RevisionRecord,
    RunRecord,
)
from fedra_server.storage.store import Store

_ACTIVE = frozenset({RunState.RUNNING, RunState.PAUSED})
_OVER = frozenset({RunState.FINISHED, RunState.STOPPED})


def guide(store: Store, client: ClientRecord, now: float) -> Assignment:
    """Give a client its open assignment, else something useful to do while it waits."""
    return find_work(store, client, now) or explain_waiting(store, client, now)


def find_work(store: Store, client: ClientRecord, now: float) -> Assignment | None:
    """Give a client what it can do at once, or None."""
    assignment = store.open_assignment(client.client_id)
    if assignment is not None:
        return _train(store, client, assignment, now)
    runs = _runs_of(store, client)
    active = [run for run in runs if run.state in _ACTIVE]
    for run in active:
        if _lacks_calibration(store, client, run):
            reason = f"run {run.run} needs to know what its model costs on this machine"
            return Wait(reason=reason, calibrate=run.model_id)
    for run in runs:
        task = _final_evaluation(store, client, run)
        if task is not None:
            return Wait(reason=f"run {run.run} is over; evaluate its last revision", evaluate=task)
    if not active and client.run is not None and runs and runs[0].state in _OVER:
        return Stop(reason=f"run {client.run} is {runs[0].state}")
    return None


def explain_waiting(store: Store, client: ClientRecord, now: float) -> Wait:
    """Say why there is nothing that a client could do."""
    runs = _runs_of(store, client)
    reasons = [_why_waiting(store, client, run, now) for run in runs if run.state in _ACTIVE]
    return Wait(reason="; ".join(reasons)[:4000] or _why_nothing(runs))


def _runs_of(store: Store, client: ClientRecord) -> list[RunRecord]:
    return [run for run in store.runs() if client.run in {None, run.run}]


def _train(
    store: Store, client: ClientRecord, assignment: AssignmentRecord, now: float
) -> Assignment:
    """Hand out the slice, with the time left by the server's clock."""
    run = store.run(assignment.run)
    remaining_s = _remaining_s(store, run, assignment, now)
    manifest = assignment.manifest.model_copy(update={"remaining_s": remaining_s})
    base = store.revision(run.run, manifest.revision.number)
    calibration = store.calibration(client.client_id, run.model_id)
    has_none = calibration is not None and calibration.held_out_examples == 0
    task = None if has_none else _evaluation(store, client, run, base)
    return Train(manifest=manifest, evaluate=task)


def _remaining_s(store: Store, run: RunRecord, assignment: AssignmentRecord, now: float) -> float:
    """Give how long a slice is waited for; in a buffered run each has its own time."""
    current = store.current_round(run.run)
    deadline_at = assignment.issued_at + run.spec.deadline_s
    if run.spec.mode == "synchronous":
        is_open = current is not None and current.number == assignment.round_number
        deadline_at = current.deadline_at if current is not None and is_open else now
    return min(max(0.0, deadline_at - now), run.spec.deadline_s)


def _lacks_calibration(store: Store, client: ClientRecord, run: RunRecord) -> bool:
    """Tell whether a client could take part in a run but has not measured its model."""
    is_unknown = store.calibration(client.client_id, run.model_id) is None
    return is_unknown and _why_not_here(store, client, run) is None


def _why_not_here(store: Store, client: ClientRecord, run: RunRecord) -> str | None:
    """Tell why a client's training runtime cannot compute a run; None when it can."""
    return why_not_on(client.profile.backend, store.model(run.model_id).spec, run.spec.terms)


def _why_waiting(store: Store, client: ClientRecord, run: RunRecord, now: float) -> str:
    """Explain why an active run has no work for this client now."""
    calibration = store.calibration(client.client_id, run.model_id)
    if calibration is None:
        obstacle = _why_not_here(store, client, run)
        if obstacle is not None:
            return f"this machine cannot take part in run {run.run}: {obstacle}"
        return f"run {run.run} needs to know what its model costs on this machine"
    fit = fit_work(client.profile, calibration, store.model(run.model_id).spec, run.spec.terms)
    if isinstance(fit, Unfit):
        return f"this machine cannot take part in run {run.run}: {fit.reason}"
    return f"run {run.run} {_what_it_waits_for(store, client, run, now)}"


def _what_it_waits_for(store: Store, client: ClientRecord, run: RunRecord, now: float) -> str:
    """Say why a run gives no work to a client that could do some."""
    if run.state is RunState.PAUSED:
        return "is paused"
    rest = resting(store.setbacks(run.run, client.client_id), now).get(client.client_id)
    if rest is not None:
        return f"gives this machine a rest: it {rest}"
    if store.current_round(run.run) is None:
        return f"waits until {run.spec.min_participants} participants are ready"
    if run.spec.mode == "buffered":
        return "has no work for this machine now"
    return "waits for other participants"


def _why_nothing(runs: Sequence[RunRecord]) -> str:
    """Explain why no run is active, by the latest of those that were started."""
    started = [run for run in runs if run.state is not RunState.CREATED]
    if started and started[-1].state is RunState.STOPPED:
        return f"no run is active; run {started[-1].run} was stopped"
    return "no run is active"


def _final_evaluation(store: Store, client: ClientRecord, run: RunRecord) -> EvaluationTask | None:
    """Ask for the accuracy of a finished run's last revision, once."""
    if run.state is not RunState.FINISHED:
        return None
    calibration = store.calibration(client.client_id, run.model_id)
    if calibration is None or calibration.held_out_examples == 0:
        return None
    return _evaluation(store, client, run, store.revision(run.run))


def _evaluation(
    store: Store, client: ClientRecord, run: RunRecord, revision: RevisionRecord
) -> EvaluationTask | None:
    """Ask for the accuracy of a revision, once."""
    number = revision.manifest.number
    if _why_not_here(store, client, run):
        return None
    if store.has_evaluation(client.client_id, run.run, number):
        return None
    return EvaluationTask(
        run=run.run,
        model_id=run.model_id,
        revision=revision.manifest,
        adapter=run.spec.adapter,
        graphs=run.spec.graphs,
    )
