"""A client gone wild, a process of its own: ``python -m tests.support.flooding URL SESSION N``.

It keeps N connections busy with requests of every kind, with and without its session, opens new
ones as fast as they are closed, and never waits as it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from urllib.parse import urlsplit

from fedra_edge.protocol import routes
from tests.support.headquarters import PROTOCOL
from tests.support.raw_http import head

_AHEAD = 4
_PAUSE_S = 0.01
ADDRESS = "127.0.0.2"
"""Where it comes from, so that it is another machine to the server than who is measured."""


def main(url: str, session: str, connections: str) -> None:
    """Flood until the process is ended."""
    asyncio.run(_flood(url, _requests(session), int(connections)))


def _requests(session: str) -> list[bytes]:
    own = {"Host": "x", "Authorization": f"Bearer {session}", **PROTOCOL}
    empty = own | {"Content-Type": "application/json", "Content-Length": "2"}
    nowhere = routes.UPLOAD_OFFSET.fill(upload_id="nowhere")
    return [
        head("GET", routes.CLIENT_STATUS.path, own),
        head("GET", f"{routes.ASSIGNMENT.path}?wait_s=0", own),
        head("GET", f"{routes.BLOBS.path}?sha256={'0' * 64}", own),
        head("HEAD", nowhere, own),
        head("POST", routes.UPLOAD_CREATE.path, empty) + b"{}",
        head("POST", routes.OFFLINE.path, own | {"Content-Length": "0"}),
        head("POST", routes.ENROL.path, empty) + b"{}",
        head("POST", routes.CHALLENGE.path, {"Host": "x", "Content-Length": "0", **PROTOCOL}),
        head("GET", routes.CLIENT_STATUS.path, own | {"Authorization": "Bearer wrong"}),
    ]


async def _flood(url: str, requests: list[bytes], connections: int) -> None:
    async with asyncio.TaskGroup() as group:
        for first in range(connections):
            group.create_task(_keep_asking(url, requests, first))


async def _keep_asking(url: str, requests: list[bytes], first: int) -> None:
    place = urlsplit(url)
    turns = itertools.count(first)
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(
                place.hostname, place.port, local_addr=(ADDRESS, 0)
            )
            with contextlib.closing(writer):
                while True:
                    for _ in range(_AHEAD):
                        writer.write(requests[next(turns) % len(requests)])
                    await writer.drain()
                    if not await reader.read(2**16):
                        break
        await asyncio.sleep(_PAUSE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
