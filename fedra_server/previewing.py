"""What the next round of a run would look like with the clients known now. Writes nothing.

``RoundPreview.model_dump_json()`` is stable: fields may be added, none is renamed or removed.
Bytes are bytes, times ``*_s`` are seconds, layers are global ids and ``coverage[i]`` belongs to
layer i. In full:

    run, state, model, spec, num_layers
    round: the number of the next round, or null when none is to come
    training_s: how long training may take of it
    coverage: [how many of those who are ready would train each layer]
    holders_needed: how many must, for the run's merge to take a layer; with fewer it stays as it is
    clients: [{client_id, name, is_online, reason, work, profile, calibration}], all members;
        reason is "ready", or why it would be left out; calibration is null until it has measured
    work: null when the machine does not fit, or is not known, else {depth, residency,
        num_layers, trained_layer_ids, micro_batch, walk_batch, steps, step_s,
        predicted_peak_bytes, why_not_more}; trained_layer_ids are what the next draw gives to
        who is ready, null for the others, whose costs are those of the costliest draw
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol.devices import Calibration, DeviceProfile
from fedra_edge.protocol.fitting import Unfit, Work, fit_work
from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_edge.protocol.slices import Depth, Residency
from fedra_server.choosing import Population
from fedra_server.planning import PlannedSlice, plan_round, round_generator
from fedra_server.reporting import READY
from fedra_server.rounds import draw_size
from fedra_server.runs import AssignmentState, RunSpec, RunState
from fedra_server.storage.histories import RunHistory
from fedra_server.storage.records import ClientRecord

_OVER = frozenset({RunState.FINISHED, RunState.STOPPED})
_GIVEN_UP = frozenset(
    {
        AssignmentState.FAILED,
        AssignmentState.REFUSED,
        AssignmentState.EXPIRED,
        AssignmentState.QUARANTINED,
        AssignmentState.DISCARDED,
    }
)


class _Preview(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkPreview(_Preview):
    """What a client would be given."""

    depth: Depth
    residency: Residency
    num_layers: int
    trained_layer_ids: tuple[LayerId, ...] | None
    micro_batch: int
    walk_batch: int
    steps: int
    step_s: float
    predicted_peak_bytes: int
    why_not_more: str


class ClientPreview(_Preview):
    """A member, what it has, and what it would be given or why it would not."""

    client_id: ClientId
    name: str
    is_online: bool
    reason: str
    work: WorkPreview | None
    profile: DeviceProfile
    calibration: Calibration | None


class RoundPreview(_Preview):
    """The next round of a run; the module says what each field holds."""

    run: str
    state: RunState
    model: str
    spec: RunSpec
    num_layers: int
    round: int | None
    training_s: float
    coverage: tuple[int, ...]
    holders_needed: int
    clients: tuple[ClientPreview, ...]

    @property
    def short_layer_ids(self) -> tuple[int, ...]:
        """The layers that would stay as they are because too few would train them."""
        return tuple(
            layer for layer, count in enumerate(self.coverage) if count < self.holders_needed
        )

    @property
    def num_ready(self) -> int:
        """How many would take part."""
        return sum(client.reason == READY for client in self.clients)


def preview_round(history: RunHistory, seen_since: float, now: float = 0.0) -> RoundPreview:
    """Plan the next round as the coordinator would if it opened it now.

    A round that is under way is taken to end well, so its participants are free for the next.
    """
    run, spec = history.run, history.model.spec
    number = _next_number(history)
    population = history.population(seen_since, now)
    planned: list[PlannedSlice] = []
    if number is not None:
        generator = round_generator(run.spec, number, 0)
        candidates = population.candidates(run.run)
        planned = plan_round(
            candidates,
            spec,
            run.spec,
            _last_trained(history),
            generator,
            places=draw_size(run.spec),
        )
    drawn = {item.client_id: item for item in planned}
    return RoundPreview(
        run=run.run,
        state=run.state,
        model=spec.name,
        spec=run.spec,
        num_layers=spec.num_layers,
        round=number,
        training_s=run.spec.terms.training_s,
        coverage=_coverage(planned, spec.num_layers),
        holders_needed=run.spec.holders_needed,
        clients=tuple(_client(it, history, population, drawn) for it in population.clients),
    )


def _next_number(history: RunHistory) -> int | None:
    last = max((record.number for record in history.rounds), default=0)
    is_over = history.run.state in _OVER or last >= history.run.spec.rounds
    return None if is_over else last + 1


def _last_trained(history: RunHistory) -> Sequence[int]:
    """Give the round in which each layer was last trained, once the open round is merged."""
    latest = max(history.revisions, key=lambda revision: revision.manifest.number)
    last_trained = list(latest.last_trained)
    under_way = {record.number for record in history.rounds if record.published_at is None}
    for assignment in history.assignments:
        if assignment.round_number in under_way and assignment.state not in _GIVEN_UP:
            for layer_id in assignment.manifest.trained_layer_ids:
                last_trained[layer_id] = assignment.round_number
    return last_trained


def _coverage(planned: Iterable[PlannedSlice], num_layers: int) -> tuple[int, ...]:
    trained = [layer_id for item in planned for layer_id in item.trained_layer_ids]
    return tuple(trained.count(LayerId(layer)) for layer in range(num_layers))


def _client(
    client: ClientRecord,
    history: RunHistory,
    population: Population,
    drawn: Mapping[ClientId, PlannedSlice],
) -> ClientPreview:
    run, calibration = history.run, population.calibrations.get(client.client_id)
    obstacle = population.obstacle(client, run.run)
    fit: Work | Unfit | None = None
    if calibration is not None:
        fit = fit_work(client.profile, calibration, history.model.spec, run.spec.terms)
    return ClientPreview(
        client_id=client.client_id,
        name=client.name,
        is_online=client.is_there(population.seen_since),
        reason=fit.reason if isinstance(fit, Unfit) else obstacle or READY,
        work=_work(fit, drawn.get(client.client_id)) if isinstance(fit, Work) else None,
        profile=client.profile,
        calibration=calibration,
    )


def _work(fit: Work, drawn: PlannedSlice | None) -> WorkPreview:
    work = fit if drawn is None else drawn.work
    return WorkPreview(
        depth=work.depth,
        residency=work.plan.residency,
        num_layers=work.num_layers,
        trained_layer_ids=None if drawn is None else drawn.trained_layer_ids,
        micro_batch=work.plan.micro_batch,
        walk_batch=work.plan.walk_batch,
        steps=work.steps,
        step_s=work.step_s,
        predicted_peak_bytes=work.predicted_peak_bytes,
        why_not_more=work.why_not_more,
    )
