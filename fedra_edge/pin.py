"""The certificate authority of a server, kept since the first meeting and trusted from then on."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Final

from fedra_edge.durable_files import clear_place, remove_durably, set_aside, write_durably
from fedra_edge.errors import IdentityError
from fedra_edge.protocol.trust import certificate_sha256

LOGGER: Final = logging.getLogger(__name__)
FILE_NAME: Final = "authority.pem"
_DAMAGED: Final = "damaged"


class Pin:
    """The pinned authority in the directory that belongs to one server."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME

    @property
    def ca_sha256(self) -> str | None:
        """Name the authority that is kept here, if there is one."""
        with contextlib.suppress(OSError, ValueError):
            return certificate_sha256(self._path.read_text(encoding="ascii"))
        return None

    def find(self, ca_sha256: str) -> Path | None:
        """Give the file if it holds exactly this authority; None when there is none.

        A damaged one is set aside with a warning. One of another server stays where it is: it is
        not to be lost to a fingerprint that was mistyped.

        Raises:
            IdentityError: The file exists and may not be read.
        """
        clear_place(self._path, self._path.parent / _DAMAGED)
        try:
            pinned = certificate_sha256(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise IdentityError(
                f"cannot read {self._path}: {error.strerror}",
                remedy="run the client as the user that enrolled it, or choose another --home",
            ) from error
        except ValueError:
            self._set_aside("is damaged")
            return None
        return self._path if pinned == ca_sha256 else None

    def keep(self, pem: str) -> None:
        """Trust this authority from now on; another one is set aside with a warning."""
        pinned = self.ca_sha256
        if pinned is not None and pinned != certificate_sha256(pem):
            self._set_aside("is of another server")
        write_durably(self._path, pem.encode("ascii"))

    def forget(self) -> None:
        """Remove the pin, if there is one."""
        remove_durably(self._path)

    def _set_aside(self, reason: str) -> None:
        kept_at = set_aside(self._path, self._path.parent / _DAMAGED)
        LOGGER.warning("%s %s; kept as %s", self._path, reason, kept_at)
