"""Checking what an operator typed, before anything is done with it."""

from __future__ import annotations

from typing import Final

import typer
from pydantic import TypeAdapter, ValidationError

from fedra_edge.protocol.messages import RunName
from fedra_server.config import describe_invalid
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.hiding import without_secrets
from fedra_server.storage.records import ClientRecord
from fedra_server.storage.store import Store

_RUN_NAME: Final[TypeAdapter[str]] = TypeAdapter(RunName)


def checked_name(name: str) -> str:
    """Give back a name that works for a run or a model everywhere; usage error otherwise."""
    try:
        return _RUN_NAME.validate_python(name)
    except ValidationError:
        rule = "letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit"
        raise typer.BadParameter(f"{name!r} is no name; use {rule}") from None


def find_member(store: Store, name_or_id: str) -> ClientRecord:
    """Find one member by its id, or by its name if no other has the same.

    Raises:
        NotFoundError: There is none.
        ConflictError: Several have this name.
    """
    members = store.clients()
    found = [it for it in members if it.client_id == name_or_id] or [
        it for it in members if it.name == name_or_id
    ]
    if not found:
        raise NotFoundError(
            f"there is no client {without_secrets(name_or_id)}",
            remedy="See `fedra-server client list`.",
        )
    if len(found) > 1:
        ids = ", ".join(it.client_id for it in found)
        raise ConflictError(
            f"{len(found)} clients are named {name_or_id}", remedy=f"Name one by its id: {ids}."
        )
    return found[0]


def usage_error(error: ValidationError) -> typer.BadParameter:
    """Turn values out of range into a usage error that names them."""
    return typer.BadParameter(describe_invalid(error))
