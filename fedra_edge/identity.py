"""Who this client is on a server: its id there, and which server that is, in one private file."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter, ValidationError

from fedra_edge.durable_files import (
    StateFile,
    clear_place,
    remove_durably,
    set_aside,
    write_durably,
)
from fedra_edge.errors import IdentityError, StorageError
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.wire import HexDigest, Token

LOGGER: Final = logging.getLogger(__name__)
FILE_NAME: Final = "identity.json"
_DAMAGED: Final = "damaged"
_TOKEN: Final[TypeAdapter[str]] = TypeAdapter(Token)


class _StoredIdentity(StateFile):
    """Before version 2, a credential stood in for the key that a client has now."""

    version: Literal[2] = 2  # type: ignore[assignment]
    server: str
    client_id: Token
    ca_sha256: HexDigest
    join_sha256: HexDigest | None = None


@dataclass(frozen=True)
class Identity:
    """A membership: who we are, and on which server, which is named by its authority.

    ``join_sha256`` is the digest of the secret that it was joined with, if there was one.
    """

    client_id: ClientId
    ca_sha256: str
    join_sha256: str | None = None


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
            self.set_aside("is damaged or of another version")
            return None
        if stored.server != self._server:
            self.set_aside("belongs to another server")
            return None
        return Identity(ClientId(stored.client_id), stored.ca_sha256, stored.join_sha256)

    def save(self, identity: Identity) -> None:
        """Keep an identity; on return it is on disk, readable by the owner only.

        Raises:
            IdentityError: It cannot be written.
        """
        stored = _StoredIdentity(
            server=self._server,
            client_id=identity.client_id,
            ca_sha256=identity.ca_sha256,
            join_sha256=identity.join_sha256,
        )
        try:
            write_durably(self._path, stored.model_dump_json(indent=2).encode())
        except StorageError as error:
            raise IdentityError(str(error), remedy=error.remedy) from error

    def forget(self) -> None:
        """Remove the identity, if there is one."""
        remove_durably(self._path)

    def former_client_id(self) -> str | None:
        """Tell who this client was by the latest identity that was set aside, if it says so."""
        kept = (self._path.parent / _DAMAGED).glob(f"{FILE_NAME}*")
        files = [path for path in kept if path.is_file()]
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return _TOKEN.validate_python(json.loads(path.read_bytes())["client_id"])
        return None

    def set_aside(self, reason: str) -> None:
        """Move the file out of the way and say why."""
        kept_at = set_aside(self._path, self._path.parent / _DAMAGED)
        LOGGER.warning(
            "the identity file %s; kept as %s, enrolling anew; headquarters may disregard the "
            "member that it stood for",
            reason,
            kept_at,
        )
