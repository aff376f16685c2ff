"""Where a server is reached, under which names, and whether its connections are secured."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import ConfigurationError

_THIS_MACHINE: Final = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_secured(config: ServerConfig) -> bool:
    """Tell whether connections are to be secured with TLS."""
    return config.tls == "on" or (config.tls == "auto" and not is_loopback(config.host))


def check_exposure(config: ServerConfig) -> None:
    """Make sure that nothing is open to a network by mistake.

    Raises:
        ConfigurationError: Enrolment is open and others reach the address, or one file of the
            operator's own certificate is not named.
    """
    if config.enrolment == "open" and not is_loopback(config.host):
        raise ConfigurationError(
            f"enrolment is open to everyone who reaches {config.host}",
            remedy='Set enrolment = "token" and give sites join strings '
            "('fedra-server token create').",
        )
    if (config.certificate_file is None) != (config.key_file is None):
        raise ConfigurationError(
            "a certificate of your own needs both files",
            remedy="Set certificate_file and key_file in server.toml, or neither.",
        )


def site_address(config: ServerConfig, port: int, machine_name: str) -> str:
    """Give the address that sites are told, unless the operator set one."""
    if config.address is not None:
        return config.address.rstrip("/")
    host = config.host
    if not is_loopback(host):
        named = config.host_names[:1] or ((machine_name,) if _is_any(host) else ())
        host = next(iter(named), host)
    return url_of(host, port, is_secure=is_secured(config))


def url_of(host: str, port: int, *, is_secure: bool) -> str:
    """Write a base URL."""
    scheme = "https" if is_secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def wanted_names(
    config: ServerConfig, machine_name: str, machine_addresses: tuple[str, ...]
) -> frozenset[str]:
    """Give every name and address that sites may reach the server by.

    Where it listens on all addresses these are the machine's own, whatever else was named: a site
    that joined by one of them must find it in every later certificate.
    """
    names = {*_THIS_MACHINE, *config.host_names}
    if config.address is not None:
        names.add(urlsplit(config.address).hostname or "")
    if not _is_any(config.host):
        names.add(config.host)
    else:
        names |= {machine_name, *machine_addresses}
    return frozenset(names - {""})


class Listening(NamedTuple):
    """Where a running server listens, and what it tells sites."""

    url: str
    address: str


def listens_at(home: ServerHome) -> Listening | None:
    """Read where the server of a home listens; None while none runs."""
    try:
        told = json.loads(home.server_file.read_text(encoding="utf-8"))
        return Listening(str(told["url"]), str(told["address"]))
    except (OSError, ValueError, KeyError):
        return None


def names_here(config: ServerConfig) -> frozenset[str]:
    """Give every name and address that sites may reach a server on this machine by."""
    return wanted_names(config, socket.gethostname(), _machine_addresses())


def _machine_addresses() -> tuple[str, ...]:
    """Give the addresses by which other machines may reach this one."""
    import psutil  # a few megabytes, for servers that listen everywhere

    with contextlib.suppress(OSError):
        return tuple(
            address.address
            for interface in psutil.net_if_addrs().values()
            for address in interface
            if address.family in {socket.AF_INET, socket.AF_INET6} and "%" not in address.address
        )
    return ()


def _is_any(host: str) -> bool:
    """Tell whether an address stands for all addresses of the machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == ""
