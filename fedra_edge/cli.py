"""The command line of fedra-edge; every command is a few calls of the library."""

# ruff: noqa: ARG001 - typer reads the options of a run off the signature, the context holds them

from __future__ import annotations

import contextlib
import logging
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedra_edge import options
from fedra_edge.config import load_config, load_site_config
from fedra_edge.console import Output, Pace
from fedra_edge.errors import DataError, FedraEdgeError, NotEnrolledError
from fedra_edge.exit_codes import EXIT_CODES_HELP, exit_code_of
from fedra_edge.options import Backend, Export, Home, Json, MaxLayers, Memory, Server, Verbose
from fedra_edge.outbox import Outbox
from fedra_edge.protocol.plain_text import log_plainly
from fedra_edge.protocol.version import PROTOCOL_VERSION
from fedra_edge.resting import CAN_REST, CONTRIBUTED
from fedra_edge.visiting import (
    Farewell,
    end_membership,
    forget_remains,
    known_server,
    membership,
    visited,
    visiting,
)


def _epilog(example: str) -> str:
    return f"Example: fedra-edge {example}. {EXIT_CODES_HELP}"


app = typer.Typer(
    name="fedra-edge",
    help="Tune one foundation model together with other sites; your data stays here.",
    epilog=_epilog("join --server 'https://hq.example:8470#SECRET.FINGERPRINT' --data images"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(
    epilog=_epilog("join --server 'https://hq.example:8470#SECRET.FINGERPRINT' --data images")
)
def join(
    context: typer.Context,
    server: Server = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A directory with one directory of images or texts per class, or a CSV file."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="This site's name; else the host's.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Take part in this run only, and exit when it is over.")
    ] = None,
    home: Home = None,
    memory: Memory = None,
    max_layers: MaxLayers = None,
    backend: Backend = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads to train with.")] = None,
    mirror: options.Mirror = None,
    max_bandwidth: options.MaxBandwidth = None,
    proxy: options.Proxy = None,
    ca_file: options.CaFile = None,
    insecure_http: options.InsecureHttp = False,
    as_json: Json = False,
    verbose: Verbose = False,
    contributed: Annotated[int, typer.Option(CONTRIBUTED, min=0, hidden=True)] = 0,
) -> None:
    """Take part until told to stop (Ctrl-C), through lost connections and server restarts."""
    server = server or known_server(home)
    if server is None:
        raise typer.BadParameter(
            "is not given; give the join string of headquarters, or set FEDRA_EDGE_SERVER",
            param_hint="--server",
        )
    output = Output(as_json=as_json)
    _configure_logging(is_verbose=verbose)
    with _reported(output, is_verbose=verbose):
        from fedra_edge.client import EdgeClient
        from fedra_edge.foreground import resting_of, run_in_foreground

        config = load_config(
            {
                "server": server,
                "data": data,
                "name": name,
                "run": run,
                "home": home,
                "memory_bytes": memory,
                "max_layers": max_layers,
                "backend": backend,
                "threads": threads,
                "mirrors": mirror or None,
                "max_bandwidth": max_bandwidth,
                **options.way_options(context.params),
            }
        )
        arguments: list[str] | None = context.obj
        resting = resting_of(arguments, contributed) if arguments else None
        client = EdgeClient(config, on_progress=output.progress(), resting=resting)
        run_in_foreground(client)


@app.command(epilog=_epilog("profile --model model.json --data images --memory 2GB"))
def profile(
    context: typer.Context,
    server: Server = None,
    home: Home = None,
    memory: Memory = None,
    max_layers: MaxLayers = None,
    backend: Backend = None,
    model: options.Model = None,
    data: options.Data = None,
    examples: options.Examples = None,
    rank: options.Rank = None,
    batch_size: options.BatchSize = None,
    local_epochs: options.LocalEpochs = None,
    max_steps: options.MaxSteps = None,
    optimizer: options.Optimizer = None,
    depth: options.Depth = None,
    deadline: options.Deadline = None,
    proxy: options.Proxy = None,
    ca_file: options.CaFile = None,
    insecure_http: options.InsecureHttp = False,
    as_json: Json = False,
) -> None:
    """Show what this machine would tell a server, and with --server whether it answers.

    With --model it measures a block of that model here and shows what this machine would do in
    a round: its slice, its peak memory, its time and its bytes.
    """
    output = Output(as_json=as_json)
    chosen = options.run_options(context.params)
    with _reported(output):
        from fedra_edge.promising import measure_profile, measure_promise

        site = {"home": home, "memory_bytes": memory, "max_layers": max_layers}
        config = load_site_config({**site, "backend": backend})
        if model is None:
            values = measure_profile(config).model_dump()
        else:
            output.note("measuring this machine, and a block of the model on it")
            values = asdict(measure_promise(model, chosen, config))
        if server is not None:
            way = options.way_options(context.params)
            with visited(load_config({**site, "server": server, **way})) as api:
                values["server"] = api.health().model_dump()
        output.show(values)


@app.command(epilog=_epilog("status --json"))
def status(
    context: typer.Context,
    server: Server = None,
    home: Home = None,
    proxy: options.Proxy = None,
    ca_file: options.CaFile = None,
    insecure_http: options.InsecureHttp = False,
    as_json: Json = False,
) -> None:
    """Show what the server knows of this client, and what waits to be sent."""
    output = Output(as_json=as_json)
    with _reported(output):
        config, _ = membership(server, home, options.way_options(context.params))
        with visiting(config) as (api, _):
            known = api.client_status()
        local = {"deltas_waiting": Outbox(config.outbox).num_waiting, "home": str(config.home)}
        output.show({"server": config.server, **known.model_dump(), **local})


@app.command("rotate-key", epilog=_epilog("rotate-key"))
def rotate_key(
    context: typer.Context,
    server: Server = None,
    home: Home = None,
    proxy: options.Proxy = None,
    ca_file: options.CaFile = None,
    insecure_http: options.InsecureHttp = False,
    as_json: Json = False,
) -> None:
    """Put a new key in the place of this client's own; a client that runs goes on meanwhile."""
    output = Output(as_json=as_json)
    with _reported(output):
        config, identity = membership(server, home, options.way_options(context.params))
        with visiting(config) as (_, enrolment):
            public_key = enrolment.rotate_key()
        output.show({"client_id": identity.client_id, "public_key": public_key})


@app.command(epilog=_epilog("leave --server https://hq.example:8470"))
def leave(
    context: typer.Context,
    server: Server = None,
    home: Home = None,
    forget: Annotated[
        bool, typer.Option(help="Also when the server cannot be told, or nothing is there.")
    ] = False,
    proxy: options.Proxy = None,
    ca_file: options.CaFile = None,
    insecure_http: options.InsecureHttp = False,
    as_json: Json = False,
) -> None:
    """Give up the membership and delete this client's identity, key and pinned authority."""
    output = Output(as_json=as_json)
    with _reported(output):
        way = options.way_options(context.params)
        try:
            config, identity = membership(server, home, way)
        except NotEnrolledError:
            if not forget:
                raise
            output.show(forget_remains(server, home, way))
            return
        farewell = end_membership(config, must_be_told=not forget)
        told = {"told": farewell is Farewell.TOLD, "detail": farewell.value}
        output.show({"left": config.server, "client_id": identity.client_id, **told})


@app.command(epilog=_epilog("evaluate --export tuned --data images"))
def evaluate(
    export: Export,
    data: Annotated[Path, typer.Option(help="A directory of images or texts, or a CSV file.")],
    memory: Memory = None,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Evaluate an exported model on local data, without a server.

    It scores the examples that are marked as held out (by a test folder or the split column),
    or all usable ones when none are marked.
    """
    output = Output(as_json=as_json)
    with _reported(output):
        from fedra_edge.client import load_configured_trainer
        from fedra_edge.data.matching import match_labels
        from fedra_edge.data.opening import open_dataset
        from fedra_edge.evaluation import evaluate_export
        from fedra_edge.exports import open_tokenizer, read_export_spec

        config = load_site_config({"memory_bytes": memory, "backend": backend})
        spec = read_export_spec(export)
        matched = match_labels(open_dataset(data), spec.labels, open_tokenizer(export, spec))
        trainer = load_configured_trainer(config)
        counts = evaluate_export(export, matched, trainer, config.caps)
        output.show(
            {
                "model": spec.name,
                "num_examples": counts.num_examples,
                "num_correct": counts.num_correct,
                "accuracy": counts.num_correct / counts.num_examples,
                "mean_loss": counts.loss_sum / counts.num_examples,
                "skipped": matched.report.counts,
            }
        )


@app.command(epilog=_epilog("predict --export tuned --data images --top 3 --output told.csv"))
def predict(
    export: Export,
    data: Annotated[
        Path, typer.Option(help="A directory of images or texts, one of them, or a CSV file.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many labels to give for each.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--output", help="Write to this file, not standard output.")
    ] = None,
    memory: Memory = None,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Predict the labels of images or texts with an exported model, without a server.

    The data need no labels: any directory does, or a CSV file with the column path (or text).
    One row of CSV or, with --json, one line of JSON is written for each example as it is
    computed; examples that cannot be read are left out and counted.
    """
    output = Output(as_json=as_json)
    with _reported(output):
        from fedra_edge.prediction import predict as predict_labels
        from fedra_edge.prediction_output import prediction_file, write_predictions

        pace = Pace(output.note)

        def show_progress() -> bool:
            done, total = predictions.num_predicted, predictions.num_examples
            pace.tell(f"predicting: {done} of {total} done, {predictions.num_read} read")
            return False

        output.note("loading the training runtime")
        predictions = predict_labels(
            export, data, top=top, memory_bytes=memory, backend=backend, should_stop=show_progress
        )
        with prediction_file(out) as file:
            write_predictions(predictions, file, as_json=as_json)
        number = predictions.num_predicted
        if not number:
            raise DataError(f"no example can be used: {'; '.join(predictions.skipped)}")
        told = {"event": "finished", "predicted": number, "skipped": predictions.skipped.counts}
        if as_json:
            output.show(told)
        else:
            output.note(f"{number} predicted, {sum(predictions.skipped.counts.values())} skipped")
            for line in predictions.skipped:
                output.note(f"  skipped: {line}")


@app.command(epilog=_epilog("version --json"))
def version(as_json: Json = False) -> None:
    """Show the versions of client, protocol and Python, and the training runtimes found."""
    from fedra_edge import __version__

    Output(as_json=as_json).show(
        {
            "version": __version__,
            "protocol": PROTOCOL_VERSION,
            "python": platform.python_version(),
            "backends": [
                backend
                for backend, package in (("torch", "torch"), ("onnx", "onnxruntime"))
                if find_spec(package) is not None
            ],
        }
    )


def main() -> None:
    """Run the command line, as a process of its own that may rest."""
    app(obj=sys.argv[1:] if CAN_REST else None)


@contextlib.contextmanager
def _reported(output: Output, *, is_verbose: bool = False) -> Iterator[None]:
    """Turn errors into a message and an exit code, in one place."""
    try:
        yield
    except FedraEdgeError as error:
        _exit(output, error)
    except (KeyboardInterrupt, BrokenPipeError, typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if is_verbose:
            logging.getLogger(__name__).exception("defect")
        _exit(output, error)


def _exit(output: Output, error: Exception) -> NoReturn:
    output.fail(error)
    raise typer.Exit(exit_code_of(error)) from error


def _configure_logging(*, is_verbose: bool) -> None:
    log_plainly(logging.WARNING)
    logging.getLogger("fedra_edge").setLevel(logging.DEBUG if is_verbose else logging.WARNING)
    if not is_verbose:  # these are shown as progress and as the final error already
        logging.getLogger("fedra_edge.client").setLevel(logging.CRITICAL)
