"""Blobs of a test's own that clients may download: the weights of a model that a run tunes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tests.support.headquarters import Headquarters, create_run

_NUMBERS = itertools.count(1)
_NOBODY_STARTS = 1000


def offer(hq: Headquarters, *bodies: bytes, run: str | None = None) -> Sequence[str]:
    """Keep some bodies, at most one for each layer; give their digests."""
    name = run or f"offer-{next(_NUMBERS)}"
    refs = [hq.services.blobs.put_bytes(body) for body in bodies]
    layers = list(hq.spec.layers)
    for index, ref in enumerate(refs):
        layers[index] = layers[index].model_copy(update={"weights": ref})
    spec = hq.spec.model_copy(update={"name": name, "layers": tuple(layers)})
    store, clock = hq.services.store, hq.services.clock
    store.add_model(spec, clock.now())
    create_run(store, hq.services.blobs, spec, name, min_participants=_NOBODY_STARTS)
    return [ref.sha256 for ref in refs]
