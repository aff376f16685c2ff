"""The options of `model add` for a model that is only there as an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedra_edge.protocol.models import ModelSpec
from fedra_server.errors import ConfigurationError
from fedra_server.storage.blobs import BlobStore

_FILE_OPTIONS: Final = ("labels", "tokenizer", "image_size", "image_mean", "image_std")

OnnxOption = Annotated[
    Path | None, typer.Option("--onnx", help="An ONNX file, in place of PATH. Needs no torch.")
]
LabelsOption = Annotated[
    str | None,
    typer.Option(help="With --onnx: labels with commas between, or a file with one a line."),
]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="With --onnx: tokenizer.json of a model that reads texts.")
]
ImageSizeOption = Annotated[
    int | None, typer.Option(min=1, help="With --onnx: pixels, where the file does not say.")
]
ImageMeanOption = Annotated[
    str | None, typer.Option(help="With --onnx: mean per channel, as 0.5,0.5,0.5; ImageNet's.")
]
ImageStdOption = Annotated[
    str | None, typer.Option(help="With --onnx: deviation per channel; ImageNet's.")
]


def register_file(path: Path, name: str, chosen: Mapping[str, Any], blobs: BlobStore) -> ModelSpec:
    """Register a model from its file and the options, by their names.

    Raises:
        typer.BadParameter: An option is missing, or no use with an ONNX file.
        ConfigurationError: The model cannot be taken, or packages are missing.
    """
    if chosen["path"] is not None:
        raise typer.BadParameter("give either PATH or --onnx")
    if chosen["weights_dtype"] != "float32" or not chosen["graphs"]:
        raise typer.BadParameter("--weights-dtype and --no-graphs are of no use with --onnx")
    labels = _labels(chosen["labels"])
    mean, std = (_numbers(chosen, option) for option in ("image_mean", "image_std"))
    try:
        from fedra_server.modelbook.importing.inputs import Preparation
        from fedra_server.modelbook.importing.registering import register_onnx

        given = Preparation(
            image_size=chosen["image_size"],
            mean=mean,
            std=std,
            tokenizer=chosen["tokenizer"],
            max_tokens=chosen["max_tokens"],
        )
        return register_onnx(path, name, labels, given, blobs)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedra"):
            raise
        raise ConfigurationError(
            f"registering an ONNX file needs {error.name}",
            remedy='pip install "fedra[onnx,server,text]" onnx',
        ) from error


def refuse_file_options(chosen: Mapping[str, Any]) -> None:
    """Refuse options that say something of an ONNX file when there is none.

    Raises:
        typer.BadParameter: One is given.
    """
    for option in _FILE_OPTIONS:
        if chosen[option] is not None:
            raise typer.BadParameter(f"--{option.replace('_', '-')} is of use only with --onnx")


def _labels(text: str | None) -> list[str]:
    """Read labels off the command line, or off a file of that name."""
    if text is None:
        raise typer.BadParameter("--onnx needs --labels, such as --labels bolt,nut,washer")
    try:
        is_file = Path(text).is_file()
        if is_file:
            parts = Path(text).read_text(encoding="utf-8").rstrip().splitlines()
        else:
            parts = text.split(",")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read labels from {text[:100]}: {error}") from error
    labels = [part.strip() for part in parts]
    if not all(labels):
        raise ConfigurationError("a label is empty", remedy="Name every label with --labels.")
    if len(set(labels)) != len(labels):
        raise ConfigurationError("a label is named twice")
    return labels


def _numbers(chosen: Mapping[str, Any], option: str) -> tuple[float, ...] | None:
    text: str | None = chosen[option]
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        named = f"--{option.replace('_', '-')}"
        raise typer.BadParameter(f"{named}: {text!r} is no row of numbers") from None
