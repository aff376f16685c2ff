"""What every command starts from: the home it works on, opened and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import ConfigurationError
from fedra_server.exit_codes import EXIT_CODES_HELP
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store

DEFAULT_HOME: Final = Path("fedra-server-home")

HomeOption = Annotated[
    Path,
    typer.Option("--home", envvar="FEDRA_SERVER_HOME", help="Where the server keeps its files."),
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
    """
    home = initialised_home(path)
    config = ServerConfig.load(home)
    store = Store.open(home.path, config.database_url)
    try:
        yield Workplace(home, config, store, BlobStore(home.blobs))
    finally:
        store.close()


def initialised_home(path: Path) -> ServerHome:
    """Check that `fedra-server init` was run on a home; ConfigurationError when it was not."""
    home = ServerHome(path.absolute())
    if not home.config_file.is_file():
        raise ConfigurationError(
            f"there is no server home at {path}", remedy=f"fedra-server init --home {path}"
        )
    return home


def example(command: str) -> str:
    """Write the end of a command's help."""
    return f"Example: fedra-server {command}\n\n{EXIT_CODES_HELP}"
