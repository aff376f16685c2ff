"""Steering runs, for the command line and for operators over HTTP alike."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict

from fedra_server.errors import ConflictError
from fedra_server.runs import RunSpec, RunState
from fedra_server.storage.records import RunRecord
from fedra_server.storage.store import Store


class RunStep(StrEnum):
    """What an operator may have a run do; ``start`` also goes on with a paused one."""

    START = "start"
    PAUSE = "pause"
    STOP = "stop"


_AFTER: Final = {
    RunStep.START: RunState.RUNNING,
    RunStep.PAUSE: RunState.PAUSED,
    RunStep.STOP: RunState.STOPPED,
}
_BEFORE: Final = {
    RunStep.START: frozenset({RunState.CREATED, RunState.PAUSED}),
    RunStep.PAUSE: frozenset({RunState.RUNNING}),
    RunStep.STOP: frozenset({RunState.CREATED, RunState.RUNNING, RunState.PAUSED}),
}


class RunSummary(BaseModel):
    """A run in short."""

    model_config = ConfigDict(frozen=True)

    run: str
    model: str
    state: RunState
    rounds_published: int
    rounds_planned: int
    created_at: float
    spec: RunSpec


def steer(store: Store, run: str, step: RunStep, by: str) -> RunRecord:
    """Have a run start, pause or stop.

    Raises:
        NotFoundError: No such run.
        ConflictError: Its state does not allow this, or is the wanted one already.
    """
    state = _AFTER[step]
    if store.run(run).state is state:
        raise ConflictError(f"run {run!r} is {state} already")
    return store.set_run_state(run, state, _BEFORE[step], by)


def summarize_run(store: Store, record: RunRecord) -> RunSummary:
    """Tell of a run in short."""
    return RunSummary(
        run=record.run,
        model=store.model(record.model_id).spec.name,
        state=record.state,
        rounds_published=store.revision(record.run).manifest.number,
        rounds_planned=record.spec.rounds,
        created_at=record.created_at,
        spec=record.spec,
    )
