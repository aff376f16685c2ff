"""Plans a round: from the machines that are there to one slice for each of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedra_edge.protocol.devices import Calibration, DeviceProfile
from fedra_edge.protocol.fitting import Machine, Unfit, Work, fit_work
from fedra_edge.protocol.footprint import SliceShape
from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import LayerRole
from fedra_server.allocation import draw_allocation
from fedra_server.runs import RunSpec

_MAX_SEED = 2**62


@dataclass(frozen=True)
class Candidate:
    """A live client that could take part."""

    client_id: ClientId
    profile: DeviceProfile
    calibration: Calibration


@dataclass(frozen=True)
class PlannedSlice:
    """One participant's slice; ``chance`` is its probability to train any given layer."""

    client_id: ClientId
    work: Work
    layers: tuple[LayerRole, ...]
    chance: float
    seed: int

    @property
    def trained_layer_ids(self) -> tuple[LayerId, ...]:
        """The layers that it trains, ascending."""
        return tuple(layer.layer_id for layer in self.layers if layer.role == "train")


def round_generator(run: RunSpec, round_number: int, draw: int) -> np.random.Generator:
    """Make the generator of one draw of one round, always the same for the same arguments."""
    return np.random.default_rng([run.seed, round_number, draw])


def find_unfit(
    candidates: Sequence[Candidate], spec: ModelSpec, run: RunSpec
) -> dict[ClientId, str]:
    """Give the reason for every candidate whose machine cannot take part."""
    fits = _fits(candidates, spec, run)
    return {client_id: fit.reason for client_id, fit in fits.items() if isinstance(fit, Unfit)}


def plan_round(
    candidates: Sequence[Candidate],
    spec: ModelSpec,
    run: RunSpec,
    last_trained: Sequence[int],
    generator: np.random.Generator,
    *,
    places: int | None = None,
) -> list[PlannedSlice]:
    """Fit every candidate, draw the allocation matrix, and cut one slice per participant.

    Candidates whose machine does not fit are left out; when more fit than there are ``places``,
    the cohort is drawn from them, each with the same chance. The result does not depend on the
    order of the candidates.
    """
    fits = _fits(candidates, spec, run)
    works = {client_id: fit for client_id, fit in sorted(fits.items()) if isinstance(fit, Work)}
    if places is not None and places < len(works):
        works = _cohort(works, max(places, 0), generator)
    machines = {item.client_id: _machine(item, spec, run) for item in candidates}
    budgets = {client_id: work.num_layers for client_id, work in works.items()}
    matrix = draw_allocation(run.allocation, budgets, last_trained, generator, run.holders_needed)
    planned = []
    for client_id, work in works.items():
        layers = _roles(spec, work, matrix.rows[client_id])
        planned.append(
            PlannedSlice(
                client_id=client_id,
                work=machines[client_id].drawn(work, SliceShape.of(layers)),
                layers=layers,
                chance=work.num_layers / spec.num_layers,
                seed=int(generator.integers(_MAX_SEED)),
            )
        )
    return planned


def _fits(
    candidates: Sequence[Candidate], spec: ModelSpec, run: RunSpec
) -> dict[ClientId, Work | Unfit]:
    return {
        candidate.client_id: fit_work(candidate.profile, candidate.calibration, spec, run.terms)
        for candidate in candidates
    }


def _cohort(
    works: dict[ClientId, Work], size: int, generator: np.random.Generator
) -> dict[ClientId, Work]:
    client_ids = sorted(works)
    drawn = generator.choice(len(client_ids), size=size, replace=False)
    return {client_ids[index]: works[client_ids[index]] for index in sorted(drawn.tolist())}


def _machine(candidate: Candidate, spec: ModelSpec, run: RunSpec) -> Machine:
    return Machine(candidate.profile, candidate.calibration, spec, run.terms)


def _roles(spec: ModelSpec, work: Work, trained: tuple[LayerId, ...]) -> tuple[LayerRole, ...]:
    """Full depth passes through the layers it does not train; reduced depth skips them."""
    held = spec.layer_ids if work.depth == "full" else trained

    def role(layer_id: LayerId) -> Literal["train", "frozen"]:
        return "train" if layer_id in trained else "frozen"

    return tuple(LayerRole(layer_id=layer_id, role=role(layer_id)) for layer_id in held)
