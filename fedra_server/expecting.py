"""How much space the next delta may need, by what the active runs define."""

from __future__ import annotations

from typing import Final

from fedra_edge.protocol.ids import LayerId
from fedra_server.admission import largest_delta_bytes
from fedra_server.runs import RunState
from fedra_server.storage.records import RunRecord
from fedra_server.storage.store import Store

_ACTIVE: Final = frozenset({RunState.RUNNING, RunState.PAUSED})


def largest_expected_bytes(store: Store) -> int:
    """Bound the largest delta that an active run may bring; one byte when there is none."""
    return max((_largest_bytes(store, it) for it in store.runs() if it.state in _ACTIVE), default=1)


def _largest_bytes(store: Store, run: RunRecord) -> int:
    model = store.model(run.model_id).spec
    layers = tuple(LayerId(it) for it in range(model.num_layers)[: run.spec.max_layers])
    return largest_delta_bytes(model.delta_shapes(run.spec.adapter, layers))
