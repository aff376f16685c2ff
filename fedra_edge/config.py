"""What a site may choose for its client, from arguments and FEDRA_EDGE_* variables."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fedra_edge.errors import ConfigurationError
from fedra_edge.link import IDLE_S, Link
from fedra_edge.profiling import SiteCaps
from fedra_edge.protocol.messages import RunName, SiteName
from fedra_edge.protocol.routes import MAX_POLL_S
from fedra_edge.protocol.trust import JoinString, is_join_string
from fedra_edge.protocol.wire import HexDigest

_UNITS: Final[Mapping[str, int]] = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+(:\d+)?/?")
_OPTIONS: Final = frozenset(
    {
        "server", "data", "name", "run", "home", "max_layers", "backend", "threads",
        "max_bandwidth", "proxy", "ca_file", "insecure_http",
    }
)  # fmt: skip
_SHORTER: Final = {"memory_bytes": "--memory", "mirrors": "--mirror"}
_NAME_RULE: Final = (
    "should be at most 64 letters, digits, dots, dashes and underscores, a letter or digit first"
)
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: object) -> object:
    """Read ``'512MB'`` or ``'1.5 GiB'`` as bytes; give anything that is no text back unchanged.

    Raises:
        ValueError: The text is no number with a known unit.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is no size; write for example 512MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def default_home() -> Path:
    """Give the place for user data that the platform recommends."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "fedra-edge"


def default_name() -> str:
    """Make a site name of the machine's host name."""
    letters = re.sub(r"[^A-Za-z0-9 ._-]", "-", socket.gethostname()).lstrip(" ._-")
    return letters[:64] or "unnamed"


def _check_url(url: str) -> str:
    if is_join_string(url):
        JoinString.parse(url)  # says what is missing
    parts = urlsplit(url.strip())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(_no_address(url.strip()))
    if parts.query or parts.fragment or parts.username:
        raise ValueError("a server address has no user name, query or fragment")
    return url.strip().rstrip("/")


def _is_plain_to_elsewhere(url: str) -> bool:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http" or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _check_proxy(url: SecretStr) -> SecretStr:
    parts = urlsplit(url.get_secret_value())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("this is no proxy address; write for example http://proxy.plant:3128")
    return url


def _split_mirrors(value: object) -> object:
    """Read what a variable holds: places with commas between them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check_mirror(place: str) -> str:
    return _check_url(place) if "://" in place else str(Path(place).expanduser())


def _no_address(url: str) -> str:
    """Say what is missing; what may hold a password is not repeated."""
    shown = "this" if "@" in url or is_join_string(url) else repr(url)
    meant = "write for example https://plant.example"
    if _HOST.fullmatch(url):
        meant = f"did you mean http://{url} (or https://)?"
    return f"{shown} is no server address; {meant}"


Config = TypeVar("Config", bound=BaseSettings)
SizeBytes = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=2**50)]
ServerUrl = Annotated[str, AfterValidator(_check_url)]
MirrorPlace = Annotated[str, Field(min_length=1), AfterValidator(_check_mirror)]
Mirrors = Annotated[tuple[MirrorPlace, ...], NoDecode, BeforeValidator(_split_mirrors)]
Proxy = Annotated[SecretStr, AfterValidator(_check_proxy)]
BytesPerSecond = Annotated[int, BeforeValidator(parse_size), Field(ge=1000, le=2**50)]


class SiteConfig(BaseSettings):
    """What holds for a machine whatever the server; every field can be ``FEDRA_EDGE_<FIELD>``.

    ``memory_bytes`` caps what the whole process may occupy, ``max_layers`` the layers trained
    in a round, ``disk_quota_bytes`` the cache of model weights below ``home``, ``max_bandwidth``
    the bytes a second that all transfers together may move. ``mirrors`` are directories and web
    addresses where weights are looked for first. ``idle_timeout_s`` is how long a connection may
    be without any progress before it is given up and another one is tried. ``insecure_http``
    allows plain http to another machine, which everybody on the way can read and alter.
    """

    model_config = SettingsConfigDict(
        env_prefix="FEDRA_EDGE_", env_ignore_empty=True, frozen=True, extra="forbid"
    )

    home: Path = Field(default_factory=default_home)
    memory_bytes: SizeBytes | None = None
    max_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    disk_quota_bytes: SizeBytes = 10 * 10**9
    backend: Literal["auto", "torch", "onnx"] = "auto"
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_bandwidth: BytesPerSecond | None = None
    mirrors: Mirrors = ()
    proxy: Proxy | None = None
    ca_file: Path | None = None
    idle_timeout_s: Annotated[float, Field(ge=1, le=3600)] = IDLE_S
    insecure_http: bool = False

    @property
    def link(self) -> Link:
        """The way to the server."""
        return Link(
            proxy=self.proxy.get_secret_value() if self.proxy else None,
            ca_file=str(self.ca_file) if self.ca_file else None,
            max_bytes_per_s=self.max_bandwidth,
            idle_s=self.idle_timeout_s,
        )

    @property
    def blobs(self) -> Path:
        """Where downloaded weights are kept, shared by all servers of this home."""
        return self.home / "blobs"

    @property
    def caps(self) -> SiteCaps:
        """The limits that the site itself sets."""
        return SiteCaps(
            memory_bytes=self.memory_bytes,
            max_layers=self.max_layers,
            disk_bytes=self.disk_quota_bytes,
            threads=self.threads,
        )


class EdgeConfig(SiteConfig):
    """The settings of one client: a machine's, and what it does on one server.

    A client of the command line gives its memory back after ``rest_after_s`` without work.
    A join string given as ``server`` is three settings in one: the address, what admits there
    once, and the fingerprint of the server's authority. The client's key is changed when it is
    ``rotate_key_after_days`` old.
    """

    server: ServerUrl
    join_secret: SecretStr | None = None
    ca_sha256: HexDigest | None = None
    data: Path | None = None
    name: SiteName = Field(default_factory=default_name)
    run: RunName | None = None
    poll_s: Annotated[float, Field(ge=0, le=MAX_POLL_S)] = 25.0
    heartbeat_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    rest_after_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0
    rotate_key_after_days: Annotated[float, Field(ge=0, le=36_500)] = 90.0

    @model_validator(mode="before")
    @classmethod
    def _split_join_string(cls, values: object) -> object:
        """Take a join string apart; what is none is refused as an address."""
        server = values.get("server") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not isinstance(server, str):
            return values
        try:
            told = JoinString.parse(server)
        except ValueError:
            return values
        secrets = {"join_secret": told.secret, "ca_sha256": told.ca_sha256}
        return {**values, "server": told.address, **secrets}

    @field_validator("server")
    @classmethod
    def _check_plain_http(cls, server: str, info: ValidationInfo) -> str:
        if not info.data.get("insecure_http") and _is_plain_to_elsewhere(server):
            raise ValueError(
                "plain http to another machine can be read and altered on the way; use https:// "
                "with the join string that headquarters gives out, or accept it: --insecure-http"
            )
        return server

    @property
    def join_sha256(self) -> str | None:
        """What the secret of the join string is told by later, without keeping it."""
        if self.join_secret is None:
            return None
        return hashlib.sha256(self.join_secret.get_secret_value().encode()).hexdigest()

    @property
    def is_insecure(self) -> bool:
        """Whether everybody on the way to the server can read and alter what is said."""
        return _is_plain_to_elsewhere(self.server)

    @property
    def membership(self) -> Path:
        """What belongs to this server alone: identity, key, pin, outbox and checkpoint."""
        return self.home / "servers" / _folder_name(self.server)

    @property
    def outbox(self) -> Path:
        """Where trained deltas wait until the server has them."""
        return self.membership / "outbox"

    @property
    def checkpoints(self) -> Path:
        """Where a training is kept as it goes on."""
        return self.membership / "checkpoints"


def load_config(options: Mapping[str, object]) -> EdgeConfig:
    """Combine given options with the environment; an option that is None counts as not given.

    Raises:
        ConfigurationError: Something is missing, unknown or out of range.
    """
    return _load(EdgeConfig, options)


def load_site_config(options: Mapping[str, object]) -> SiteConfig:
    """Do the same for what needs no server.

    Raises:
        ConfigurationError: Something is unknown or out of range.
    """
    return _load(SiteConfig, options)


def _load(kind: type[Config], options: Mapping[str, object]) -> Config:
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigurationError(
            "; ".join(_explain(dict(item)) for item in error.errors(include_url=False)),
            remedy="check the options and the FEDRA_EDGE_* variables",
        ) from None


def _explain(item: Mapping[str, object]) -> str:
    """Say what is wrong with a setting, in the words of the command line."""
    location = item.get("loc")
    field = ".".join(str(part) for part in location) if isinstance(location, tuple) else ""
    message = str(item.get("msg"))
    match item.get("type"):
        case "missing":
            return f"{_spelled(field)} is not given"
        case "extra_forbidden":
            return f"{field} is no setting"
        case "string_pattern_mismatch":
            return f"{_spelled(field)} {_NAME_RULE}"
        case "value_error":
            return f"{_spelled(field)}: {message.removeprefix('Value error, ')}"
        case _:
            return f"{_spelled(field)} {message.removeprefix('Input ')}"


def _spelled(field: str) -> str:
    """Give the option that sets a field, or its variable when there is no such option."""
    if field.partition(".")[0] in _SHORTER:
        return _SHORTER[field.partition(".")[0]]
    if field in _OPTIONS:
        return f"--{field.replace('_', '-')}"
    return f"FEDRA_EDGE_{field.upper()}"


def _folder_name(url: str) -> str:
    parts = urlsplit(url)
    readable = re.sub(r"[^A-Za-z0-9.-]", "-", parts.netloc)[:40]
    return f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
