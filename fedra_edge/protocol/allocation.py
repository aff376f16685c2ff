"""The allocation matrix of a round: which participant trains which layers."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_edge.protocol.wire import WireModel


class AllocationMatrix(WireModel):
    """Participants x layers, stored as the ascending layer ids of each row."""

    num_layers: int
    rows: dict[ClientId, tuple[LayerId, ...]]

    @model_validator(mode="after")
    def _rows_are_ascending_layer_ids(self) -> Self:
        for client_id, row in self.rows.items():
            if list(row) != sorted(set(row)) or any(not 0 <= i < self.num_layers for i in row):
                raise ValueError(f"row of {client_id} is not a set of layer ids: {row}")
        return self

    def holders(self, layer_id: LayerId) -> tuple[ClientId, ...]:
        """Give the participants that train a layer."""
        return tuple(client for client, row in self.rows.items() if layer_id in row)

    def coverage(self) -> tuple[int, ...]:
        """Give, per layer, how many participants train it."""
        return tuple(len(self.holders(LayerId(i))) for i in range(self.num_layers))
