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
from fedra_server.runs import (
    AllocationScheme,
    MergeKind,
    MergeWeighting,
    RunMode,
    RunSpec,
    ScreeningSpec,
    ServerOptimizerKind,
    ServerOptimizerSpec,
)

DEFAULT_RUN: Final = RunSpec(adapter=AdapterSpec(targets=()))
DEFAULT_ADAPTER: Final = DEFAULT_RUN.adapter
DEFAULT_TRAINING: Final = TrainingSpec()
DEFAULT_OPTIMIZER: Final = DEFAULT_RUN.server_optimizer
DEFAULT_SCREENING: Final = DEFAULT_RUN.screening

_NUMBERS: Final = ("min_participants", "buffer_size")
_MERGING: Final = ("merge", "trim_fraction", "tolerated_attackers")
_MANY: Final = 100_000

ModelOption = Annotated[str, typer.Option("--model", help="Name of the registered model.")]
RoundsOption = Annotated[int, typer.Option(help="How many rounds to publish.")]
MinParticipantsOption = Annotated[
    int | None,
    typer.Option(
        help="A round needs this many clients to begin, and this many deltas to end; those that"
        " screening then quarantines count. A buffered run needs them for its first round only."
        f" By default {DEFAULT_RUN.min_participants}, or as many holders as --merge needs."
    ),
]
DeadlineOption = Annotated[
    float,
    typer.Option("--deadline-s", help="Seconds a round, or a buffered delta's wait, may take."),
]
ModeOption = Annotated[
    RunMode, typer.Option(help="synchronous: in rounds; buffered: merge as deltas come.")
]
BufferSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Buffered: a piece merges once deltas of so many different clients wait for it;"
        f" by default {DEFAULT_RUN.buffer_size}, or as many holders as --merge needs."
    ),
]
MaxStalenessOption = Annotated[
    int | None,
    typer.Option(
        help="Take a late delta whose pieces were merged at most so often since it began;"
        " by default 0, or 20 when buffered."
    ),
]
StalenessExponentOption = Annotated[
    float, typer.Option(help="A delta weighs (1 + staleness) ** -exponent as much.")
]
CohortSizeOption = Annotated[
    int | None, typer.Option(help="Deltas that complete a round; all that are there by default.")
]
OverProvisioningOption = Annotated[
    float, typer.Option(help="Draw this fraction more clients than --cohort-size; 0.3 for 30 %.")
]
ServerOptimizerOption = Annotated[
    ServerOptimizerKind,
    typer.Option("--server-optimizer", help="What the merged mean of deltas is fed to."),
]
ServerLearningRateOption = Annotated[
    float | None,
    typer.Option(help="Its learning rate; by default 1, or 0.01 for fedadam and fedyogi."),
]
ServerMomentumOption = Annotated[
    float, typer.Option(help="Momentum of fedavgm; beta 1 of fedadam and fedyogi.")
]
ServerBeta2Option = Annotated[float, typer.Option(help="Beta 2 of fedadam and fedyogi.")]
ServerTauOption = Annotated[
    float, typer.Option(help="Added to the root of the variance in fedadam and fedyogi.")
]
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
MergeOption = Annotated[
    MergeKind,
    typer.Option(
        help="How the deltas of a layer become one. mean: weighted, any number of holders;"
        " norm-clipped-mean: none longer than the median; trimmed-mean: without the largest and"
        " smallest values; coordinate-median: without weights. With --tolerate A the last three"
        " need 2A + 1 holders of a layer, a trimmed mean also A / --trim-fraction; a layer with"
        " fewer stays as it is, or waits when buffered."
    ),
]
TrimFractionOption = Annotated[
    float, typer.Option(help="trimmed-mean: this fraction of the values goes at either end.")
]
TolerateOption = Annotated[
    int,
    typer.Option("--tolerate", help="Attackers among a layer's holders that the merge bears."),
]
ScreeningOption = Annotated[
    bool,
    typer.Option(
        "--screening/--no-screening",
        help="Hold each delta against the others of its layer: clip, or quarantine.",
    ),
]
ClipFactorOption = Annotated[
    float | None,
    typer.Option(
        help="Scale a delta down to so many times the median norm; by default 3, or 1 for"
        " norm-clipped-mean."
    ),
]
QuarantineFactorOption = Annotated[
    float, typer.Option(help="Quarantine a delta longer than so many times the median norm.")
]
CosineFloorOption = Annotated[
    float,
    typer.Option(
        help="Quarantine a delta whose cosine to the mean of the others is below this, and by as"
        " much below the median; of at least 4 holders. -1 for never."
    ),
]
ExamplesFactorOption = Annotated[
    float, typer.Option(help="num_examples counts up to so many times the median.")
]
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
        typer.BadParameter: A value is out of range, or an option would have no effect.
        ConfigurationError: A target is no linear module of the model's block, or the model
            has fewer layers than ``max_layers``.
    """
    adapter = {**_fields_of(AdapterSpec, chosen)}
    adapter["targets"] = tuple(chosen["target"] or model.default_targets)
    parts = {
        "adapter": adapter,
        "training": _fields_of(TrainingSpec, chosen),
        "server_optimizer": _server_optimizer(chosen),
        "screening": {
            **_fields_of(ScreeningSpec, chosen), "enabled": chosen.get("screening", True)
        },
        "tolerated_attackers": chosen.get("tolerate", DEFAULT_RUN.tolerated_attackers),
    }  # fmt: skip
    try:
        given = {**_fields_of(RunSpec, chosen), **parts}
        spec = RunSpec.model_validate({**_default_numbers(given), **given})
    except ValidationError as error:
        raise usage_error(error) from None
    idle = _options_without_effect(spec)
    if idle:
        raise typer.BadParameter("; ".join(idle))
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


def _default_numbers(given: dict[str, Any]) -> dict[str, int]:
    """Take out the numbers of clients that nobody gave; give what the merge needs in their place.

    Raises:
        ValidationError: A value is out of range.
    """
    left_out = [name for name in _NUMBERS if given.get(name) is None]
    for name in left_out:
        given.pop(name, None)
    merging = {name: given[name] for name in _MERGING if name in given}
    many = dict.fromkeys(_NUMBERS, _MANY)
    needed = RunSpec.model_validate({"adapter": DEFAULT_ADAPTER, **merging, **many}).holders_needed
    is_buffered = given.get("mode") == "buffered"
    return {
        name: max(getattr(DEFAULT_RUN, name), needed)
        for name in left_out
        if name != "buffer_size" or is_buffered
    }


def _options_without_effect(spec: RunSpec) -> list[str]:
    """Name the options that were set and that the rest of the run leaves without any effect."""
    optimizer, default = spec.server_optimizer, DEFAULT_OPTIMIZER
    found = []
    if spec.mode != "buffered" and spec.buffer_size != DEFAULT_RUN.buffer_size:
        found.append("--buffer-size is of use only with --mode buffered")
    rules, standard = spec.screening, DEFAULT_SCREENING
    if not rules.enabled and rules != standard.model_copy(
        update={"enabled": False, "clip_factor": rules.clip_factor}
    ):
        found.append("--quarantine-factor, --cosine-floor and --examples-factor need --screening")
    if spec.clip_factor is None and rules.clip_factor is not None:
        found.append("--clip-factor needs --screening, or --merge norm-clipped-mean")
    if spec.merge != "trimmed-mean" and spec.trim_fraction != DEFAULT_RUN.trim_fraction:
        found.append("--trim-fraction is of use only with --merge trimmed-mean")
    if spec.merge == "mean" and spec.tolerated_attackers != DEFAULT_RUN.tolerated_attackers:
        found.append("--tolerate is of no use with --merge mean, which bears none")
    if not optimizer.is_adaptive and (optimizer.tau, optimizer.beta2) != (
        default.tau,
        default.beta2,
    ):
        only = "--server-optimizer fedadam or fedyogi"
        found.append(f"--server-tau and --server-beta2 are of use only with {only}")
    if optimizer.kind == "fedavg" and optimizer.momentum != default.momentum:
        found.append("--server-momentum is of no use with --server-optimizer fedavg")
    return found


def _server_optimizer(chosen: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: f"server_{name}" for name in ServerOptimizerSpec.model_fields}
    named["kind"] = "server_optimizer"
    return {name: chosen[option] for name, option in named.items() if option in chosen}


def _fields_of(kind: type[BaseModel], chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {name: chosen[name] for name in kind.model_fields if name in chosen}
