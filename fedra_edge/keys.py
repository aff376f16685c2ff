"""The key pair that a client proves itself with: one private file, a second one while it changes.

Signing needs a library that takes memory, so it is imported when a key is read, and not before.
"""

from __future__ import annotations

import logging
import time
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedra_edge.durable_files import (
    clear_place,
    remove_durably,
    set_aside,
    storage_errors,
    sync_directory,
    write_durably,
)
from fedra_edge.errors import IdentityError
from fedra_edge.protocol.trust import to_base64url

if TYPE_CHECKING:
    from nacl.signing import SigningKey

LOGGER: Final = logging.getLogger(__name__)
FILE_NAME: Final = "key.pem"
NEXT_NAME: Final = "next-key.pem"
_DAMAGED: Final = "damaged"
_PEM_BEGIN: Final = b"-----BEGIN PRIVATE KEY-----\n"
_PEM_END: Final = b"\n-----END PRIVATE KEY-----\n"
_PKCS8_ED25519: Final = bytes.fromhex("302e020100300506032b657004220420")
"""What stands before the 32 secret bytes of an Ed25519 key in PKCS8 (RFC 8410)."""


@dataclass(frozen=True)
class ClientKey:
    """An Ed25519 key pair; its private half never shows in a representation or a log."""

    public_key: str
    _private: SigningKey = field(repr=False, compare=False)

    @classmethod
    def make(cls) -> ClientKey:
        """Draw a new pair."""
        from nacl.signing import SigningKey

        return cls._of(SigningKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes) -> ClientKey:
        """Read what `to_pem` wrote.

        Raises:
            ValueError: It is no such key.
        """
        from nacl.signing import SigningKey

        text = pem.removeprefix(_PEM_BEGIN).removesuffix(_PEM_END)
        seed = b64decode(text, validate=True).removeprefix(_PKCS8_ED25519)
        key = cls._of(SigningKey(seed))
        if key.to_pem() != pem:
            raise ValueError("this is no Ed25519 key in PKCS8, or not all of it")
        return key

    @classmethod
    def _of(cls, private: SigningKey) -> ClientKey:
        return cls(to_base64url(bytes(private.verify_key)), private)

    def to_pem(self) -> bytes:
        """Write the private half as PKCS8, which for this kind of key has one form."""
        return _PEM_BEGIN + b64encode(_PKCS8_ED25519 + bytes(self._private)) + _PEM_END

    def sign(self, message: bytes) -> str:
        """Sign as the protocol writes signatures."""
        return to_base64url(self._private.sign(message).signature)


class KeyFiles:
    """The keys in the directory that belongs to one server; only their owner may read them."""

    def __init__(self, directory: Path) -> None:
        self._current = directory / FILE_NAME
        self._next = directory / NEXT_NAME

    @property
    def is_there(self) -> bool:
        """Whether any key is kept here, readable or not."""
        return self._current.exists() or self._next.exists()

    @property
    def age_s(self) -> float:
        """How old the current key is; 0 when there is none."""
        try:
            return max(0.0, time.time() - self._current.stat().st_mtime)
        except OSError:
            return 0.0

    def candidates(self) -> list[ClientKey]:
        """Give the keys that the server may know this client by, the likelier one first.

        There is a next one only while the key is changed, or after a crash amid that.
        """
        found = (_load(self._next), _load(self._current))
        return [key for key in found if key is not None]

    def current(self) -> ClientKey:
        """Give the current key, made and on the disk if there was none."""
        return _load(self._current) or _keep_new(self._current)

    def next(self) -> ClientKey:
        """Give the key to come, made and on the disk if there was none."""
        return _load(self._next) or _keep_new(self._next)

    def promote(self, key: ClientKey) -> None:
        """Let a key that the server has accepted be the current one, if it was the next."""
        next_key = _load(self._next)
        if next_key is None or next_key != key:
            return  # it was current before, or another process was quicker
        with storage_errors(f"keep {self._current}"):
            self._next.replace(self._current)
            sync_directory(self._current.parent)

    def set_aside(self) -> None:
        """Move the keys out of the way, for new ones."""
        for path in (self._current, self._next):
            if path.exists():
                set_aside(path, path.parent / _DAMAGED)

    def forget(self) -> None:
        """Remove all keys."""
        remove_durably(self._next, self._current)


def load_signing() -> None:
    """Take the memory that signing takes now, so that whatever is measured next has it in it."""
    ClientKey.from_pem(ClientKey.make().to_pem()).sign(b"")


def _load(path: Path) -> ClientKey | None:
    """Read a key; None when there is none, or what is there is none and was set aside.

    Raises:
        IdentityError: The file exists and may not be read.
    """
    clear_place(path, path.parent / _DAMAGED)
    try:
        return ClientKey.from_pem(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(
            f"cannot read {path}: {error.strerror}",
            remedy="run the client as the user that enrolled it, or choose another --home",
        ) from error
    except ValueError:
        kept_at = set_aside(path, path.parent / _DAMAGED)
        LOGGER.warning("the key %s is damaged; kept as %s", path, kept_at)
        return None


def _keep_new(path: Path) -> ClientKey:
    key = ClientKey.make()
    write_durably(path, key.to_pem())
    return key
