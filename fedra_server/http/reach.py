"""What a client may read: models, weights and adapters of the runs that it may take part in.

Who is bound to a run reads of that run only. What its work names is among this; of revisions, the
latest two and the base of its open assignment. Anything else is refused alike, there or not.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from fedra_edge.protocol.ids import RevisionNumber
from fedra_edge.protocol.models import BlobRef, ModelSpec, PieceGraphs, TokenInput
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.slices import RevisionManifest
from fedra_server.errors import RefusedError
from fedra_server.http.pacing import Allowances
from fedra_server.runs import RunState
from fedra_server.storage.records import ClientRecord, RunRecord
from fedra_server.storage.store import Store

_SLACK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Offer:
    """What a run lets its clients read, as of one of its revisions."""

    model_id: str
    revision: int
    digests: frozenset[str]
    size_bytes: int


class Reach:
    """Knows by heart what runs offer, and looks again when somebody asks for what it lacks.

    Downloads are counted per client until a new revision comes: ``factor`` times what the
    client's runs offer may be sent to it, and somewhat more.
    """

    def __init__(self, store: Store, factor: float) -> None:
        self._store = store
        self._factor = factor
        self._lock = threading.Lock()
        self._offers: dict[str, Offer] = {}
        self._sent: Allowances[str] = Allowances()

    def require_model(self, client: ClientRecord, model_id: str) -> None:
        """Refuse a model of which the client's runs have no need.

        Raises:
            RefusedError: There is no such model, or it is none of this client's.
        """
        if all(offer.model_id != model_id for offer in self._known(client)):
            self._look_again(client)
            if all(offer.model_id != model_id for offer in self._known(client)):
                raise _not_assigned(f"no work of this client is about model {model_id}")

    def require_blobs(self, client: ClientRecord, digests: Collection[str]) -> None:
        """Refuse blobs that no work of the client names.

        Raises:
            RefusedError: One of them is none of this client's, or it has had too many bytes.
        """
        if self._missing(client, digests):
            self._look_again(client)
            if missing := self._missing(client, digests) - self._base_of(client):
                raise _not_assigned(f"no work of this client names blob {min(missing)}")

    def wait_s(self, client: ClientRecord, now: float) -> float:
        """Tell how long a client must wait before more is sent to it; 0 when it need not."""
        return self._sent.wait_s(client.client_id, *self._limit(client), now)

    def counted(self, client: ClientRecord, chunks: Iterable[bytes], now: float) -> Iterator[bytes]:
        """Count what is really sent to a client."""
        stage, limit_bytes = self._limit(client)
        for chunk in chunks:
            self._sent.spend(client.client_id, stage, len(chunk), limit_bytes, now)
            yield chunk

    def _limit(self, client: ClientRecord) -> tuple[tuple[int, ...], int]:
        """Give the state of the client's runs, and how many bytes it may have in that."""
        offers = self._known(client)
        offered_bytes = sum(offer.size_bytes for offer in offers)
        stage = tuple(offer.revision for offer in offers)
        return stage, int(self._factor * offered_bytes) + _SLACK_BYTES

    def _known(self, client: ClientRecord) -> list[Offer]:
        offers = self._offers
        if client.run is not None:
            return [offers[client.run]] if client.run in offers else []
        return list(offers.values())

    def _missing(self, client: ClientRecord, digests: Collection[str]) -> set[str]:
        missing = set(digests)
        for offer in self._known(client):
            missing -= offer.digests
        return missing

    def _look_again(self, client: ClientRecord) -> None:
        """Learn what the client's runs offer now."""
        with self._store.reading():
            runs = [run for run in self._store.runs() if client.run in {None, run.run}]
            offers = {
                run.run: self._offer(run) for run in runs if run.state is not RunState.CREATED
            }
        with self._lock:
            self._offers = self._offers | offers

    def _offer(self, run: RunRecord) -> Offer:
        known = self._offers.get(run.run)
        latest = self._store.revision(run.run).manifest
        if known is not None and known.revision == latest.number:
            return known
        spec = self._store.model(run.model_id).spec
        before = RevisionNumber(max(0, latest.number - 1))
        now = [*_blobs_of_model(spec, run.spec.graphs), *_blobs_of(latest)]
        blobs = [*now, *_blobs_of(self._store.revision(run.run, before).manifest)]
        size_bytes = sum({blob.sha256: blob.size_bytes for blob in now}.values())
        digests = frozenset(blob.sha256 for blob in blobs)
        return Offer(run.model_id, latest.number, digests, size_bytes)

    def _base_of(self, client: ClientRecord) -> set[str]:
        """Name the adapters that a client's work begins with, however old they are by now."""
        assignment = self._store.open_assignment(client.client_id)
        if assignment is None:
            return set()
        return {blob.sha256 for blob in _blobs_of(assignment.manifest.revision)}


def _blobs_of_model(spec: ModelSpec, graphs: PieceGraphs | None) -> Iterator[BlobRef]:
    for piece in (spec.stem, *spec.layers, spec.head):
        yield piece.weights
    for some in (spec.graphs, graphs):
        if some is not None:
            yield from some.by_name.values()
    if isinstance(spec.input, TokenInput):
        yield spec.input.tokenizer


def _blobs_of(revision: RevisionManifest) -> tuple[BlobRef, ...]:
    return (*revision.layers, revision.head)


def _not_assigned(detail: str) -> RefusedError:
    return RefusedError(ProblemCode.NOT_ASSIGNED, detail)
