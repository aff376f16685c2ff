"""How much each caller may still ask for: token buckets, counts and sums in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

MOST_KEPT: Final = 10_000
"""Callers that are remembered at once; who has asked for nothing the longest is forgotten."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """A mapping that keeps the entries used last, and no more than ``most`` of them."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """Give an entry, which is the one used last from now on."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Key, value: Value) -> None:
        """Keep an entry in place of the one used longest ago."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def forget(self, key: Key) -> None:
        """Drop an entry, if it is there."""
        self._entries.pop(key, None)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._entries)


@dataclass(frozen=True)
class Rate:
    """So many a second in the long run, and so many at once after a rest."""

    per_s: float
    burst: float


class Buckets(Generic[Key]):
    """A bucket of tokens for each caller, full at first and filled again at an even rate."""

    def __init__(self, rate: Rate, most: int = MOST_KEPT) -> None:
        self._rate = rate
        self._levels: Recent[Key, tuple[float, float]] = Recent(most)

    def take(self, key: Key, now: float, cost: float = 1.0) -> float:
        """Take tokens and give 0; or take none, and give the seconds until there are enough."""
        level = self._level(key, now)
        if level < cost:
            return (cost - level) / self._rate.per_s
        self._levels.put(key, (level - cost, now))
        return 0.0

    def reserve(self, key: Key, now: float, longest_s: float) -> float:
        """Take a token that may be there only later; give the seconds until it is, at most so."""
        level = max(self._level(key, now) - 1.0, -longest_s * self._rate.per_s)
        self._levels.put(key, (level, now))
        return max(0.0, -level / self._rate.per_s)

    def charge(self, key: Key, now: float, cost: float) -> None:
        """Take tokens for what happened already, as far as there are any."""
        self._levels.put(key, (max(0.0, self._level(key, now) - cost), now))

    def _level(self, key: Key, now: float) -> float:
        level, at = self._levels.get(key) or (self._rate.burst, now)
        return min(self._rate.burst, level + max(0.0, now - at) * self._rate.per_s)


class AtOnce(Generic[Key]):
    """Counts what goes on at the same moment for each caller."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: dict[Key, int] = {}

    @contextmanager
    def enter(self, key: Key) -> Iterator[bool]:
        """Count one more for as long as the block runs; gives False when there are too many."""
        is_free = self._counts.get(key, 0) < self._most
        if not is_free:
            yield False
            return
        self._counts[key] = self._counts.get(key, 0) + 1
        try:
            yield True
        finally:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]


class Allowances(Generic[Key]):
    """Sums up bytes of each caller until its stage, such as a round, changes; from any thread.

    What was spent is forgiven evenly over ``forgiven_s`` seconds, so nobody is stuck for ever.
    """

    def __init__(self, forgiven_s: float = 3600.0, most: int = MOST_KEPT) -> None:
        self._forgiven_s = forgiven_s
        self._lock = threading.Lock()
        self._spent: Recent[Key, tuple[Hashable, float, float]] = Recent(most)

    def wait_s(self, key: Key, stage: Hashable, limit_bytes: int, now: float) -> float:
        """Tell how long a caller must wait before it may spend again; 0 when it may now."""
        with self._lock:
            excess_bytes = self._left(key, stage, limit_bytes, now)
        return max(0.0, excess_bytes * self._forgiven_s / limit_bytes)

    def spend(
        self, key: Key, stage: Hashable, size_bytes: int, limit_bytes: int, now: float
    ) -> None:
        """Add bytes to what a caller has spent."""
        with self._lock:
            excess_bytes = self._left(key, stage, limit_bytes, now)
            self._spent.put(key, (stage, excess_bytes + limit_bytes + size_bytes, now))

    def _left(self, key: Key, stage: Hashable, limit_bytes: int, now: float) -> float:
        """Give by how much a caller is beyond its limit; negative when it is within."""
        known, spent_bytes, at = self._spent.get(key) or (stage, 0.0, now)
        if known != stage:
            spent_bytes = 0.0
        forgiven_bytes = max(0.0, now - at) * limit_bytes / self._forgiven_s
        return max(0.0, spent_bytes - forgiven_bytes) - limit_bytes
