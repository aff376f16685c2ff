"""Says before joining what this machine would do in a round: its slice, memory, time and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from fedra_edge.client import load_configured_trainer
from fedra_edge.config import SiteConfig
from fedra_edge.data.dataset import HELD_OUT_PERCENT
from fedra_edge.data.matching import match_labels
from fedra_edge.data.opening import open_dataset
from fedra_edge.data.tokenizing import TextTokenizer
from fedra_edge.errors import ConfigurationError, SliceError
from fedra_edge.exports import (
    graphs_of_description,
    open_export,
    open_tokenizer,
    read_model_description,
)
from fedra_edge.keys import load_signing
from fedra_edge.profiling import measure_device, measure_usable_memory
from fedra_edge.protocol.devices import Backend, Calibration, DeviceProfile
from fedra_edge.protocol.fitting import Machine, Terms, Unfit, fit_work
from fedra_edge.protocol.models import AdapterSpec, ModelSpec, TokenInput
from fedra_edge.protocol.slices import Depth, Residency, TrainingSpec
from fedra_edge.protocol.tensors import tensor_file_bytes
from fedra_edge.training.trainer import GraphFiles, Trainer

DEADLINE_S: Final = 600.0
"""A round's deadline, where headquarters chooses no other."""

_JOINED_BYTES: Final = 8 * 10**6
"""What a client that has joined occupies beyond this program: its connections, its threads."""

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
    model_layers: int
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
        deadline_s=chosen.get("deadline", DEADLINE_S),
        depth=chosen.get("depth", "auto"),
        max_layers=None,
        has_graphs=spec.graphs is not None,
    )


def measure_profile(config: SiteConfig) -> DeviceProfile:
    """Measure this machine with the training runtime loaded, as a client that joins does.

    Raises:
        BackendUnavailableError: The training runtime is missing or does not work.
    """
    return _measured(config)[1]


def measure_promise(path: Path, chosen: Mapping[str, Any], config: SiteConfig) -> Promise:
    """Measure this machine, and a block of a model on it, and plan what it would do in a round.

    Args:
        path: The model's description, or an exported model.
        chosen: What is known of the run, and ``data`` or ``examples``, by their options' names.
        config: The site's own settings.

    Raises:
        ConfigurationError: The machine cannot take part, or something is no description.
        DataError: No example can be used.
        BackendUnavailableError: The training runtime is missing or does not work.
    """
    spec = read_model_description(path)
    terms = terms_of(spec, chosen)
    dataset = open_dataset(chosen["data"]) if "data" in chosen else None
    tokenizer = _tokenizer(path, spec) if dataset is not None else None
    trainer, profile = _measured(config)
    if dataset is None:
        train = chosen.get("examples", EXAMPLES)
        held_out = train * HELD_OUT_PERCENT // (100 - HELD_OUT_PERCENT)
    else:
        matched = match_labels(dataset, spec.labels, tokenizer)
        train, held_out = len(matched.train_indices), len(matched.held_out_indices)
    try:
        with _graphs(path, spec, trainer.backend) as graphs:
            cost = trainer.calibrate(spec, partial(measure_usable_memory, config.caps), graphs)
    except SliceError as error:
        raise ConfigurationError(str(error), remedy=error.remedy) from error
    idle_bytes = cost.memory.idle_bytes + _JOINED_BYTES
    joined = replace(cost, memory=cost.memory.model_copy(update={"idle_bytes": idle_bytes}))
    return make_promise(profile, joined.calibration(spec.model_id, train, held_out), spec, terms)


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
    travelling = round_bytes(spec, terms.adapter, work.depth, work.num_layers, evaluates=evaluates)
    return Promise(
        model=spec.name,
        memory_bytes=profile.memory_bytes,
        needs_at_least_bytes=need_bytes,
        depth=work.depth,
        residency=work.plan.residency,
        trained_layers=work.num_layers,
        model_layers=spec.num_layers,
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
        tensor_file_bytes(spec.layer_adapter_shapes(adapter, layer_id))
        for layer_id in spec.layer_ids
    ]
    later_down = sum(sorted(adapters, reverse=True)[:held]) + tensor_file_bytes(spec.head_shapes())
    up = tensor_file_bytes(spec.delta_shapes(adapter, spec.layer_ids[-trained:]))
    return RoundBytes(first_down=weights + later_down, later_down=later_down, up=up)


def _measured(config: SiteConfig) -> tuple[Trainer, DeviceProfile]:
    load_signing()  # a client that joins signs
    trainer = load_configured_trainer(config)
    return trainer, measure_device(backend=trainer.backend, home=config.home, caps=config.caps)


def _tokenizer(path: Path, spec: ModelSpec) -> TextTokenizer | None:
    if isinstance(spec.input, TokenInput) and not path.is_dir():
        raise ConfigurationError(
            "texts cannot be counted without the model's tokenizer",
            remedy="Give --examples N instead of --data, or an exported model.",
        )
    return open_tokenizer(path, spec)


@contextmanager
def _graphs(path: Path, spec: ModelSpec, backend: Backend) -> Iterator[GraphFiles | None]:
    """Find the model's graphs, where the backend computes with them."""
    if backend != "onnx":
        yield None
    elif path.is_dir():
        yield open_export(path).graphs
    else:
        with graphs_of_description(path, spec) as graphs:
            yield graphs


def _too_small(machine: Machine, unfit: Unfit, need_bytes: int) -> ConfigurationError:
    profile = machine.profile
    missing_bytes = need_bytes - profile.memory_bytes
    remedy = "Ask for a longer deadline."
    if missing_bytes > 0:
        megabytes = f"{missing_bytes / _MEGABYTE:.0f} MB"
        remedy = f"Give it {megabytes} more: free memory, or raise its limit."
    elif machine.disk_bytes(machine.terms.depths[-1], 1) > profile.disk_free_bytes:
        remedy = "Free disk space, or raise FEDRA_EDGE_DISK_QUOTA_BYTES."
    return ConfigurationError(
        f"this machine cannot train {machine.spec.name}: {unfit.reason}", remedy=remedy
    )
