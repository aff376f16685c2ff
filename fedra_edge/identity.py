"""Who this client is on a server: its id and credential, kept in one private file."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fedra_edge.durable_files import (
    StateFile,
    clear_place,
    set_aside,
    storage_errors,
    write_durably,
)
from fedra_edge.errors import IdentityError, StorageError
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.wire import ShortText, Token

LOGGER: Final = logging.getLogger(__name__)
FILE_NAME: Final = "identity.json"
_DAMAGED: Final = "damaged"


class _StoredIdentity(StateFile):
    server: str
    client_id: Token
    credential: ShortText


@dataclass(frozen=True)
class Identity:
    """A membership; the credential never shows in a representation or a log."""

    client_id: ClientId
    credential: str = field(repr=False)


def known_servers(home: Path) -> list[str]:
    """List the servers on which this home has an identity."""
    servers = []
    for path in sorted((home / "servers").glob(f"*/{FILE_NAME}")):
        with contextlib.suppress(OSError, ValidationError):
            servers.append(_StoredIdentity.model_validate_json(path.read_bytes()).server)
    return servers


class IdentityFile:
    """The identity on one server, in the directory that belongs to that server."""

    def __init__(self, directory: Path, server: str) -> None:
        self._path = directory / FILE_NAME
        self._server = server

    def load(self) -> Identity | None:
        """Read the identity; None when there is none.

        A file that cannot be understood is set aside with a warning, so that it never blocks
        joining: the client enrols anew. So is anything else in its place.

        Raises:
            IdentityError: The file exists and may not be read.
        """
        clear_place(self._path, self._path.parent / _DAMAGED)
        try:
            stored = _StoredIdentity.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise IdentityError(
                f"cannot read {self._path}: {error.strerror}",
                remedy="run the client as the user that enrolled it, or choose another --home",
            ) from error
        except ValidationError:
            self._set_aside("is damaged or of a newer version")
            return None
        if stored.server != self._server:
            self._set_aside("belongs to another server")
            return None
        return Identity(ClientId(stored.client_id), stored.credential)

    def save(self, identity: Identity) -> None:
        """Keep an identity; on return it is on disk, readable by the owner only.

        Raises:
            IdentityError: It cannot be written.
        """
        stored = _StoredIdentity(
            server=self._server, client_id=identity.client_id, credential=identity.credential
        )
        try:
            write_durably(self._path, stored.model_dump_json(indent=2).encode())
        except StorageError as error:
            raise IdentityError(str(error), remedy=error.remedy) from error

    def forget(self) -> None:
        """Remove the identity, if there is one."""
        with storage_errors(f"remove {self._path}"):
            self._path.unlink(missing_ok=True)

    def _set_aside(self, reason: str) -> None:
        kept_at = set_aside(self._path, self._path.parent / _DAMAGED)
        LOGGER.warning(
            "the identity file %s; kept as %s, enrolling anew; headquarters may disregard the "
            "member that it stood for",
            reason,
            kept_at,
        )
