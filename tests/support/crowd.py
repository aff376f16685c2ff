"""Many participants of one round, put into a server's records at once, and what they upload."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace

import httpx

from fedra_edge.protocol import routes
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.clock import SystemClock
from fedra_server.runs import RunSpec
from fedra_server.storage.store import Store
from tests.support.builders import make_assignment, make_client, make_round
from tests.support.headquarters import PROTOCOL, Site, honest_delta
from tests.support.keys import SiteKey, open_session

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Participant:
    """One of them: its key, and its work, which is a slice of all layers."""

    client_id: str
    key: SiteKey
    work: SliceManifest

    def site(self, http: httpx.Client) -> Site:
        """Sign in, and speak over a connection that others use too."""
        http.headers.update(PROTOCOL)
        session = open_session(http, self.key, self.client_id)
        http.headers["Authorization"] = f"Bearer {session}"
        return Site(self.client_id, session, http)


def open_crowded_round(
    store: Store, spec: ModelSpec, run: str, run_spec: RunSpec, size: int
) -> list[Participant]:
    """Enrol so many clients and open the first round of a run for all of them."""
    now = SystemClock().now()
    base = store.revision(run).manifest
    layers = [{"layer_id": layer_id, "role": "train"} for layer_id in spec.layer_ids]
    assignments, crowd = [], []
    for number in range(size):
        key = SiteKey()
        client = make_client(f"client-{number}")
        client = replace(client, run=run, enrolled_at=now, last_seen_at=now)
        store.add_client(client, key.public)
        assignment = make_assignment(
            f"assignment-{number}", client.client_id, run=run, model_id=spec.model_id,
            revision=base, adapter=run_spec.adapter, layers=layers,
        )  # fmt: skip
        assignments.append(replace(assignment, issued_at=now))
        crowd.append(Participant(client.client_id, key, assignment.manifest))
    opened = replace(make_round(1, run), opened_at=now, deadline_at=now + run_spec.deadline_s)
    store.open_round(opened, assignments)
    return crowd


class StallingUpload:
    """An upload that stops half-way, for as long as its owner likes; it holds one socket."""

    def __init__(self, http: httpx.Client, spec: ModelSpec, participant: Participant) -> None:
        self._http = http
        self._participant = participant
        self._delta = honest_delta(spec, participant.work)
        self._half = len(self._delta.data) // 2
        site = participant.site(http)
        upload_id = site.announce(self._delta).upload_id
        place = http.base_url
        self._socket = socket.create_connection((place.host, place.port or 80), _TIMEOUT_S)
        headers = {
            **PROTOCOL,
            "Authorization": f"Bearer {site.credential}",
            "Host": place.host,
            "Connection": "close",
            "Content-Length": str(len(self._delta.data)),
            routes.UPLOAD_OFFSET_HEADER: "0",
            routes.UPLOAD_COMPLETE_HEADER: "?1",
        }
        path = routes.UPLOAD_APPEND.fill(upload_id=upload_id)
        head = f"{routes.UPLOAD_APPEND.method} {path} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._socket.sendall(f"{head}\r\n".encode() + self._delta.data[: self._half])

    def finish(self) -> None:
        """Send the rest, anew from where it stands if the server has stopped waiting."""
        if not self._has_sent_rest():
            site = self._participant.site(self._http)
            upload = site.announce(self._delta)
            rest = self._delta.data[upload.offset_bytes :]
            answer = site.append(upload.upload_id, rest, offset=upload.offset_bytes)
            assert answer.status_code == 200, answer.text

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def _has_sent_rest(self) -> bool:
        try:
            self._socket.sendall(self._delta.data[self._half :])
            with self._socket.makefile("rb") as answer:
                return answer.readline().startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False
