"""Requests in forms that no client of ours sends, and the code that each must be answered by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from fedra_edge.protocol.problems import ProblemCode
from fedra_server.http.plainness import MAX_HEAD_BYTES
from tests.support.headquarters import PROTOCOL, Site
from tests.support.raw_http import head

LIVE, ME, EVALUATE = "/health/live", "/v1/clients/me", "/v1/evaluations"
HOST = {"Host": "x"}
JSON = {"Content-Type": "application/json"}
CHUNKED = {"Transfer-Encoding": "chunked"}


def post(site: Site, body: bytes, **headers: str) -> bytes:
    """Write a request with a body, as an enrolled client."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    own = {"Authorization": f"Bearer {site.credential}", "Content-Length": str(len(body))}
    return head("POST", EVALUATE, HOST | PROTOCOL | own | JSON | told) + body


def get(target: str, headers: Mapping[str, str] = HOST) -> bytes:
    return head("GET", target, headers)


Writer = Callable[[Site], bytes]

FORMS: Final[dict[str, tuple[ProblemCode, Writer]]] = {
    "no HTTP at all": (ProblemCode.HTTP_MALFORMED, lambda _: b"\x16\x03\x01 hello\r\n\r\n"),
    "a NUL in the request line": (ProblemCode.HTTP_MALFORMED, lambda _: get("/health\0/live")),
    "a NUL in a header": (ProblemCode.HTTP_MALFORMED, lambda _: get(LIVE, HOST | {"A": "b\0c"})),
    "a folded line": (ProblemCode.HTTP_MALFORMED, lambda _: get(LIVE, HOST | {"A ": "b"})),
    "no host": (ProblemCode.HTTP_MALFORMED, lambda _: get(LIVE, {})),
    "two hosts": (ProblemCode.HTTP_MALFORMED, lambda _: get(LIVE, {"Host": "a", "host": "b"})),
    "two credentials": (
        ProblemCode.HTTP_MALFORMED,
        lambda site: get(ME, HOST | {"authorization": "x", "Authorization": site.credential}),
    ),
    "a length beyond all numbers": (
        ProblemCode.HTTP_MALFORMED,
        lambda site: post(site, b"", Content_Length="9" * 5000),
    ),
    "a negative length": (
        ProblemCode.HTTP_MALFORMED, lambda site: post(site, b"", Content_Length="-1")
    ),
    "a coding that is not chunked": (
        ProblemCode.HTTP_MALFORMED, lambda _: get(LIVE, HOST | {"Transfer-Encoding": "gzip"})
    ),
    "a chunk without a size": (
        ProblemCode.HTTP_MALFORMED,
        lambda _: head("POST", EVALUATE, HOST | JSON | CHUNKED) + b"zz\r\n{}\r\n0\r\n\r\n",
    ),
    "a host with a path": (ProblemCode.HOST_MALFORMED, lambda _: get(LIVE, {"Host": "x/../y"})),
    "a host with a name": (ProblemCode.HOST_MALFORMED, lambda _: get(LIVE, {"Host": "me@evil"})),
    "length and chunks": (
        ProblemCode.LENGTH_AMBIGUOUS,
        lambda site: post(site, b"0\r\n\r\n", Transfer_Encoding="chunked"),
    ),
    "a long request line": (ProblemCode.HEAD_TOO_LARGE, lambda _: get(f"/{'a' * MAX_HEAD_BYTES}")),
    "an endless request line": (ProblemCode.HEAD_TOO_LARGE, lambda _: b"GET /" + b"a" * 2**20),
    "a large header": (
        ProblemCode.HEAD_TOO_LARGE, lambda _: get(LIVE, HOST | {"A": "b" * MAX_HEAD_BYTES})
    ),
    "many headers": (
        ProblemCode.HEAD_TOO_LARGE, lambda _: get(LIVE, HOST | {f"A{n}": "b" for n in range(70)})
    ),
    "another server": (ProblemCode.PATH_MALFORMED, lambda _: get("http://evil/v1/clients/me")),
    "encoded slashes": (ProblemCode.PATH_MALFORMED, lambda _: get("/v1%2fclients%2fme")),
    "dots": (ProblemCode.PATH_MALFORMED, lambda _: get("/v1/blobs/../../fedra.sqlite3")),
    "encoded dots": (ProblemCode.PATH_MALFORMED, lambda _: get("/v1/blobs/%2e%2e/server.toml")),
    "an encoded NUL": (ProblemCode.PATH_MALFORMED, lambda _: get("/v1/blobs/%00")),
    "an absolute path inside": (ProblemCode.PATH_MALFORMED, lambda _: get("/v1/blobs//etc/passwd")),
    "a backslash": (ProblemCode.PATH_MALFORMED, lambda _: get("/v1/blobs/..\\server.toml")),
    "everything": (ProblemCode.PATH_MALFORMED, lambda _: head("OPTIONS", "*", HOST)),
    "an expectation": (
        ProblemCode.EXPECTATION_FAILED, lambda site: post(site, b"{}", Expect="the moon")
    ),
    "a compressed body": (
        ProblemCode.ENCODING_UNSUPPORTED,
        lambda site: post(site, b"\x1f\x8b", Content_Encoding="gzip"),
    ),
    "a form": (
        ProblemCode.CONTENT_TYPE_UNSUPPORTED,
        lambda site: post(site, b"a=b", Content_Type="application/x-www-form-urlencoded"),
    ),
    "a repeated name": (
        ProblemCode.REPEATED_NAME, lambda site: post(site, b'{"run": "a", "run": "b"}')
    ),
    "a repeated name deep inside": (
        ProblemCode.REPEATED_NAME, lambda site: post(site, b'{"a": [{"b": {"c": 1, "c": 1}}]}')
    ),
    "no number": (ProblemCode.MALFORMED_REQUEST, lambda site: post(site, b'{"loss_sum": NaN}')),
    "no number either": (
        ProblemCode.MALFORMED_REQUEST, lambda site: post(site, b'{"loss_sum": -Infinity}')
    ),
    "an infinity written out": (
        ProblemCode.MALFORMED_REQUEST, lambda site: post(site, b'{"loss_sum": 1e999}')
    ),
    "depth": (ProblemCode.MALFORMED_REQUEST, lambda site: post(site, b"[" * 90_000)),
    "other letters": (
        ProblemCode.MALFORMED_REQUEST, lambda site: post(site, '{"run": "a"}'.encode("utf-16"))
    ),
}  # fmt: skip
