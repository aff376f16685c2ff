"""Says before joining what this machine would do in a round: its slice, memory, time and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedra_edge.config import SiteConfig
from fedra_edge.data.dataset import HELD_OUT_PERCENT
from fedra_edge.errors import ConfigurationError
from fedra_edge.profiling import measure_device
from fedra_edge.protocol.devices import Calibration, DeviceProfile
from fedra_edge.protocol.fitting import Machine, Terms, Unfit, fit_work
from fedra_edge.protocol.models import AdapterSpec, ModelSpec, TokenInput
from fedra_edge.protocol.slices import Depth, Residency, TrainingSpec
from fedra_edge.protocol.tensors import file_bytes

if TYPE_CHECKING:
    from fedra_edge.data.dataset import LocalDataset

DEADLINE_S: Final = 600.0
"""A round's deadline, where headquarters chooses no other."""

EXAMPLES: Final = 1000
"""Examples to train on, where nothing is said of the data."""

_MEGABYTE: Final = 10**6


@dataclass(frozen=True)
class RoundBytes:
    """The files that go through the network in a round.

    ``later_down`` is that of a round for which all weights needed are in the cache.
    """

    first_down: int
    later_down: int
    up: int


@dataclass(frozen=True)
class Promise:
    """What a machine would do in a round; its peak and its times are those of the costliest draw.

    ``memory_bytes`` may be used, ``needs_at_least_bytes`` must be for training a single layer.
    """

    model: str
    memory_bytes: int
    needs_at_least_bytes: int
    depth: Depth
    residency: Residency
    trained_layers: int
    num_layers: int
    micro_batch: int
    walk_batch: int
    predicted_peak_bytes: int
    train_examples: int
    steps: int
    step_s: float
    first_round_down_bytes: int
    later_round_down_bytes: int
    round_up_bytes: int
    disk_free_bytes: int
    why_not_more: str


def terms_of(spec: ModelSpec, chosen: Mapping[str, Any]) -> Terms:
    """Make a run's terms of what is known of them; the rest is as ``fedra-server`` has it."""
    training = {name: chosen[name] for name in TrainingSpec.model_fields if name in chosen}
    adapter = {"targets": spec.default_targets}
    if "rank" in chosen:
        adapter["rank"] = chosen["rank"]
    return Terms(
        adapter=AdapterSpec.model_validate(adapter),
        training=TrainingSpec.model_validate(training),
        deadline_s=chosen.get("deadline_s", DEADLINE_S),
        depth=chosen.get("depth", "auto"),
        max_layers=None,
    )


def measure_promise(
    spec: ModelSpec, terms: Terms, config: SiteConfig, data: LocalDataset | int, path: Path
) -> Promise:
    """Measure this machine, and one block of the model on it, as a client that joins does.

    Args:
        spec: The model.
        terms: What the run asks for.
        config: The site's own settings.
        data: The local data, or how many examples there are to train on.
        path: Where the model's description is, for the tokenizer beside it.

    Raises:
        ConfigurationError: The machine cannot take part, or its texts cannot be counted.
        DataError: No example can be used.
        BackendUnavailableError: The training runtime is missing or does not work.
    """
    from fedra_edge.client import load_configured_trainer

    trainer = load_configured_trainer(config)
    profile = measure_device(backend=trainer.backend, home=config.home, caps=config.caps)
    train, held_out = _count(data, spec, path)
    cost = trainer.calibrate(spec)
    return make_promise(profile, cost.calibration(spec.model_id, train, held_out), spec, terms)


def make_promise(
    profile: DeviceProfile, calibration: Calibration, spec: ModelSpec, terms: Terms
) -> Promise:
    """Plan one machine's work as the server does.

    Raises:
        ConfigurationError: There is none that fits.
    """
    machine = Machine(profile, calibration, spec, terms)
    need_bytes = min(map(machine.least_bytes, terms.depths))
    work = fit_work(profile, calibration, spec, terms)
    if isinstance(work, Unfit):
        raise _too_small(machine, work, need_bytes)
    evaluates = calibration.held_out_examples > 0
    travelling = round_bytes(
        spec, terms.adapter, work.depth, work.num_layers, evaluates=evaluates
    )
    return Promise(
        model=spec.name,
        memory_bytes=profile.memory_bytes,
        needs_at_least_bytes=need_bytes,
        depth=work.depth,
        residency=work.plan.residency,
        trained_layers=work.num_layers,
        num_layers=spec.num_layers,
        micro_batch=work.plan.micro_batch,
        walk_batch=work.plan.walk_batch,
        predicted_peak_bytes=work.predicted_peak_bytes,
        train_examples=calibration.train_examples,
        steps=work.steps,
        step_s=work.step_s,
        first_round_down_bytes=travelling.first_down,
        later_round_down_bytes=travelling.later_down,
        round_up_bytes=travelling.up,
        disk_free_bytes=profile.disk_free_bytes,
        why_not_more=work.why_not_more,
    )


def round_bytes(
    spec: ModelSpec, adapter: AdapterSpec, depth: Depth, trained: int, *, evaluates: bool
) -> RoundBytes:
    """Add up the files of a round that trains so many layers, at the most.

    A site with held-out examples evaluates every revision, for which it needs the whole model.
    """
    held = spec.num_layers if depth == "full" or evaluates else trained
    largest = sorted((layer.weights.size_bytes for layer in spec.layers), reverse=True)
    weights = spec.stem.weights.size_bytes + sum(largest[:held]) + spec.head.weights.size_bytes
    if isinstance(spec.input, TokenInput):
        weights += spec.input.tokenizer.size_bytes
    adapters = [
        file_bytes(spec.layer_adapter_shapes(adapter, layer_id)) for layer_id in spec.layer_ids
    ]
    later_down = sum(sorted(adapters, reverse=True)[:held]) + file_bytes(spec.head_shapes())
    up = file_bytes(spec.delta_shapes(adapter, spec.layer_ids[-trained:]))
    return RoundBytes(first_down=weights + later_down, later_down=later_down, up=up)


def _count(data: LocalDataset | int, spec: ModelSpec, path: Path) -> tuple[int, int]:
    """Count the examples to train on, and those held out for evaluation."""
    if isinstance(data, int):
        return data, data * HELD_OUT_PERCENT // (100 - HELD_OUT_PERCENT)
    from fedra_edge.data.matching import match_labels
    from fedra_edge.exports import open_tokenizer

    if isinstance(spec.input, TokenInput) and not path.is_dir():
        raise ConfigurationError(
            "texts cannot be counted without the model's tokenizer",
            remedy="give --examples N instead of --data, or an exported model",
        )
    matched = match_labels(data, spec.labels, open_tokenizer(path, spec))
    return len(matched.train_indices), len(matched.held_out_indices)


def _too_small(machine: Machine, unfit: Unfit, need_bytes: int) -> ConfigurationError:
    missing_bytes = need_bytes - machine.profile.memory_bytes
    more = f"{missing_bytes / _MEGABYTE:.0f} MB more: free memory, or raise the limit on it"
    return ConfigurationError(
        f"this machine cannot train {machine.spec.name}: {unfit.reason}",
        remedy=f"give it {more}" if missing_bytes > 0 else "ask for a longer deadline",
    )
