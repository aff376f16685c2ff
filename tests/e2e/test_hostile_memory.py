"""The memory of a server under attack: what is refused leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedra_edge.protocol.problems import ProblemCode
from tests.support.headquarters import Delta, Site, connection, enrol, honest_delta
from tests.support.hostile_forms import FORMS
from tests.support.hostile_tensors import LIES
from tests.support.patience import staged
from tests.support.raw_http import ask
from tests.support.servers import running_server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="only there is every 127.* an own address"),
]

TIMES = 200
MOST_GROWTH_BYTES = 4 * 2**20
"""Less than what two hundred of the largest bodies here would take if they were kept."""
UNLIMITED = {
    "max_requests_per_s": "100000",
    "max_strange_requests_per_s": "100000",
    "log_level": "warning",
}


@dataclass(frozen=True)
class Victim:
    """A server process, and a member of it."""

    url: str
    process: psutil.Process
    member: Site

    def suffer(self, form: str, times: int) -> set[ProblemCode]:
        """Be sent so many requests of a form, from an address of their own; tell the codes."""
        code, write = FORMS[form]
        source = f"127.0.1.{sorted(FORMS).index(form) + 1}"
        data = write(self.member)
        return {ask(self.url, data, source).problem.code for _ in range(times)} - {code}


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    home = tmp_path_factory.mktemp("victim") / "server"
    with running_server(home, settings=UNLIMITED) as server, connection(server.url) as http:
        attacked = Victim(server.url, psutil.Process(server.process.pid), enrol(http, "member"))
        for form in FORMS:
            attacked.suffer(form, 10)  # whatever is loaded or cached at first
        yield attacked
        log = server.log.read_text("utf-8")
        assert "Traceback" not in log
        assert len(log) < 10_000


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow(victim: Victim, form: str) -> None:
    before = victim.process.memory_info().rss
    assert victim.suffer(form, TIMES) == set()
    assert victim.process.memory_info().rss - before < MOST_GROWTH_BYTES


def test_memory_does_not_grow_with_deltas_that_lie(tmp_path: Path) -> None:
    """Each participant of a large round sends another lie; the first half warms the server up."""
    with staged(tmp_path, TIMES) as stage:
        process = psutil.Process(stage.pid)
        occupied = []
        for number, (site, work) in enumerate(stage.crowd):
            code, tell = sorted(LIES.items())[number % len(LIES)][1]
            data = tell(honest_delta(stage.spec, work).data)
            answer = site.send(Delta.of(data, work.assignment_id))
            assert answer.json()["code"] == code
            occupied.append(process.memory_info().rss)
    assert occupied[-1] - occupied[TIMES // 2] < MOST_GROWTH_BYTES
