"""The options that commands of fedra-edge share, and those that describe a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from fedra_edge.protocol.fitting import DepthPolicy

Server = Annotated[
    str | None,
    typer.Option(
        metavar="JOIN-STRING|ADDRESS",
        help="What headquarters gives out (`fedra-server token create`); once this home has "
        "joined, the address, or nothing where it knows one server only.",
        envvar="FEDRA_EDGE_SERVER",
        show_envvar=True,
    ),
]
Home = Annotated[
    Path | None,
    typer.Option(help="Where identity, weights and outbox are kept.", envvar="FEDRA_EDGE_HOME"),
]
Memory = Annotated[
    str | None, typer.Option(help="The most memory the client may occupy, e.g. 512MB.")
]
Export = Annotated[Path, typer.Option(help="What `fedra-server export` wrote.")]
MaxLayers = Annotated[int | None, typer.Option(help="The most layers to train in a round.")]
Backend = Annotated[str | None, typer.Option(help="The training runtime: auto, torch or onnx.")]
MaxBandwidth = Annotated[
    str | None,
    typer.Option(help="The most to move per second, both directions together, e.g. 2MB."),
]
Mirror = Annotated[
    list[str] | None,
    typer.Option(
        "--mirror",
        help="A directory or web address to look for weights in first; may be repeated.",
    ),
]
Proxy = Annotated[
    str | None, typer.Option(help="The proxy to the server; else as HTTPS_PROXY, NO_PROXY say.")
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        help="Trust this certificate authority (PEM) only, such as that of a proxy that inspects "
        "TLS; else the one of the join string, or as SSL_CERT_FILE says."
    ),
]
InsecureHttp = Annotated[
    bool,
    typer.Option(
        "--insecure-http",
        help="Take plain http to another machine, which everybody on the way can read and alter.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON instead of text.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more to standard error.")]

Model = Annotated[
    Path | None,
    typer.Option(
        help="Say what this machine would do for a model: what `fedra-server model show NAME "
        "--spec` prints, or an exported model."
    ),
]
Data = Annotated[
    Path | None, typer.Option(help="With --model: the local data, to count its examples.")
]
Examples = Annotated[
    int | None, typer.Option(min=1, help="With --model: examples to train on; 1000 by default.")
]
Rank = Annotated[int | None, typer.Option(min=1, max=1024, help="With --model: adapter rank.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, max=65_536, help="With --model: examples per step.")
]
LocalEpochs = Annotated[
    int | None, typer.Option(min=1, max=1000, help="With --model: passes over the data per round.")
]
MaxSteps = Annotated[
    int | None, typer.Option(min=1, max=10**6, help="With --model: at most so many steps a round.")
]
Optimizer = Annotated[
    Literal["sgd", "adamw"] | None, typer.Option(help="With --model: the optimizer.")
]
Depth = Annotated[
    DepthPolicy | None, typer.Option(help="With --model: which depths the run allows.")
]
Deadline = Annotated[
    float | None, typer.Option("--deadline", min=0.001, help="With --model: seconds a round takes.")
]

_OF_A_RUN: Final = (
    "data", "examples", "rank", "batch_size", "local_epochs", "max_steps", "optimizer", "depth",
    "deadline",
)  # fmt: skip


def way_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what a command was told of the way to the server, as far as it was told."""
    told = {name: params.get(name) for name in ("proxy", "ca_file", "insecure_http")}
    return {name: value for name, value in told.items() if value}


def run_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what a command was told of a run and its data.

    Raises:
        typer.BadParameter: They are of no use, or contradict each other.
    """
    chosen = {name: params[name] for name in _OF_A_RUN if params[name] is not None}
    if chosen and params["model"] is None:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise typer.BadParameter(f"{given}: of use only with --model")
    if {"data", "examples"} <= chosen.keys():
        raise typer.BadParameter("give --data or --examples, not both")
    return chosen
