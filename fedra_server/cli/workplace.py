"""What every command starts from: the home it works on, opened and checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import ConfigurationError, StorageError
from fedra_server.exit_codes import EXIT_CODES_HELP
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store

DEFAULT_HOME: Final = Path("fedra-server-home")
CLOSED_REMEDY: Final = (
    "Run this as the user who made the home, give this user the right to read and write it, "
    "or choose another place with --home."
)
_HOME_VARIABLE: Final = "FEDRA_SERVER_HOME"

HomeOption = Annotated[
    Path,
    typer.Option("--home", envvar=_HOME_VARIABLE, help="Where the server keeps its files."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass(frozen=True)
class Workplace:
    """An initialised home with its settings and its open records."""

    home: ServerHome
    config: ServerConfig
    store: Store
    blobs: BlobStore


@contextmanager
def open_workplace(path: Path) -> Iterator[Workplace]:
    """Open a home for the length of a command.

    Raises:
        ConfigurationError: It was never initialised, or its settings cannot work.
        StorageError: This user may not read or write it.
    """
    home = initialised_home(path)
    config = ServerConfig.load(home)
    store = Store.open(home.path, config.database_url)
    try:
        yield Workplace(home, config, store, BlobStore(home.blobs))
    finally:
        store.close()


def initialised_home(path: Path) -> ServerHome:
    """Check that `fedra-server init` was run on a home.

    Raises:
        ConfigurationError: It was not.
        StorageError: This user may not read or write it.
    """
    home = ServerHome(path.absolute())
    check_access(home)
    if not home.config_file.is_file():
        raise ConfigurationError(
            f"there is no server home at {path}", remedy=f"fedra-server init --home {path}"
        )
    return home


def check_access(home: ServerHome) -> None:
    """Say in plain words, before the database does, that a home is closed to this user.

    Raises:
        StorageError: The home, its settings or its database cannot be read or written.
    """
    for path, mode in (
        (home.path, os.R_OK | os.W_OK | os.X_OK),
        (home.config_file, os.R_OK),
        (home.database_file, os.R_OK | os.W_OK),
    ):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _closed(f"{path} cannot be reached: {error.strerror}") from error
        if not os.access(path, mode):
            lacking = "read" if not os.access(path, os.R_OK) else "written"
            raise _closed(f"{path} cannot be {lacking} by this user")


def _closed(message: str) -> StorageError:
    return StorageError(message, remedy=CLOSED_REMEDY)


@contextmanager
def advising(remedy: str) -> Iterator[None]:
    """Add a remedy to a StorageError that has none."""
    try:
        yield
    except StorageError as error:
        error.remedy = error.remedy or remedy
        raise


def home_flag(home: Path) -> str:
    """Write the option that a further command needs to find the same home."""
    if str(home) in {str(DEFAULT_HOME), os.environ.get(_HOME_VARIABLE)}:
        return ""
    return f" --home {home}"


def example(command: str) -> str:
    """Write the end of a command's help."""
    return f"Example: fedra-server {command}\n\n{EXIT_CODES_HELP}"
