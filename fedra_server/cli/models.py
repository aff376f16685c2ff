"""fedra-server model: the models that runs can tune."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import JsonValue

from fedra_edge.protocol.models import ModelSpec
from fedra_server.cli.names import checked_name
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
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import ModelRecord

app = typer.Typer(
    help="Register and list models.",
    epilog=example("model add vit ./vit-base"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
_FRAMEWORKS: Final = ("torch", "transformers")


@app.command(epilog=example("model add vit ./vit-base"))
def add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[Path, typer.Argument(help="Directory of a saved transformers model.")],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Split a model into pieces, measure them and register it. Needs torch."""
    checked_name(name)
    with open_workplace(home) as place:
        _refuse_early(path, name, place)
        spec = _register(path, name, place.blobs)
        record = place.store.add_model(spec, time.time())
    if as_json:
        tell_json(_summary(record))
    else:
        typer.echo(f"Registered {name}: {spec.num_layers} layers, {_size(spec)}")


@app.command("list", epilog=example("model list --json"))
def list_models(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the registered models."""
    with open_workplace(home) as place:
        records = place.store.models()
    if as_json:
        tell_json({"models": [_summary(record) for record in records]})
        return
    tell_table(
        ["NAME", "FAMILY", "LAYERS", "LABELS", "SIZE", "MODEL ID"],
        [
            [
                record.spec.name,
                record.spec.family,
                record.spec.num_layers,
                len(record.spec.labels),
                _size(record.spec),
                record.model_id[:12],
            ]
            for record in records
        ],
        empty="No models yet; add one with `fedra-server model add NAME PATH`.",
    )


def _refuse_early(path: Path, name: str, place: Workplace) -> None:
    """Refuse what cannot work before the seconds that importing a framework takes."""
    for framework in _FRAMEWORKS:
        if find_spec(framework) is None:
            raise _missing(framework)
    check_directory(path)
    for known in place.store.models():
        if known.spec.name == name and surely_differs(path, known.spec, place.blobs):
            raise ConflictError(
                f"a model named {name!r} is registered already, and {path} differs from it",
                remedy="Choose another name.",
            )


def _register(path: Path, name: str, blobs: BlobStore) -> ModelSpec:
    try:
        from fedra_server.modelbook.registering import register_model

        return register_model(path, name, blobs)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedra"):
            raise
        raise _missing(error.name) from error


def _missing(module: str | None) -> ConfigurationError:
    return ConfigurationError(
        f"registering a model needs {module}", remedy='pip install "fedra[modelbook,server]"'
    )


def _summary(record: ModelRecord) -> JsonValue:
    return {
        "name": record.spec.name,
        "model_id": record.model_id,
        "family": record.spec.family,
        "num_layers": record.spec.num_layers,
        "labels": list(record.spec.labels),
        "default_targets": list(record.spec.default_targets),
        "weight_bytes": _weight_bytes(record.spec),
        "added_at": record.added_at,
    }


def _size(spec: ModelSpec) -> str:
    return format_bytes(_weight_bytes(spec))


def _weight_bytes(spec: ModelSpec) -> int:
    return sum(piece.weights.size_bytes for piece in (spec.stem, *spec.layers, spec.head))
