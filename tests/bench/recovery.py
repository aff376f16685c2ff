"""Time until a server that was killed in the middle of a round answers, and the round goes on.

The server dies at the worst places: with a delta moved and not recorded, with a revision written
and not committed. ``python -m tests.bench.recovery [--json]``
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import httpx

from fedra_edge.protocol import routes
from tests.bench.rows import Row, print_rows
from tests.support.edges import wait_until
from tests.support.federation import (
    MODEL,
    NO_FRAMEWORK,
    Federation,
    prepare_home,
    running_federation,
)
from tests.support.headquarters import create_run
from tests.support.servers import serve_until_killed
from tests.support.sites import write_folder

_GOAL_S = 5.0
_TIMES = 3
_PLACES = ("admission.moved", "publish.written")


def main() -> None:
    """Kill a server at each place, several times, and start it again."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        with running_federation(place / "server", prepare_home(place)) as federation:
            for seed, name in enumerate(("north", "south")):
                data = write_folder(place / "data" / name, seed)
                federation.add_site(name, data.path, place, "--backend", "onnx")
            federation.have_running(list(federation.sites.values()))
            _work(federation, "warm-up")
            federation.wait_for_rounds("warm-up", 1)
            rows = [_row(federation, fault_point) for fault_point in _PLACES]
    print_rows("recovery", rows, ["fastapi", "uvicorn", "sqlalchemy"])


def _row(federation: Federation, fault_point: str) -> Row:
    seconds = [
        _seconds_to_answer(federation, f"{fault_point}-{number}", fault_point)
        for number in range(_TIMES)
    ]
    median_s = statistics.median(seconds)
    what = f"killed at {fault_point}: until it answers again"
    return Row(what, median_s, "s", goal=f"< {_GOAL_S:.0f} s", holds=median_s < _GOAL_S)


def _seconds_to_answer(federation: Federation, run: str, fault_point: str) -> float:
    federation.kill_server()
    _work(federation, run)
    port = int(federation.url.rpartition(":")[2])
    serve_until_killed(federation.home.path, fault_point, port=port, without=NO_FRAMEWORK)
    started = time.monotonic()
    federation.start_server_again()
    wait_until("an answer", lambda: _is_ready(federation.url))
    seconds = time.monotonic() - started
    federation.wait_for_rounds(run, 1)
    federation.check_merge(run, 1)
    return seconds


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}{routes.READY.path}").status_code == 200
    except httpx.TransportError:
        return False


def _work(federation: Federation, run: str) -> None:
    model = federation.store.model_by_name(MODEL).spec
    create_run(
        federation.store,
        federation.blobs,
        model,
        run,
        adapter={"rank": 2, "alpha": 4.0, "targets": model.default_targets},
        training={"batch_size": 6, "max_steps": 2},
        graphs=model.graphs,
        rounds=1,
        merge_weighting="uniform",
    )


if __name__ == "__main__":
    main()
