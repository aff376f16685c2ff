"""What would surprise whoever uses a join string at a site, said where it is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from fedra_server.addressing import Listening, is_loopback, is_secured, listens_at, names_here
from fedra_server.authority import certificate_names
from fedra_server.config import ServerConfig, ServerHome

_HTTPS_ONLY: Final = (
    "The server speaks https only and this join string says http: no site can join with it, "
    "unless a proxy between them adds TLS."
)
_READABLE: Final = (
    "Everybody on the way can read and alter plain http: sites refuse it unless they give "
    "`fedra-edge join --insecure-http`."
)


def surprises(
    home: ServerHome, config: ServerConfig, address: str, *, is_chosen: bool
) -> Iterator[str]:
    """Give a line for each; ``is_chosen`` tells that somebody typed the address just now."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    listening = listens_at(home)
    is_secure = is_secured(config) if listening is None else listening.url.startswith("https:")
    if is_loopback(host):
        yield (
            "This join string works on this machine only; for others set address in server.toml, "
            "or give --address."
        )
    elif parts.scheme == "http":
        yield _HTTPS_ONLY if is_secure else _READABLE
    elif not is_secure and is_chosen:
        yield f"The server itself speaks plain http: a proxy must answer at {host} and add TLS."
    elif is_secure and config.certificate_file is None:
        is_by_default = not is_chosen and config.address is None and not config.host_names
        yield from _of_names(home, config, listening, host, is_by_default=is_by_default)


def _of_names(
    home: ServerHome,
    config: ServerConfig,
    listening: Listening | None,
    host: str,
    *,
    is_by_default: bool,
) -> Iterator[str]:
    """Say what the certificate lacks, that the server shows now or will show when it starts."""
    shown, coming = certificate_names(home), names_here(config)
    if host not in shown | coming:
        yield (
            f"The server's certificate does not name {host}: unless a reverse proxy answers "
            f"there, run `fedra-server init --host-name {host}` and start the server again."
        )
    elif host not in shown and listening is not None:
        yield f"The server's certificate names {host} once the server is started again."
    known = shown if listening is not None else coming
    others = sorted(it for it in known - {host} if not is_loopback(it))
    if is_by_default and others:
        yield (
            f"Sites must know {host} by this name. The certificate also names "
            f"{', '.join(others)}; `--address https://...` puts one of them into a join string."
        )
