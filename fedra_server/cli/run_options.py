"""The options that define a run, and the RunSpec they add up to; its defaults are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import typer
from pydantic import BaseModel, ValidationError

from fedra_edge.protocol.fitting import DepthPolicy
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.slices import TrainingSpec
from fedra_server.cli.names import usage_error
from fedra_server.errors import ConfigurationError
from fedra_server.runs import AllocationScheme, MergeWeighting, RunSpec

DEFAULT_RUN: Final = RunSpec(adapter=AdapterSpec(targets=()))
DEFAULT_ADAPTER: Final = DEFAULT_RUN.adapter
DEFAULT_TRAINING: Final = TrainingSpec()

ModelOption = Annotated[str, typer.Option("--model", help="Name of the registered model.")]
RoundsOption = Annotated[int, typer.Option(help="How many rounds to publish.")]
MinParticipantsOption = Annotated[
    int, typer.Option(help="A round needs this many admitted deltas.")
]
DeadlineOption = Annotated[float, typer.Option("--deadline-s", help="Seconds a round may take.")]
DepthOption = Annotated[
    DepthPolicy, typer.Option(help="auto: full depth where it fits; reduced: FedRA as published.")
]
AllocationOption = Annotated[
    AllocationScheme, typer.Option(help="balanced: with coverage; independent: as published.")
]
MergeWeightingOption = Annotated[
    MergeWeighting, typer.Option(help="How deltas of a layer are weighted; uniform: as published.")
]
MaxInverseChanceOption = Annotated[float, typer.Option(help="Cap of the inverse_chance weight.")]
MaxLayersOption = Annotated[int | None, typer.Option(help="No participant trains more layers.")]
SeedOption = Annotated[int, typer.Option(help="Seed of all draws of the run.")]
RankOption = Annotated[int, typer.Option(help="Adapter rank.")]
AlphaOption = Annotated[float, typer.Option(help="Adapter alpha; the scale is alpha / rank.")]
TargetOption = Annotated[
    list[str] | None,
    typer.Option("--target", help="Adapted linear module of a block, by full name; repeat."),
]
OptimizerOption = Annotated[Literal["sgd", "adamw"], typer.Option(help="Local optimizer.")]
LearningRateOption = Annotated[float, typer.Option(help="Local learning rate.")]
MomentumOption = Annotated[float, typer.Option(help="Momentum of sgd.")]
WeightDecayOption = Annotated[float, typer.Option(help="Local weight decay.")]
ClipNormOption = Annotated[float, typer.Option(help="Largest gradient norm.")]
BatchSizeOption = Annotated[int, typer.Option(help="Examples per optimizer step.")]
LocalEpochsOption = Annotated[int, typer.Option(help="Passes over the local data per round.")]
MaxStepsOption = Annotated[int | None, typer.Option(help="At most this many steps per round.")]
StartOption = Annotated[bool, typer.Option("--start", help="Start the run at once.")]


def chosen_run_spec(chosen: Mapping[str, Any], model: ModelSpec) -> RunSpec:
    """Add the options, by their names, up to the run they define on a model.

    Raises:
        typer.BadParameter: A value is out of range.
        ConfigurationError: A target is no linear module of the model's block, or the model
            has fewer layers than ``max_layers``.
    """
    adapter = {**_fields_of(AdapterSpec, chosen)}
    adapter["targets"] = tuple(chosen["target"] or model.default_targets)
    parts = {"adapter": adapter, "training": _fields_of(TrainingSpec, chosen)}
    try:
        spec = RunSpec.model_validate({**_fields_of(RunSpec, chosen), **parts})
    except ValidationError as error:
        raise usage_error(error) from None
    try:
        model.layer_adapter_shapes(spec.adapter, LayerId(0))
    except ValueError as error:
        raise ConfigurationError(str(error), remedy="Give full names with --target.") from None
    if spec.max_layers is not None and spec.max_layers > model.num_layers:
        raise ConfigurationError(
            f"--max-layers {spec.max_layers}: the model has only {model.num_layers} layers",
            remedy=f"Give at most {model.num_layers}, or leave --max-layers out.",
        )
    return spec


def _fields_of(kind: type[BaseModel], chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: chosen[name] for name in kind.model_fields if name in chosen}
