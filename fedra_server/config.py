"""What an operator may set, and where the server keeps its files."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_origin

from pydantic import AfterValidator, ByteSize, Field, JsonValue, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from fedra_edge.protocol.ids import AssignmentId, UploadId
from fedra_server.errors import ConfigurationError

_ADDRESS: Final = re.compile(r"^https?://[^\s/#?@\\]+(/[^\s#?@\\]*)?$")


def _check_address(text: str) -> str:
    if _ADDRESS.fullmatch(text) is None:
        raise ValueError("no address of a server; write it like https://hq.example:8470")
    return text


Address = Annotated[
    str, AfterValidator(_check_address), Field(json_schema_extra={"pattern": _ADDRESS.pattern})
]
"""How sites reach a server."""

CONFIG_TEMPLATE: Final = """\
# Settings of this server. A line that is commented out shows the default.
# An environment variable FEDRA_SERVER_<NAME> wins over this file.

# host = "127.0.0.1"              # address to listen on
# port = 8470                     # 0 takes any free port
# address = "https://hq.example:8470"       # how sites reach this server, for join strings
# host_names = ["hq.example", "10.0.0.5"]   # in its certificate besides this machine's own names
# tls = "auto"                    # "auto": on, except on a loopback address; or "on", "off"
# certificate_file = "chain.pem"  # your own certificate and its chain, instead of an issued one
# key_file = "key.pem"            # the key of your own certificate
# certificate_days = 90.0         # life of issued certificates; they are renewed by themselves
# enrolment = "token"             # "open" needs no join string, and a loopback address
# heartbeat_timeout_s = 60.0      # silent for longer: the client counts as gone
# max_clients = 4000              # the population never grows beyond this
# max_enrolments_per_minute = 120 # further enrolments are told to come back later
# max_request_bytes = 1048576     # for every request body but an upload's
# max_requests_per_s = 50.0       # of one client in the long run; twelve times as many at once
# max_requests_at_once = 16       # of one client, its held polls and downloads among them
# max_uploads_at_once = 4         # requests about deltas, of one client
# max_unfinished_uploads = 8      # deltas of one client that have been announced and not finished
# max_transfers_per_round = 4.0   # bytes of one client, as multiples of what its work needs
# max_strange_requests_per_s = 30.0  # of one address without a credential known to be good
# trusted_proxies = []            # addresses or networks whose X-Forwarded-For is believed
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
    def server_file(self) -> Path:
        """What tells, while a server runs, where it listens."""
        return self.path / "server.json"

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
        """Make the directories, for their owner only; those that exist stay as they are."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for directory in (self.path, self.blobs, self.uploads, self.deltas):
            directory.mkdir(mode=0o700, exist_ok=True)


def _check_network(text: str) -> str:
    """Refuse what is neither an address nor a network, such as a name that could be altered."""
    ipaddress.ip_network(text, strict=False)
    return text


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
    address: Address | None = None
    host_names: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    tls: Literal["auto", "on", "off"] = "auto"
    certificate_file: Path | None = None
    key_file: Path | None = None
    certificate_days: Annotated[float, Field(gt=0, le=825)] = 90.0
    enrolment: Literal["token", "open"] = "token"
    heartbeat_timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    max_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 4000
    max_enrolments_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 120
    max_request_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 2**20
    max_requests_per_s: Annotated[float, Field(ge=1, le=1e6)] = 50.0
    max_requests_at_once: Annotated[int, Field(ge=4, le=1_000_000)] = 16
    max_uploads_at_once: Annotated[int, Field(ge=2, le=1_000_000)] = 4
    max_unfinished_uploads: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    max_transfers_per_round: Annotated[float, Field(ge=1, le=1e6)] = 4.0
    max_strange_requests_per_s: Annotated[float, Field(ge=1, le=1e6)] = 30.0
    trusted_proxies: tuple[Annotated[str, AfterValidator(_check_network)], ...] = ()
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


def harmless_settings(config: ServerConfig) -> dict[str, JsonValue]:
    """Give the settings that may be told on: numbers, switches and choices, no texts or paths."""
    chosen = config.model_dump(mode="json")
    return {
        name: chosen[name]
        for name, field in type(config).model_fields.items()
        if isinstance(chosen[name], bool | int | float) or get_origin(field.annotation) is Literal
    }


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
