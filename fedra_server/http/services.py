"""What the handlers work with: built once, handed to every handler that asks for it."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, cast

from anyio import CapacityLimiter
from fastapi import Depends, Request

from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.trust import Authority
from fedra_server.clock import Clock, SystemClock
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.coordinator import Coordinator
from fedra_server.errors import RefusedError
from fedra_server.http.challenges import Challenges
from fedra_server.http.changes import ChangeSignal
from fedra_server.http.enrolment import EnrolmentPace
from fedra_server.http.key_changes import KeyChangePace
from fedra_server.http.pacing import Allowances
from fedra_server.http.reach import Reach
from fedra_server.http.reservations import Reservations
from fedra_server.http.sessions import Sessions
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.quotas import DiskQuota
from fedra_server.storage.records import ClientRecord, UploadRecord
from fedra_server.storage.store import Store

_MAX_CHECKS_AT_ONCE = 2
_SLACK_BYTES = 16 * 2**20
_SIGNS = 20
"""How many signs of life are kept, at most, in the time after which a client counts as gone."""


def free_disk_bytes(directory: Path) -> int:
    """Measure the space left on the disk of a directory."""
    return shutil.disk_usage(directory).free


@dataclass(frozen=True)
class Services:
    """The store, the bytes, the coordinator and what the handlers share between requests."""

    store: Store
    blobs: BlobStore
    home: ServerHome
    coordinator: Coordinator
    config: ServerConfig
    quota: DiskQuota
    authority: Authority
    clock: Clock = field(default_factory=SystemClock)
    free_bytes: Callable[[Path], int] = free_disk_bytes
    changes: ChangeSignal = field(default_factory=ChangeSignal)
    enrolments: EnrolmentPace = field(default_factory=EnrolmentPace)
    key_changes: KeyChangePace = field(default_factory=KeyChangePace)
    sessions: Sessions = field(default_factory=Sessions)
    challenges: Challenges = field(default_factory=Challenges)
    receiving: Reservations = field(default_factory=Reservations)
    checks: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_MAX_CHECKS_AT_ONCE))
    counting: defaultdict[RunId, CapacityLimiter] = field(
        default_factory=lambda: defaultdict(lambda: CapacityLimiter(1))
    )
    """For each run the one thread that may wait for its lock, so that no other run's waits."""

    @cached_property
    def reach(self) -> Reach:
        """What each client may read."""
        return Reach(self.store, self.config.max_transfers_per_round)

    @cached_property
    def _sent_up(self) -> Allowances[AssignmentId]:
        return Allowances()

    def note_sent(self, upload: UploadRecord, size_bytes: int) -> None:
        """Count bytes that came for an assignment, perhaps not for the first time."""
        limit_bytes, now = self._limit_bytes(upload), self.clock.now()
        self._sent_up.spend(upload.assignment_id, None, size_bytes, limit_bytes, now)

    def require_allowance(self, upload: UploadRecord) -> None:
        """Refuse more bytes for an assignment that has had several times what it needs.

        Raises:
            RefusedError: That is so.
        """
        limit_bytes, now = self._limit_bytes(upload), self.clock.now()
        if self._sent_up.wait_s(upload.assignment_id, None, limit_bytes, now):
            raise RefusedError(
                ProblemCode.TRANSFER_EXHAUSTED,
                f"over {limit_bytes} bytes were sent for a delta of {upload.delta.size_bytes}",
            )

    def _limit_bytes(self, upload: UploadRecord) -> int:
        factor = self.config.max_transfers_per_round
        return int(factor * upload.delta.size_bytes) + _SLACK_BYTES

    def is_sign_due(self, client: ClientRecord) -> bool:
        """Tell whether a sign of life is worth keeping; one that came just before is enough."""
        age_s = self.clock.now() - client.last_seen_at
        return not (client.is_online and 0 <= age_s < self.config.heartbeat_timeout_s / _SIGNS)


async def services_of(request: Request) -> Services:
    """Give the services of the application that a request reached."""
    return cast("Services", request.app.state.services)


ServicesHere = Annotated[Services, Depends(services_of)]
"""A handler parameter of this type receives the application's services."""
