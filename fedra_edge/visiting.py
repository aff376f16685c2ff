"""A command's visit to the server: which one is meant, over which way, as whom."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from fedra_edge.api import ServerApi
from fedra_edge.config import EdgeConfig, load_config, load_site_config
from fedra_edge.enrolling import Enrolment
from fedra_edge.errors import (
    ClientRevokedError,
    ConfigurationError,
    FedraEdgeError,
    NotAuthenticatedError,
    NotEnrolledError,
    ServerUnreachableError,
)
from fedra_edge.home_lock import home_lock
from fedra_edge.identity import Identity, known_servers
from fedra_edge.membership import Membership
from fedra_edge.network_errors import remedy_of
from fedra_edge.retrying import FEW_TIMES, Retrier
from fedra_edge.transport import Transport, open_http_client


def known_server(home: Path | None) -> str | None:
    """Give the address of the only server that a home is a member of, if it is only one."""
    servers = known_servers(load_site_config({"home": home}).home)
    return servers[0] if len(servers) == 1 else None


def membership(
    server: str | None, home: Path | None, way: Mapping[str, object]
) -> tuple[EdgeConfig, Identity]:
    """Find the membership meant: on the server given, else on the only one there is.

    Raises:
        NotEnrolledError: There is none.
        ConfigurationError: There is more than one.
    """
    servers = known_servers(load_site_config({"home": home}).home)
    if server is None and len(servers) > 1:
        raise ConfigurationError(
            "this home is a member on several servers", remedy=f"give --server: {servers}"
        )
    if server is None and not servers:
        raise _not_enrolled(f"the home {home or 'of this user'}")
    config = load_config({"server": server or servers[0], "home": home, **way})
    identity = Membership.of(config).load()
    if identity is None:
        raise _not_enrolled(config.server)
    return config, identity


@contextmanager
def visiting(config: EdgeConfig) -> Iterator[tuple[ServerApi, Enrolment]]:
    """Talk to the server as the member that this home is there.

    Raises:
        FedraEdgeError: It is not there, or not who it should be.
    """
    with _connected(config) as (api, enrolment):
        enrolment.come_back()
        yield api, enrolment


@contextmanager
def visited(config: EdgeConfig) -> Iterator[ServerApi]:
    """Talk to the server as nobody, but make sure that it is the right one.

    Raises:
        FedraEdgeError: It is not there, or not who it should be.
    """
    with _connected(config) as (api, enrolment):
        if enrolment.come_back() is None and config.ca_sha256 is not None:
            enrolment.meet(config.ca_sha256)
        yield api


class Farewell(StrEnum):
    """What the server knows of a client that leaves, in words for who sees it leave."""

    TOLD = "the server was told"
    KNEW = "headquarters had ended the membership before, or does not know it"
    UNTOLD = "the server was not told; headquarters may remove this client"


def end_membership(config: EdgeConfig, *, must_be_told: bool) -> Farewell:
    """End the membership of this home and delete what is kept of it.

    Raises:
        ConfigurationError: The client runs.
        FedraEdgeError: The server cannot be told, and must be.
    """
    with home_lock(config.home):
        farewell = _tell_leaving(config, must_be_told=must_be_told)
        Membership.of(config).forget()
    return farewell


def forget_remains(
    server: str | None, home: Path | None, way: Mapping[str, object]
) -> dict[str, object]:
    """Delete what a home that is no member keeps of a server, such as a pin; tell of it."""
    if server is not None:
        config = load_config({"server": server, "home": home, **way})
        if config.membership.is_dir():
            with home_lock(config.home):
                Membership.of(config).forget()
    return {"left": None, "client_id": None, "told": False, "detail": "no client was enrolled here"}


def _tell_leaving(config: EdgeConfig, *, must_be_told: bool) -> Farewell:
    try:
        with visiting(config) as (api, _):
            api.leave()
    except (NotAuthenticatedError, ClientRevokedError):
        return Farewell.KNEW
    except FedraEdgeError:
        if must_be_told:
            raise
        return Farewell.UNTOLD
    return Farewell.TOLD


@contextmanager
def _connected(config: EdgeConfig) -> Iterator[tuple[ServerApi, Enrolment]]:
    transport = Transport(open_http_client(config.server, config.link), config.link)
    api = ServerApi(transport, Retrier(threading.Event()), FEW_TIMES)
    try:
        yield api, Enrolment(config, transport, api)
    except ServerUnreachableError as error:
        error.remedy = remedy_of(error)
        raise
    finally:
        transport.close()


def _not_enrolled(where: str) -> NotEnrolledError:
    return NotEnrolledError(
        f"no client is enrolled: {where}", remedy="run `fedra-edge join`, or check --home"
    )
