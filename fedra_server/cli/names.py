"""Checking what an operator typed, before anything is done with it."""

from __future__ import annotations

from typing import Final

import typer
from pydantic import TypeAdapter, ValidationError

from fedra_edge.protocol.messages import RunName
from fedra_server.config import describe_invalid

_RUN_NAME: Final[TypeAdapter[str]] = TypeAdapter(RunName)


def checked_name(name: str) -> str:
    """Give back a name that works for a run or a model everywhere; usage error otherwise."""
    try:
        return _RUN_NAME.validate_python(name)
    except ValidationError:
        rule = "letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit"
        raise typer.BadParameter(f"{name!r} is no name; use {rule}") from None


def usage_error(error: ValidationError) -> typer.BadParameter:
    """Turn values out of range into a usage error that names them."""
    return typer.BadParameter(describe_invalid(error))
