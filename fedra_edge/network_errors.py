"""Turns what the HTTP library raises into our own errors, and names a proxy that is the cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import httpx

from fedra_edge.errors import (
    ConfigurationError,
    ServerUnreachableError,
    UnexpectedAnswerError,
    UnknownAuthorityError,
    UntrustedServerError,
)

CHECK_PROXY: Final = "check --proxy and its account, or HTTPS_PROXY and NO_PROXY"
_PLAIN_HTTP_SIGNS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
"""What OpenSSL says, by its version, of an answer that is no TLS."""

_PORTS: Final = {"http": 80, "https": 443}
_UNVERIFIED: Final = "CERTIFICATE_VERIFY_FAILED"
_UNKNOWN_AUTHORITY: Final = (
    "join with the join string that headquarters gives out, or give the certificate authority of "
    "your plant or proxy as --ca-file"
)
_OTHER_THAN_PINNED: Final = (
    "something on the way may pose as the server: if that is a proxy of your plant that inspects "
    "TLS, give its certificate authority as --ca-file; if headquarters set its server up anew, run "
    "`fedra-edge leave --forget` and join with a new join string"
)
_OF_ANOTHER_NAME: Final = (
    "use the address that headquarters gave out; or headquarters names this one, too, as one of "
    "`host_names` in its server.toml"
)
_OF_ANOTHER_TIME: Final = (
    "check the clock of this machine; if it is right, the server's certificate has to be renewed, "
    "which a server does by itself when it runs and no certificate of its operator's is used"
)


class Way:
    """Where a request's connection was opened to, if one was: the server, or a proxy on the way."""

    def __init__(self, *, is_pinned: bool = False) -> None:
        self.proxy = ""
        self.is_open = True
        self.is_pinned = is_pinned

    def note(self, event: str, info: Mapping[str, Any], url: httpx.URL) -> None:
        """Take note of what the HTTP library tells of a connection."""
        if event.endswith("connect_tcp.started"):
            own = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]
            is_direct = (info["host"], info["port"]) == own
            self.proxy = "" if is_direct else f"{info['host']}:{info['port']}"
            self.is_open = False
        elif event.endswith("connect_tcp.complete"):
            self.is_open = True

    @property
    def goal(self) -> str:
        """Who is to blame when there is no answer."""
        if self.proxy and not self.is_open:
            return f"the proxy {self.proxy}"
        return f"the server, over the proxy {self.proxy}," if self.proxy else "the server"


@contextmanager
def mapped_errors(way: Way) -> Iterator[None]:
    """Raise our own errors; only the block knows whether it ends well.

    Raises:
        ConfigurationError: The request can never be sent.
        ServerUnreachableError: There is no answer.
        UntrustedServerError: There is nobody there whom we trust.
        UnexpectedAnswerError: There is one that cannot be read.
    """
    try:
        yield
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
        raise ConfigurationError(f"the request cannot be sent: {error}") from error
    except httpx.TimeoutException as error:
        raise ServerUnreachableError(
            f"{way.goal} does not answer in time",
            remedy=CHECK_PROXY if way.proxy else "check the network and the address",
        ) from error
    except httpx.DecodingError as error:
        raise UnexpectedAnswerError(f"the answer cannot be decoded: {error}") from error
    except httpx.RequestError as error:
        reason = str(error) or type(error).__name__
        if _UNVERIFIED in reason:
            raise _distrust(reason, way) from error
        raise ServerUnreachableError(
            f"{way.goal} cannot be reached: {reason}", remedy=_remedy_of(error, way)
        ) from error


def _distrust(reason: str, way: Way) -> UntrustedServerError:
    """Tell what to do, by what OpenSSL says of the certificate."""
    message = f"{way.goal} cannot be trusted: {reason}"
    if "mismatch" in reason:
        return UntrustedServerError(message, remedy=_OF_ANOTHER_NAME)
    if "not yet valid" in reason or "has expired" in reason:
        return UntrustedServerError(message, remedy=_OF_ANOTHER_TIME)
    if way.is_pinned:
        return UntrustedServerError(message, remedy=_OTHER_THAN_PINNED)
    return UnknownAuthorityError(message, remedy=_UNKNOWN_AUTHORITY)


def _remedy_of(error: httpx.RequestError, way: Way) -> str:
    if isinstance(error, httpx.ProxyError):
        return CHECK_PROXY
    if way.proxy and not way.is_open:
        return "check that the proxy runs, and --proxy, or HTTPS_PROXY and NO_PROXY"
    return "check that the server runs and that --server is its address"


def remedy_of(error: ServerUnreachableError) -> str:
    """Tell what to do, also when an https address leads to a server of plain http."""
    if any(sign in str(error) for sign in _PLAIN_HTTP_SIGNS):
        return "the server seems to speak plain http; try http:// instead of https://"
    return error.remedy
