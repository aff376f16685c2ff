"""Takes deltas that are due through screening: records and files in, what becomes of each out."""

from __future__ import annotations

from collections.abc import Sequence

from fedra_server.measuring import measure
from fedra_server.rounds import WaitingDelta
from fedra_server.sifting import Occasion, Sifted, fresh_pieces, screens, sift
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.delta_files import DeltaFiles
from fedra_server.storage.durability import disk_errors
from fedra_server.storage.records import RevisionRecord, RunRecord
from fedra_server.storage.screenings import Screening
from fedra_server.storage.store import Store


def judge_deltas(  # noqa: PLR0913 - where things are, and what is asked of them
    store: Store,
    blobs: BlobStore,
    deltas: DeltaFiles,
    run: RunRecord,
    base: RevisionRecord,
    *,
    taken: Sequence[WaitingDelta],
    due: frozenset[str],
    now: float,
    is_last: bool,
) -> Sifted:
    """Measure what nobody measured before, judge it and divide the due pieces; writes nothing."""
    known = store.screenings_of_admitted(run.run)
    clients = {delta.assignment_id: delta.client_id for delta in taken}
    fresh = fresh_pieces(run.spec, taken, due, known) if screens(run.spec) else {}
    holdings = {it: (clients[it], pieces) for it, pieces in fresh.items()}
    with disk_errors("measuring deltas"):
        measures = measure(base, holdings, deltas.path, blobs)
    occasion = Occasion(
        run=run.run,
        revision=base.manifest.number + 1,
        judgement=store.next_judgement(run.run),
        now=now,
        waits=run.spec.mode == "buffered" and not is_last,
    )
    own = {key: row for key, row in known.items() if key[0] in clients}
    return sift(run.spec, taken, due, known=own, measures=measures, occasion=occasion)


def screening_of(sifted: Sifted) -> Screening:
    """Give what is to be recorded of a judgement."""
    return Screening(sifted.records, sifted.quarantined, sifted.discarded)
