"""Measures what each kind of piece costs: activations, boundary and operations per example.

The model itself is run, with adapters attached as in training, and every tensor that autograd
keeps is put on the account of the piece that was at work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from fedra_edge.protocol.families import Family
from fedra_edge.protocol.models import AdapterSpec, ModelInput, TokenInput
from fedra_server.modelbook.splitting import count_layers

Stage = Literal["stem", "layer", "between", "head"]
_EXAMPLES: Final = 2
"""A single example would let some transposed tensors pass for contiguous ones."""


@dataclass(frozen=True)
class StageCost:
    """What a stage costs per example, beside its parameters."""

    activation_bytes: int
    boundary_bytes: int
    forward_flops: int


def measure_costs(
    model: PreTrainedModel, family: Family, wanted: ModelInput
) -> dict[Stage, StageCost]:
    """Run the model once for operations and once for activations.

    Attaches adapters to the model and changes which of its parameters are trained, so the model
    should not be used afterwards. Layers share one structure; the first one stands for all.
    """
    if isinstance(wanted, TokenInput):
        model.config.pad_token_id = 0  # without one it takes a single text at a time
    flops = _count_flops(model, family, wanted)
    _attach_adapters(model, family)
    activations, boundaries = _weigh_activations(model, family, wanted)
    stages: tuple[Stage, ...] = ("stem", "layer", "head")
    return {
        stage: StageCost(
            activation_bytes=-(-activations[stage] // _EXAMPLES),
            boundary_bytes=boundaries[stage] // _EXAMPLES,
            forward_flops=flops[stage],
        )
        for stage in stages
    }


def _attach_adapters(model: nn.Module, family: Family) -> None:
    targets = "|".join(re.escape(target) for target in family.default_targets)
    rank = AdapterSpec(targets=family.default_targets).rank
    exactly = rf"{re.escape(family.layers)}\.\d+\.({targets})"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly), model)
    modules = family.trained_head_modules
    for name, parameter in model.named_parameters():
        is_trained = ".lora_" in name or name.rpartition(".")[0] in modules
        parameter.requires_grad = is_trained


class _Stages:
    """Follows a forward pass through the model; ``current`` is the stage at work."""

    def __init__(self) -> None:
        self.current: Stage = "stem"
        self.boundaries: dict[Stage, int] = {}
        self.on_change: Callable[[], None] = lambda: None

    def enter(self, stage: Stage) -> None:
        self.on_change()
        self.current = stage

    @contextmanager
    def following(self, model: nn.Module, family: Family) -> Iterator[None]:
        """Watch the model's modules while the context is open."""
        first = model.get_submodule(f"{family.layers}.0")
        last = model.get_submodule(f"{family.layers}.{count_layers(model, family) - 1}")
        hooks = [
            model.get_submodule(family.stem).register_forward_hook(self._after_stem),
            first.register_forward_pre_hook(lambda *_: self.enter("layer")),
            first.register_forward_hook(self._after_first),
            last.register_forward_hook(lambda *_: self.enter("head")),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _after_stem(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        """Ask for a gradient at the stem's output, as if a trained layer lay below."""
        self.boundaries["stem"] = output.nbytes
        self.enter("between")
        return output.detach().requires_grad_()

    def _after_first(self, _module: nn.Module, _inputs: object, output: Any) -> None:  # noqa: ANN401 (some layers give a tensor, some a tuple)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        self.boundaries["layer"] = hidden.nbytes
        self.enter("between")


def _weigh_activations(
    model: nn.Module, family: Family, wanted: ModelInput
) -> tuple[dict[Stage, int], dict[Stage, int]]:
    """Add up the distinct storages autograd keeps in each stage, parameters left out."""
    stages = _Stages()
    parameters = {_storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[Stage, dict[int, Tensor]] = {"stem": {}, "layer": {}, "between": {}, "head": {}}

    def keep(tensor: Tensor) -> Tensor:
        if _storage_of(tensor) not in parameters:
            kept[stages.current][_storage_of(tensor)] = tensor  # alive, so that no address repeats
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with stages.following(model, family), hooks:
        logits: Tensor = model(**_inputs(wanted, _EXAMPLES)).logits
        F.cross_entropy(logits, torch.zeros(_EXAMPLES, dtype=torch.int64))
    stages.boundaries["head"] = logits.nbytes
    sizes = {
        stage: sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        for stage, tensors in kept.items()
    }
    return sizes, stages.boundaries


def _count_flops(model: nn.Module, family: Family, wanted: ModelInput) -> dict[Stage, int]:
    stages = _Stages()
    flops: dict[Stage, int] = {"stem": 0, "layer": 0, "between": 0, "head": 0}
    counter = FlopCounterMode(display=False)

    def charge() -> None:
        flops[stages.current] = counter.get_total_flops() - sum(
            count for stage, count in flops.items() if stage != stages.current
        )

    stages.on_change = charge
    # The plain attention kernel is the one whose operations are counted on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, stages.following(model, family):
        model(**_inputs(wanted, 1))
        charge()
    return flops


def _inputs(wanted: ModelInput, examples: int) -> dict[str, Tensor | bool]:
    """Make the largest inputs there are, by the names of transformers."""
    if isinstance(wanted, TokenInput):
        tokens = torch.zeros(examples, wanted.max_tokens, dtype=torch.int64)
        return {"input_ids": tokens, "use_cache": False}
    return {"pixel_values": torch.zeros(examples, wanted.channels, wanted.size_px, wanted.size_px)}


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
