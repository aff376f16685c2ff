"""A server is reached over proxies and by TLS with a certificate authority of the plant's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedra_edge.api import ServerApi
from fedra_edge.cli import app
from fedra_edge.config import load_config
from fedra_edge.enrolling import Enrolment
from fedra_edge.errors import ConfigurationError, ServerUnreachableError
from fedra_edge.link import Link
from fedra_edge.metering import unwatched
from fedra_edge.protocol.models import BlobRef
from fedra_edge.retrying import ONCE, Retrier
from fedra_edge.sessions import GivenSession
from fedra_edge.transport import Transport, open_http_client
from tests.support.builders import make_profile
from tests.support.headquarters import Headquarters
from tests.support.offers import offer
from tests.support.tls_front import TlsFront, tls_front
from tests.support.web_proxy import web_proxy
from tests.support.wire_server import unused_port

DATA = bytes(range(256)) * 8192


@pytest.fixture(scope="module")
def front(hq: Headquarters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsFront]:
    port = int(hq.url.rpartition(":")[2])
    with tls_front(tmp_path_factory.mktemp("tls"), port) as front:
        yield front


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def health(url: str, link: Link = Link()) -> str:  # noqa: B008 (a frozen value)
    transport = Transport(open_http_client(url, link), link)
    try:
        return ServerApi(transport, Retrier(threading.Event()), ONCE).health().status
    finally:
        transport.close()


def test_a_server_behind_tls_needs_the_right_authority(front: TlsFront) -> None:
    assert health(front.url, Link(ca_file=str(front.ca_file))) == "ok"
    with pytest.raises(ServerUnreachableError) as failure:
        health(front.url)
    assert "--ca-file" in failure.value.remedy


def test_the_authority_may_come_from_the_environment(
    front: TlsFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(front.ca_file))
    assert health(front.url) == "ok"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"no certificate", "holds no certificate"), (b"", "no certificate")],
)
def test_an_authority_that_cannot_be_read_is_told(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=reason) as failure:
        open_http_client("https://127.0.0.1:1", Link(ca_file=str(file)))
    assert str(file) in str(failure.value)
    assert "--ca-file" in failure.value.remedy


def test_tls_goes_through_a_tunnel(front: TlsFront) -> None:
    with web_proxy() as proxy:
        assert health(front.url, Link(proxy=proxy.url, ca_file=str(front.ca_file))) == "ok"
        assert proxy.seen == [f"CONNECT {front.url.removeprefix('https://')} HTTP/1.1"]


def test_plain_requests_are_passed_on(hq: Headquarters) -> None:
    with web_proxy(account="plant:pass") as proxy:
        assert health(hq.url, Link(proxy=proxy.url)) == "ok"
        assert proxy.seen == [f"GET {hq.url}/health/ready HTTP/1.1"]


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_a_proxy_that_refuses_us_is_told(hq: Headquarters, front: TlsFront, kind: str) -> None:
    url = hq.url if kind == "plain" else front.url
    with web_proxy(account="plant:pass") as proxy:
        stranger = proxy.url.replace("plant:pass@", "")
        with pytest.raises(ServerUnreachableError, match="407") as failure:
            health(url, Link(proxy=stranger, ca_file=str(front.ca_file)))
    assert "--proxy" in failure.value.remedy


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_named_without_its_password(scheme: str) -> None:
    place = f"127.0.0.1:{unused_port()}"
    with pytest.raises(ServerUnreachableError) as failure:
        health(f"{scheme}://plant.example", Link(proxy=f"http://plant:secret@{place}"))
    assert f"the proxy {place} cannot be reached" in str(failure.value)
    assert "--proxy" in failure.value.remedy
    assert "secret" not in f"{failure.value}{failure.value.remedy}"


def test_a_server_that_is_not_there_is_not_blamed_on_the_proxy() -> None:
    with web_proxy() as proxy, pytest.raises(ServerUnreachableError) as failure:
        health(f"https://127.0.0.1:{unused_port()}", Link(proxy=proxy.url))
    place = proxy.url.removeprefix("http://")
    assert str(failure.value).startswith(f"the server, over the proxy {place}, cannot be reached")


def test_a_proxy_of_the_environment_is_used_but_for_exceptions(
    hq: Headquarters, monkeypatch: pytest.MonkeyPatch
) -> None:
    with web_proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert health(hq.url) == "ok"
        assert len(proxy.seen) == 1
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert health(hq.url) == "ok"
        assert len(proxy.seen) == 1


def test_a_blob_comes_whole_through_tunnel_and_tls(
    hq: Headquarters, front: TlsFront, tmp_path: Path
) -> None:
    [sha256] = offer(hq, DATA)
    ref = BlobRef(sha256=sha256, size_bytes=len(DATA))
    with hq.site("tunnelled") as site, web_proxy() as proxy:
        link = Link(proxy=proxy.url, ca_file=str(front.ca_file))
        transport = Transport(open_http_client(front.url, link), link)
        transport.authenticate(GivenSession(site.credential))
        api = ServerApi(transport, Retrier(threading.Event()), ONCE)
        assert api.download_blob(ref, tmp_path / "part", unwatched) == ref.sha256
        transport.close()
    assert (tmp_path / "part").read_bytes() == DATA


def test_every_command_that_asks_the_server_knows_the_way(
    front: TlsFront, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = str(tmp_path / "home")
    config = load_config(
        {"server": front.url, "home": home, "name": "plant", "ca_file": front.ca_file}
    )
    transport = Transport(open_http_client(front.url, config.link), config.link)
    api = ServerApi(transport, Retrier(threading.Event()), ONCE)
    Enrolment(config, transport, api).enrol(make_profile())
    transport.close()
    with web_proxy() as proxy:
        way = ["--home", home, "--proxy", proxy.url, "--ca-file", str(front.ca_file)]
        for command in (["profile", "--server", front.url], ["status"], ["rotate-key"], ["leave"]):
            app([*command, *way, "--json"], standalone_mode=False)
            assert "plant" in capsys.readouterr().out or command != ["status"]
        assert len(proxy.seen) == 4
