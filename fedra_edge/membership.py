"""What a home keeps of one server: who the client is there, its keys, and whom it trusts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedra_edge.config import EdgeConfig
from fedra_edge.identity import Identity, IdentityFile
from fedra_edge.keys import KeyFiles
from fedra_edge.link import Link
from fedra_edge.pin import Pin


class Membership:
    """The files of one directory; each may be missing or damaged without the others."""

    def __init__(self, directory: Path, server: str) -> None:
        self.directory = directory
        self.server = server
        self.identity_file = IdentityFile(directory, server)
        self.keys = KeyFiles(directory)
        self.pin = Pin(directory)

    @classmethod
    def of(cls, config: EdgeConfig) -> Membership:
        """Find the one that the settings mean."""
        return cls(config.membership, config.server)

    def load(self) -> Identity | None:
        """Read who we are; None when we are nobody here, or cannot prove it any more.

        Raises:
            IdentityError: A file exists and may not be read.
        """
        identity = self.identity_file.load()
        if identity is not None and not self.keys.candidates():
            self.identity_file.set_aside("has lost its key")
            return None
        return identity

    def link(self, link: Link, ca_sha256: str | None) -> Link:
        """Give the way to the server, with the pinned authority where the site names no other."""
        if link.ca_file is not None or ca_sha256 is None or not self.server.startswith("https:"):
            return link
        file = self.pin.find(ca_sha256)
        return link if file is None else replace(link, ca_file=str(file), is_pinned=True)

    def forget(self) -> None:
        """Remove keys, pin and identity; the last one last, so that this can be repeated."""
        self.keys.forget()
        self.pin.forget()
        self.identity_file.forget()
