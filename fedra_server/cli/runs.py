"""fedra-server run: create runs, steer them and see how they do."""

# ruff: noqa: ARG001 - typer reads the options off the signature, the context holds them

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fedra_edge.protocol.families import ONNX_FAMILY
from fedra_edge.protocol.ids import RunId
from fedra_edge.protocol.models import ModelSpec, PieceGraphs
from fedra_server.chain import COMMAND
from fedra_server.cli import run_options as options
from fedra_server.cli.models import GRAPH_PACKAGES
from fedra_server.cli.names import checked_name
from fedra_server.cli.output import format_time, tell_json, tell_table
from fedra_server.cli.run_plan import tell_preview
from fedra_server.cli.run_status import tell_report
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    Workplace,
    example,
    home_flag,
    open_workplace,
)
from fedra_server.errors import ConfigurationError, ConflictError
from fedra_server.previewing import preview_round
from fedra_server.reporting import report_run
from fedra_server.runs import RunSpec, RunState
from fedra_server.steering import RunStep, steer, summarize_run
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import ModelRecord, RunRecord

app = typer.Typer(
    help="Create, steer and watch runs.",
    epilog=example("run status digits"),
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[str, typer.Argument(help="Name of the run.")]


@app.command(epilog=example("run create digits --model vit --rounds 20 --start"))
def create(
    context: typer.Context,
    name: NameArgument,
    model: options.ModelOption,
    rounds: options.RoundsOption = options.DEFAULT_RUN.rounds,
    min_participants: options.MinParticipantsOption = None,
    deadline_s: options.DeadlineOption = options.DEFAULT_RUN.deadline_s,
    mode: options.ModeOption = options.DEFAULT_RUN.mode,
    buffer_size: options.BufferSizeOption = None,
    max_staleness: options.MaxStalenessOption = options.DEFAULT_RUN.max_staleness,
    staleness_exponent: options.StalenessExponentOption = options.DEFAULT_RUN.staleness_exponent,
    cohort_size: options.CohortSizeOption = options.DEFAULT_RUN.cohort_size,
    over_provisioning: options.OverProvisioningOption = options.DEFAULT_RUN.over_provisioning,
    server_optimizer: options.ServerOptimizerOption = options.DEFAULT_OPTIMIZER.kind,
    server_learning_rate: options.ServerLearningRateOption = None,
    server_momentum: options.ServerMomentumOption = options.DEFAULT_OPTIMIZER.momentum,
    server_beta2: options.ServerBeta2Option = options.DEFAULT_OPTIMIZER.beta2,
    server_tau: options.ServerTauOption = options.DEFAULT_OPTIMIZER.tau,
    depth: options.DepthOption = options.DEFAULT_RUN.depth,
    allocation: options.AllocationOption = options.DEFAULT_RUN.allocation,
    merge_weighting: options.MergeWeightingOption = options.DEFAULT_RUN.merge_weighting,
    max_inverse_chance: options.MaxInverseChanceOption = options.DEFAULT_RUN.max_inverse_chance,
    merge: options.MergeOption = options.DEFAULT_RUN.merge,
    trim_fraction: options.TrimFractionOption = options.DEFAULT_RUN.trim_fraction,
    tolerate: options.TolerateOption = options.DEFAULT_RUN.tolerated_attackers,
    screening: options.ScreeningOption = options.DEFAULT_SCREENING.enabled,
    clip_factor: options.ClipFactorOption = options.DEFAULT_SCREENING.clip_factor,
    quarantine_factor: options.QuarantineFactorOption = options.DEFAULT_SCREENING.quarantine_factor,
    cosine_floor: options.CosineFloorOption = options.DEFAULT_SCREENING.cosine_floor,
    examples_factor: options.ExamplesFactorOption = options.DEFAULT_SCREENING.examples_factor,
    max_layers: options.MaxLayersOption = options.DEFAULT_RUN.max_layers,
    seed: options.SeedOption = options.DEFAULT_RUN.seed,
    rank: options.RankOption = options.DEFAULT_ADAPTER.rank,
    alpha: options.AlphaOption = options.DEFAULT_ADAPTER.alpha,
    target: options.TargetOption = None,
    optimizer: options.OptimizerOption = options.DEFAULT_TRAINING.optimizer,
    learning_rate: options.LearningRateOption = options.DEFAULT_TRAINING.learning_rate,
    momentum: options.MomentumOption = options.DEFAULT_TRAINING.momentum,
    weight_decay: options.WeightDecayOption = options.DEFAULT_TRAINING.weight_decay,
    clip_norm: options.ClipNormOption = options.DEFAULT_TRAINING.clip_norm,
    batch_size: options.BatchSizeOption = options.DEFAULT_TRAINING.batch_size,
    local_epochs: options.LocalEpochsOption = options.DEFAULT_TRAINING.local_epochs,
    max_steps: options.MaxStepsOption = options.DEFAULT_TRAINING.max_steps,
    start: options.StartOption = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Create a run on a registered model, with its untrained revision 0.

    A run that waits for nobody: --mode buffered --buffer-size 4 --max-staleness 10. Ten deltas a
    round, with three clients to spare: --cohort-size 10 --over-provisioning 0.3.
    """
    checked_name(name)
    with open_workplace(home) as place:
        found = place.store.model_by_name(model)
        spec = options.chosen_run_spec(context.params, found.spec)
        graphs = _graphs(found.spec, spec.adapter.targets, place.blobs)
        spec = spec.model_copy(update={"graphs": graphs})
        record = _add_run(place, RunId(name), found, spec, is_started=start)
        summary = summarize_run(place.store, record)
    if as_json:
        tell_json(summary)
    else:
        how = f"start it with `fedra-server run start {name}{home_flag(home)}`"
        typer.echo(f"Created run {name} on {model}; {'it is running' if start else how}")
        if graphs is None:
            typer.echo(f"Only clients with PyTorch can take part: {_why_no_graphs(found.spec)}")


@app.command(epilog=example("run start digits"))
def start(name: NameArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Start a created run, or go on with a paused one."""
    _steer(home, name, RunStep.START, as_json)


@app.command(epilog=example("run pause digits"))
def pause(name: NameArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Let the open round end, then wait until started again."""
    _steer(home, name, RunStep.PAUSE, as_json)


@app.command(epilog=example("run stop digits"))
def stop(name: NameArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """End a run for good; what it published stays."""
    _steer(home, name, RunStep.STOP, as_json)


@app.command("list", epilog=example("run list --json"))
def list_runs(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List all runs."""
    with open_workplace(home) as place:
        runs = [summarize_run(place.store, record) for record in place.store.runs()]
    if as_json:
        tell_json({"runs": [run.model_dump(mode="json") for run in runs]})
        return
    tell_table(
        ["RUN", "MODEL", "STATE", "ROUNDS", "CREATED"],
        [
            [
                run.run,
                run.model,
                run.state,
                f"{run.rounds_published} of {run.rounds_planned}",
                format_time(run.created_at),
            ]
            for run in runs
        ],
        empty="No runs yet; create one with `fedra-server run create NAME --model MODEL`.",
    )


@app.command(epilog=example("run plan digits --explain"))
def plan(
    name: NameArgument,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also what each client's work follows from.")
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Show what the next round would give each client.

    Nothing is changed. Clients that are offline are shown with what they would get; --explain
    says what it follows from and why it is not more. The JSON document always explains.
    """
    with open_workplace(home) as place:
        now = time.time()
        preview = preview_round(place.store.run_history(name), _seen_since(place, now), now)
    if as_json:
        tell_json(preview)
    else:
        tell_preview(preview, explain=explain)


@app.command(epilog=example("run status digits --json"))
def status(
    name: NameArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False
) -> None:
    """Show the round, who it waits for, accuracy and costs."""
    with open_workplace(home) as place:
        now = time.time()
        report = report_run(place.store.run_history(name), _seen_since(place, now), now)
    if as_json:
        tell_json(report)
    else:
        tell_report(report)


def _seen_since(place: Workplace, now: float) -> float:
    """Give the moment before which a client that was last seen counts as gone."""
    return now - place.config.heartbeat_timeout_s


def _graphs(model: ModelSpec, targets: Sequence[str], blobs: BlobStore) -> PieceGraphs | None:
    """Give the graphs that adapt these targets; None where they cannot be made.

    Raises:
        ConfigurationError: They cannot be made, and PyTorch cannot compute the model either.
    """
    known = model.graphs
    if known is None or set(known.targets) == set(targets):
        return known
    if any(find_spec(package) is None for package in GRAPH_PACKAGES):
        if model.family != ONNX_FAMILY:
            return None
        raise ConfigurationError(
            f"other targets than the model's own need {' and '.join(GRAPH_PACKAGES)} here",
            remedy='pip install "fedra[modelbook,server]", or leave --target out.',
        )
    from fedra_server.modelbook.graphs.retargeting import retarget_graphs

    return retarget_graphs(known, targets, blobs)


def _why_no_graphs(model: ModelSpec) -> str:
    if model.graphs is None:
        return "the model is registered without graphs"
    return f"other targets than the model's own need {' and '.join(GRAPH_PACKAGES)} here"


def _add_run(
    place: Workplace, run: RunId, model: ModelRecord, spec: RunSpec, *, is_started: bool
) -> RunRecord:
    from fedra_server.publishing import initial_revision

    if any(known.run == run for known in place.store.runs()):
        raise ConflictError(f"a run named {run!r} exists already", remedy="Choose another name.")
    now = time.time()
    state = RunState.RUNNING if is_started else RunState.CREATED
    record = RunRecord(run=run, model_id=model.model_id, spec=spec, state=state, created_at=now)
    place.store.add_run(record, initial_revision(model.spec, run, spec, place.blobs, now))
    return record


def _steer(home: Path, name: str, step: RunStep, as_json: bool) -> None:
    with open_workplace(home) as place:
        record = steer(place.store, name, step, by=COMMAND)
        summary = summarize_run(place.store, record)
    if as_json:
        tell_json(summary)
    else:
        typer.echo(f"Run {name} is {record.state}")
