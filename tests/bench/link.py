"""A round over bad links: 256 kbit/s, 200 ms each way, resets, and a minute of darkness.

Two sites, each behind a link of its own, download a model, train and deliver; one link goes dark
while it downloads, the other while it delivers. Bytes are counted on the links, lost ones too, and
compared with those of the same round over perfect links, so that all else that a bad link costs,
questions asked again above all, counts as sent again.
``python -m tests.bench.link [--json]``
"""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rows import Row, print_rows
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import MODEL, Federation, running_federation
from tests.support.link_proxy import LinkProxy, Quality, bad_link
from tests.support.servers import run_server_command
from tests.support.sites import write_folder
from tests.support.tiny_vit import build_vit

_BAD = Quality(bits_per_s=256_000, latency_s=0.2, reset_every=20)
_DARK_S = 60.0
_PATIENCE_S = 1200.0
_MEGABYTE = 10**6
_MOST = 1.02
_SETTINGS = {"heartbeat_s": "30"}
_PHASES = {"north": "downloading", "south": "sending"}


@dataclass(frozen=True)
class Measured:
    """What a round over two links took."""

    bytes_down: int
    bytes_up: int
    round_s: float
    resets: int
    recovered_s: tuple[float, ...] = ()


def main() -> None:
    """Play one round over perfect links, one over bad ones."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        prepared = _prepare(place)
        perfect = _play(place / "perfect", prepared, Quality())
        bad = _play(place / "bad", prepared, _BAD, dark_s=_DARK_S)
    print_rows("link", _rows(perfect, bad), ["httpx", "uvicorn", "h11"])


def _rows(perfect: Measured, bad: Measured) -> list[Row]:
    down, up = bad.bytes_down / perfect.bytes_down, bad.bytes_up / perfect.bytes_up
    goal = f"<= {_MOST:.2f} x"
    return [
        Row("down, two sites, bad links", bad.bytes_down / _MEGABYTE, "MB", "perfect ones", down,
            goal, down <= _MOST),
        Row("up, two sites, bad links", bad.bytes_up / _MEGABYTE, "MB", "perfect ones", up,
            goal, up <= _MOST),
        Row("the round, of which 60 s of darkness", bad.round_s, "s"),
        Row("connections that were reset", bad.resets, ""),
        Row("after darkness in a download, bytes again", bad.recovered_s[0], "s"),
        Row("after darkness in a delivery, bytes again", bad.recovered_s[1], "s"),
    ]  # fmt: skip


def _prepare(place: Path) -> Path:
    """Register a model of a few megabytes, adapters included."""
    home, saved = place / "home", place / "saved"
    build_vit(hidden_size=256).save_pretrained(saved)
    given = ("--weights-dtype", "bfloat16", "--home", str(home))
    run_server_command("init", "--home", str(home))
    run_server_command("model", "add", MODEL, str(saved), *given)
    return home


def _play(place: Path, prepared: Path, quality: Quality, dark_s: float = 0.0) -> Measured:
    place.mkdir()
    with ExitStack() as stack:
        federation = stack.enter_context(running_federation(place / "server", prepared))
        port = int(federation.url.rpartition(":")[2])
        links = {name: stack.enter_context(bad_link(port, quality)) for name in _PHASES}
        sites = {name: _site(federation, name, place, links[name].url) for name in _PHASES}
        federation.have_running(list(sites.values()))
        started_at = time.monotonic()
        federation.start_run(
            "far",
            rounds=1,
            min_participants=2,
            deadline_s=3600,
            rank=128,
            batch_size=6,
            max_steps=2,
        )
        with ThreadPoolExecutor() as pool:
            darkening = [
                pool.submit(_darken, sites[name], links[name], phase, dark_s)
                for name, phase in _PHASES.items()
                if dark_s
            ]
        recovered = [task.result() for task in darkening]
        what = "a published round"
        wait_until(what, lambda: federation.report("far").rounds_published == 1, _PATIENCE_S)
        carried = [link.carried for link in links.values()]
        federation.check_merge("far", 1)
        return Measured(
            bytes_down=sum(it.bytes_down for it in carried),
            bytes_up=sum(it.bytes_up for it in carried),
            round_s=time.monotonic() - started_at,
            resets=sum(it.resets for it in carried),
            recovered_s=tuple(recovered),
        )


def _site(federation: Federation, name: str, place: Path, url: str) -> EdgeSite:
    """Set up a machine without held-out data, so that it asks for no evaluation's bytes."""
    data = write_folder(place / "data" / name, seed=1).path
    for held_out in data.glob("test/*/*"):
        held_out.unlink()
    site = federation.add_site(name, data, place)
    site.url, site.settings = url, _SETTINGS
    return site


def _darken(site: EdgeSite, link: LinkProxy, phase: str, dark_s: float) -> float:
    """Let a link go dark amid a transfer; tell how long after it bytes flow again."""
    wait_until(
        f"{site.name} amid {phase}",
        lambda: any(
            event["phase"] == phase and event["transfer_bytes_done"] > 0
            for event in list(site.client.events)
        ),
        _PATIENCE_S,
    )
    link.darken()
    threading.Event().wait(dark_s)
    before = link.carried.bytes_down + link.carried.bytes_up
    link.lighten()
    lightened_at = time.monotonic()
    wait_until(
        "bytes again", lambda: link.carried.bytes_down + link.carried.bytes_up > before + 20_000
    )
    return time.monotonic() - lightened_at


if __name__ == "__main__":
    main()
