"""What an operator may set, and where the server keeps its files."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import ByteSize, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from fedra_edge.protocol.ids import AssignmentId, UploadId
from fedra_server.errors import ConfigurationError

CONFIG_TEMPLATE: Final = """\
# Settings of this server. A line that is commented out shows the default.
# An environment variable FEDRA_SERVER_<NAME> wins over this file.

# host = "127.0.0.1"              # address to listen on
# port = 8470                     # 0 takes any free port
# heartbeat_timeout_s = 60.0      # silent for longer: the client counts as gone
# max_clients = 4000              # the population never grows beyond this
# max_enrolments_per_minute = 120 # further enrolments are told to come back later
# max_request_bytes = 1048576     # for every request body but an upload's
# max_delta_bytes = 67108864      # default: what the run's adapters need
# max_disk_bytes = "100GB"        # for weights, adapters, deltas and uploads; default: the disk
# database_url = "postgresql+psycopg://user@host/fedra"  # default: a SQLite file here
# log_level = "info"
"""


@dataclass(frozen=True)
class ServerHome:
    """The server's directory and the places in it."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The operator's settings."""
        return self.path / "server.toml"

    @property
    def database_file(self) -> Path:
        """The embedded database."""
        return self.path / "fedra.sqlite3"

    @property
    def database_url(self) -> str:
        """The embedded database, as SQLAlchemy names it."""
        return f"sqlite:///{self.database_file.as_posix()}"

    @property
    def blobs(self) -> Path:
        """Weights and adapters by content; served to every client."""
        return self.path / "blobs"

    @property
    def uploads(self) -> Path:
        """Deltas that are still arriving."""
        return self.path / "uploads"

    @property
    def deltas(self) -> Path:
        """Admitted deltas; never served."""
        return self.path / "deltas"

    def upload_part(self, upload_id: UploadId) -> Path:
        """Name the file that an upload's bytes are appended to."""
        return self.uploads / f"{upload_id}.part"

    def delta_file(self, assignment_id: AssignmentId) -> Path:
        """Name the file of an admitted delta."""
        return self.deltas / f"{assignment_id}.safetensors"

    def create(self) -> None:
        """Make the directories; those that exist stay as they are."""
        for directory in (self.path, self.blobs, self.uploads, self.deltas):
            directory.mkdir(parents=True, exist_ok=True)


class ServerConfig(BaseSettings):
    """The settings, from arguments, then FEDRA_SERVER_* variables, then defaults.

    ``max_delta_bytes`` None derives the limit from the adapters of the run. ``max_disk_bytes``
    limits what uploads may add to; None leaves it to the disk. ``port`` 0 takes
    any free port. ``database_url`` may hold a password, so it is kept out of representations.
    """

    model_config = SettingsConfigDict(
        env_prefix="FEDRA_SERVER_", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8470
    heartbeat_timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    max_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 4000
    max_enrolments_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 120
    max_request_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 2**20
    max_delta_bytes: Annotated[int, Field(ge=1, le=2**40)] | None = None
    max_disk_bytes: Annotated[ByteSize, Field(ge=1, le=2**50)] | None = None
    database_url: Annotated[str | None, Field(repr=False)] = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def load(cls, home: ServerHome) -> ServerConfig:
        """Read the settings of a home: environment first, then its file, then defaults.

        Raises:
            ConfigurationError: The file cannot be read, or a setting is unknown or out of range.
        """
        from_file = _read_toml(home.config_file)
        try:
            return cls(**{**from_file, **EnvSettingsSource(cls)()})
        except ValidationError as error:
            raise ConfigurationError(
                f"the settings cannot work: {describe_invalid(error)}",
                remedy=f"Correct {home.config_file} or the FEDRA_SERVER_* variables.",
            ) from error


def describe_invalid(error: ValidationError) -> str:
    """Tell each invalid value's name and what is wrong with it, never the value itself."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, issue["loc"])), _plainly(issue["msg"]))))
        for issue in error.errors(include_input=False, include_url=False)
    )


def _plainly(message: str) -> str:
    known = message.removeprefix("Value error, ")
    return "unknown setting" if known == "Extra inputs are not permitted" else known


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}", remedy="Correct the file; it is TOML in UTF-8."
        ) from error
