"""The client loop: ask what to do, do it, deliver the result, until told to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from fedra_edge.enrolling import Enrolment
from fedra_edge.errors import (
    FedraEdgeError,
    ServerFailedError,
    ServerRefusedError,
    ServerUnreachableError,
    StorageError,
    WorkInterrupted,
)
from fedra_edge.outbox import Parcel
from fedra_edge.participation import FATAL, Equipment, Participation
from fedra_edge.profiling import is_other_memory
from fedra_edge.progress import Phase
from fedra_edge.protocol.devices import DeviceProfile
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.messages import RejoinRequest
from fedra_edge.protocol.rounds import Assignment, Stop, Train, Wait
from fedra_edge.retrying import ONCE, RetryPolicy

LOGGER: Final = logging.getLogger(__name__)
_DELIVERY: Final = RetryPolicy(max_attempts=5, max_wait_s=5.0)
_AFTER_FAILURE: Final = RetryPolicy(first_wait_s=1.0, max_wait_s=60.0)
_QUICK_S: Final = 0.2
_MAX_QUICK: Final = 5
_BREATH_S: Final = 1.0
_TELLING_S: Final = 60.0


class Session:
    """One client's membership in action; ``run`` returns when the work is over."""

    def __init__(
        self,
        equipment: Equipment,
        enrolment: Enrolment,
        measure: Callable[[], DeviceProfile],
        *,
        may_rest: bool = False,
    ) -> None:
        self._equipment = equipment
        self._api = equipment.api
        self._control = equipment.control
        self._board = equipment.board
        self._enrolment = enrolment
        self._measure = measure
        self._profile = measure()
        self._told_at = -_TELLING_S
        self._participation = Participation(equipment)
        self._failures = 0
        self._postponed: set[AssignmentId] = set()
        self._quick_answers = 0
        self._is_reason_known = False
        self._may_rest = may_rest
        self._busy_at = time.monotonic()
        self._is_over = False
        self.is_resting = False

    def run(self) -> None:
        """Take part until the server or the embedding program says stop, or it is time to rest.

        Raises:
            ServerRefusedError: The server does not accept this client.
            WrongServerError: Another server answers than the one that is meant.
            ConfigurationError: Nothing tells whom to trust.
            DataError: No local example can be trained on.
            BackendUnavailableError: The training runtime does not work.
            StorageError: The home cannot be read or written.
        """
        try:
            self._join()
            while not (self._control.is_stopping or self._is_over or self.is_resting):
                self._take_turn()
        except WorkInterrupted:
            LOGGER.debug("stopped as asked")
        finally:
            if not self.is_resting:
                self._say_goodbye()

    def _take_turn(self) -> None:
        """Deliver what is finished, ask what to do, and do it."""
        self._rest_while_paused()
        if not self._deliver():  # new work would be a second delta for the same round
            self._pace(is_done=False)
            return
        asked_at = time.monotonic()
        match self._ask():
            case Stop(reason=reason):
                LOGGER.info("the server says stop: %s", reason)
                self._is_over = True
            case Wait() as wait:
                is_held = self._note_waiting(wait)
                is_done = self._participation.prepare(wait)
                self._tell_changed_memory()
                self._enrolment.rotate_key_when_due()
                self._pace(is_done=is_done, held_since=asked_at if is_held else None)
                self.is_resting = self._is_time_to_rest(is_idle=is_held)
            case Train() as train:
                is_done = self._participation.train(train)
                self._is_reason_known = is_done  # what was done is why there is nothing to do
                self._pace(is_done=is_done)
                self._busy_at = time.monotonic()

    def _join(self) -> None:
        """Come back as who we were, or become a member."""
        config = self._equipment.config
        self._board.update(phase=Phase.CONNECTING, detail=f"connecting to {config.server}")
        identity = self._enrolment.come_back()
        if identity is None:
            identity = self._enrolment.enrol(self._profile)
            LOGGER.info("enrolled at %s as client %s", config.server, identity.client_id)
        else:
            self._rejoin()
            LOGGER.info("back at %s as client %s", config.server, identity.client_id)
        self._board.update(client_id=identity.client_id)

    def _rejoin(self) -> None:
        config = self._equipment.config
        name = config.name if "name" in config.model_fields_set else None
        self._api.rejoin(RejoinRequest(profile=self._profile, run=config.run, name=name))

    def _tell_changed_memory(self) -> None:
        """Tell the server anew what this machine has, when its memory is no more what it was.

        Not before there is nothing else to do, and not often: the server forgets what it knew of
        this machine's speed.
        """
        is_early = time.monotonic() - self._told_at < _TELLING_S
        if is_early or not self._is_reason_known:
            return
        told_bytes, profile = self._profile.memory_bytes, self._measure()
        if is_other_memory(told_bytes, profile.memory_bytes):
            LOGGER.info("usable memory went from %d to %d bytes", told_bytes, profile.memory_bytes)
            self._profile = profile
            self._told_at = time.monotonic()
            self._rejoin()

    def _ask(self) -> Assignment:
        """Ask what to do; the server may hold the answer back once we know why we wait."""
        wait_s = self._equipment.config.poll_s if self._is_reason_known else 0.0
        assignment = self._api.assignment(wait_s)
        traffic = self._equipment.transport.traffic
        self._board.update(bytes_received=traffic.bytes_received, bytes_sent=traffic.bytes_sent)
        return assignment

    def _note_waiting(self, wait: Wait) -> bool:
        """Show why there is nothing to train; tell whether this answer could be held back."""
        is_idle = wait.calibrate is None and wait.evaluate is None
        was_known, self._is_reason_known = self._is_reason_known, is_idle
        self._board.update(phase=Phase.WAITING, detail=wait.reason)
        return was_known and is_idle

    def _is_time_to_rest(self, *, is_idle: bool) -> bool:
        """Tell whether there has been nothing to do for long enough to give memory back."""
        now = time.monotonic()
        if not is_idle:
            self._busy_at = now
        is_over = self._control.is_stopping or self._control.is_paused
        is_long = now - self._busy_at >= self._equipment.config.rest_after_s
        return self._may_rest and is_long and not is_over

    def _rest_while_paused(self) -> None:
        if self._control.is_paused:
            self._tell_offline()
            self._board.update(phase=Phase.PAUSED, detail="paused")
            self._control.wait_while_paused()
            self._is_reason_known = False

    def _deliver(self) -> bool:
        """Send every delta that waits; tell whether new work may be asked for."""
        for parcel in self._equipment.outbox.parcels():
            self._board.update(phase=Phase.SENDING, detail="sending the delta")
            try:
                self._send(parcel)
            except ServerFailedError as error:
                self._put_behind(parcel, error)
            except ServerUnreachableError as error:
                LOGGER.warning("the delta waits in the outbox: %s", error)
                return False
            except StorageError as error:
                LOGGER.warning("the delta of %s stays in the outbox: %s", parcel.manifest.id, error)
                self._board.update(phase=Phase.WAITING, detail=f"a delta stays behind: {error}")
        return True

    def _send(self, parcel: Parcel) -> None:
        assignment_id = parcel.manifest.id
        policy = ONCE if assignment_id in self._postponed else _DELIVERY
        try:
            receipt = self._api.send_delta(
                parcel.manifest, parcel.file, policy, is_new=parcel.is_new
            )
        except FATAL:
            raise
        except ServerRefusedError as error:
            LOGGER.warning("the server refused the delta of %s: %s", assignment_id, error)
            self._give_up(assignment_id, f"the delta was refused: {error}")
            self._equipment.outbox.refuse(assignment_id)
        else:
            fault_point("send.received")
            self._equipment.outbox.remove(assignment_id)
            contributed = self._board.current.rounds_contributed + 1
            stale = receipt.staleness
            late = "" if stale is None else f" late, with a staleness of {stale}"
            detail = f"the delta was admitted{late}"
            self._board.update(phase=Phase.WAITING, rounds_contributed=contributed, detail=detail)

    def _put_behind(self, parcel: Parcel, error: ServerFailedError) -> None:
        """Let a delta at which the server fails wait behind the others, and hold up no work."""
        assignment_id = parcel.manifest.id
        LOGGER.warning("the delta of %s waits behind the others: %s", assignment_id, error)
        if assignment_id not in self._postponed:
            self._give_up(assignment_id, f"the server fails at the delta: {error}")
        self._equipment.outbox.postpone(assignment_id)
        self._postponed.add(assignment_id)

    def _give_up(self, assignment_id: AssignmentId, detail: str) -> None:
        """End an assignment whose delta is not wanted, or it would be handed out again."""
        try:
            self._api.report_failure(assignment_id, detail)
        except ServerRefusedError as error:
            LOGGER.debug("the server does not wait for %s: %s", assignment_id, error)

    def _pace(self, *, is_done: bool, held_since: float | None = None) -> None:
        """Wait longer after each failure in a row, and keep off a server that never holds us.

        ``held_since`` is when the server was asked, if it could have held its answer back.
        """
        self._failures = 0 if is_done else self._failures + 1
        is_quick = held_since is not None and time.monotonic() - held_since < _QUICK_S
        self._quick_answers = self._quick_answers + 1 if is_quick else 0
        if self._failures:
            self._control.stopping.wait(_AFTER_FAILURE.wait_s(self._failures, 1.0))
        elif self._quick_answers > _MAX_QUICK:
            self._control.stopping.wait(_BREATH_S)

    def _say_goodbye(self) -> None:
        self._control.settle()
        self._equipment.transport.reopen()
        if self._board.current.client_id is not None:
            self._tell_offline()

    def _tell_offline(self) -> None:
        try:
            self._api.offline()
        except FedraEdgeError as error:
            LOGGER.info("could not tell the server that this client goes offline: %s", error)
