"""fedra-server model: the models that runs can tune."""

# ruff: noqa: ARG001 - typer reads the options off the signature, the context holds them

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer
from pydantic import JsonValue

from fedra_edge.protocol.models import MAX_TOKENS, GraphContents, ModelSpec, TokenInput
from fedra_server.cli.names import checked_name
from fedra_server.cli.onnx_models import (
    ImageMeanOption,
    ImageSizeOption,
    ImageStdOption,
    LabelsOption,
    OnnxOption,
    TokenizerOption,
    refuse_file_options,
    register_file,
)
from fedra_server.cli.output import format_bytes, tell_json, tell_table
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    Workplace,
    example,
    open_workplace,
)
from fedra_server.errors import ConfigurationError, ConflictError
from fedra_server.modelbook.comparing import check_directory, surely_differs
from fedra_server.modelbook.stored_dtypes import WeightsDtype, stored_dtype
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import ModelRecord

app = typer.Typer(
    help="Register and list models.",
    epilog=example("model add vit ./vit-base"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
_FRAMEWORKS: Final = ("torch", "transformers")
GRAPH_PACKAGES: Final = ("onnx", "onnxruntime")
WeightsDtypeOption = Annotated[
    WeightsDtype,
    typer.Option(help="How frozen weights are stored and served; 16 bits take half the space."),
]

MaxTokensOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_TOKENS, help="Where texts are cut; 512 or the model's own limit."),
]

GraphsOption = Annotated[
    bool,
    typer.Option("--graphs/--no-graphs", help="Whether clients without PyTorch can train it too."),
]


@app.command(epilog=example("model add vit ./vit-base"))
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[
        Path | None, typer.Argument(help="Directory of a saved transformers model.")
    ] = None,
    weights_dtype: WeightsDtypeOption = "float32",
    max_tokens: MaxTokensOption = None,
    graphs: GraphsOption = True,
    onnx: OnnxOption = None,
    labels: LabelsOption = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSizeOption = None,
    image_mean: ImageMeanOption = None,
    image_std: ImageStdOption = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Split a model into pieces, measure them and register it. Needs torch, but for --onnx."""
    checked_name(name)
    with open_workplace(home) as place:
        if onnx is not None:
            spec = register_file(onnx, name, context.params, place.blobs)
        elif path is not None:
            refuse_file_options(context.params)
            _refuse_missing((*_FRAMEWORKS, *(GRAPH_PACKAGES if graphs else ())))
            _refuse_early(path, name, weights_dtype, place)
            settings = _Settings(weights_dtype, max_tokens, graphs)
            spec = _register(path, name, settings, place.blobs)
        else:
            raise typer.BadParameter("give the PATH of a saved model, or --onnx FILE")
        record = place.store.add_model(spec, time.time())
        summary = _summary(record, place.blobs)
    if as_json:
        tell_json(summary)
    else:
        size = f"{_size(spec)} in {weights_dtype}"
        typer.echo(f"Registered {name}: {spec.num_layers} layers, {size}")


@app.command("list", epilog=example("model list --json"))
def list_models(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the registered models."""
    with open_workplace(home) as place:
        records = place.store.models()
        summaries = [_summary(record, place.blobs) for record in records]
    if as_json:
        tell_json({"models": [*summaries]})
        return
    tell_table(
        ["NAME", "FAMILY", "LAYERS", "LABELS", "SIZE", "DTYPE", "MODEL ID"],
        [
            [
                record.spec.name,
                record.spec.family,
                record.spec.num_layers,
                len(record.spec.labels),
                _size(record.spec),
                summary["weights_dtype"] or "unreadable",
                record.model_id[:12],
            ]
            for record, summary in zip(records, summaries, strict=True)
        ],
        empty="No models yet; add one with `fedra-server model add NAME PATH`.",
    )


@app.command(epilog=example("model show vit --spec > model.json"))
def show(
    name: Annotated[str, typer.Argument(help="Name of a registered model.")],
    whole_spec: Annotated[
        bool,
        typer.Option("--spec", help="Print the description that `fedra-edge profile` takes."),
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Tell what a registered model is and how its weights are stored."""
    with open_workplace(home) as place:
        record = place.store.model_by_name(name)
        summary = _summary(record, place.blobs)
        description = _description(record.spec, place.blobs) if whole_spec else None
    if description is not None:
        tell_json(description)
        return
    if as_json:
        tell_json(summary)
        return
    spec = record.spec
    typer.echo(f"Model {name}: {spec.family}, {spec.num_layers} layers, {len(spec.labels)} labels")
    typer.echo(f"Reads: {_read_by(spec)}")
    typer.echo(f"Weights: {_size(spec)} in {summary['weights_dtype'] or 'unreadable files'}")
    typer.echo(f"Adapted by default: {', '.join(spec.default_targets)}")
    typer.echo(f"Clients without PyTorch: {'welcome' if spec.graphs else 'cannot take part'}")
    typer.echo(f"Model id: {record.model_id}")


def _refuse_missing(frameworks: Iterable[str]) -> None:
    for framework in frameworks:
        if find_spec(framework) is None:
            raise _missing(framework)


def _refuse_early(path: Path, name: str, weights_dtype: WeightsDtype, place: Workplace) -> None:
    """Refuse what cannot work before the seconds that importing a framework takes."""
    check_directory(path)
    for known in place.store.models():
        if known.spec.name == name and surely_differs(path, weights_dtype, known.spec, place.blobs):
            raise ConflictError(
                f"a model named {name!r} is registered already, "
                f"and {path} in {weights_dtype} differs from it",
                remedy="Choose another name.",
            )


class _Settings(NamedTuple):
    """How a model is to be registered."""

    weights_dtype: WeightsDtype
    max_tokens: int | None
    with_graphs: bool


def _register(path: Path, name: str, settings: _Settings, blobs: BlobStore) -> ModelSpec:
    try:
        from fedra_server.modelbook.registering import register_model

        return register_model(path, name, blobs, **settings._asdict())
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedra"):
            raise
        raise _missing(error.name) from error


def _missing(module: str | None) -> ConfigurationError:
    return ConfigurationError(
        f"registering a model needs {module}", remedy='pip install "fedra[modelbook,server]"'
    )


def _summary(record: ModelRecord, blobs: BlobStore) -> dict[str, JsonValue]:
    return {
        "name": record.spec.name,
        "model_id": record.model_id,
        "family": record.spec.family,
        "num_layers": record.spec.num_layers,
        "labels": list(record.spec.labels),
        "default_targets": list(record.spec.default_targets),
        "weight_bytes": _weight_bytes(record.spec),
        "weights_dtype": stored_dtype(record.spec, blobs),
        "has_graphs": record.spec.graphs is not None,
        "added_at": record.added_at,
    }


def _description(spec: ModelSpec, blobs: BlobStore) -> dict[str, JsonValue]:
    """Give what a site needs to know of a model to measure it: no weights, but the graphs."""
    refs = {} if spec.graphs is None else spec.graphs.by_name
    contents = {name: b64encode(blobs.path(ref.sha256).read_bytes()) for name, ref in refs.items()}
    described = GraphContents.model_validate({"graph_contents": contents})
    return {**spec.model_dump(mode="json"), **described.model_dump(mode="json")}


def _read_by(spec: ModelSpec) -> str:
    if isinstance(spec.input, TokenInput):
        return f"texts of up to {spec.input.max_tokens} tokens"
    return f"images of {spec.input.size_px} x {spec.input.size_px} pixels"


def _size(spec: ModelSpec) -> str:
    return format_bytes(_weight_bytes(spec))


def _weight_bytes(spec: ModelSpec) -> int:
    return sum(piece.weights.size_bytes for piece in (spec.stem, *spec.layers, spec.head))
