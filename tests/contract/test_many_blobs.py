"""Many small blobs in one answer, byte for byte and in the order asked; all of them or none."""

from __future__ import annotations

import httpx
import pytest

from fedra_edge.protocol import routes
from tests.support.headquarters import Headquarters, Site
from tests.support.offers import offer

SMALL = [bytes([letter]) * size for letter, size in ((65, 1), (66, 170_000), (67, 5))]
LARGE = bytes(range(256)) * 8192


@pytest.fixture(scope="module")
def digests(hq: Headquarters) -> list[str]:
    """The names of some blobs, more than a megabyte together."""
    return list(offer(hq, *SMALL, LARGE))


def ask(site: Site, wanted: str) -> httpx.Response:
    return site.call(routes.BLOBS, params={"sha256": wanted})


def test_blobs_come_in_the_order_asked(site: Site, digests: list[str]) -> None:
    answer = ask(site, ",".join(digests[:3]))
    assert (answer.status_code, answer.content) == (200, b"".join(SMALL))
    assert answer.headers["Content-Length"] == str(len(answer.content))
    answer = ask(site, ",".join(reversed(digests)))
    assert answer.content == b"".join([LARGE, *reversed(SMALL)])
    assert answer.headers["Content-Length"] == str(len(answer.content))


def test_one_that_is_missing_refuses_all(site: Site, digests: list[str]) -> None:
    answer = ask(site, f"{digests[0]},{'0' * 64}")
    assert (answer.status_code, answer.json()["code"]) == (403, "not-assigned")


def test_one_that_is_lost_refuses_all(hq: Headquarters, site: Site, digests: list[str]) -> None:
    [lost] = offer(hq, b"lost")
    hq.services.blobs.path(lost).unlink()
    answer = ask(site, f"{digests[0]},{lost}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


@pytest.mark.parametrize(
    "wanted", ["", ",", "../../fedra.sqlite3", "A" * 64, ",".join(["0" * 64] * 257)]
)
def test_a_list_of_no_digests_is_malformed(site: Site, wanted: str) -> None:
    answer = ask(site, wanted)
    assert (answer.status_code, answer.json()["code"]) == (422, "malformed-request")


def test_nobody_else_is_told(hq: Headquarters, digests: list[str]) -> None:
    answer = httpx.get(f"{hq.url}{routes.BLOBS.path}", params={"sha256": digests[0]})
    assert answer.status_code in {401, 426}
