"""The client while there is nothing to do: the same process with a much smaller program in it.

A training runtime cannot be unloaded. So a client of the command line that has been idle for a
while replaces its program by this one, which only asks for work, and comes back when there is
some. Process id, limits, environment and open outputs stay; Windows cannot do that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from pydantic import BaseModel, ConfigDict

from fedra_edge.api import ServerApi
from fedra_edge.control import Control
from fedra_edge.errors import FedraEdgeError, ServerRefusedError, WorkInterrupted
from fedra_edge.exit_codes import exit_code_of
from fedra_edge.home_lock import home_lock
from fedra_edge.identity import IdentityFile
from fedra_edge.profiling import SiteCaps, measure_usable_memory
from fedra_edge.protocol.rounds import Assignment, Wait
from fedra_edge.retrying import Retrier
from fedra_edge.transport import Transport, open_http_client

CAN_REST: Final = os.name == "posix"
CONTRIBUTED: Final = "--contributed"
"""The hidden option that carries a client's count of contributions through its rests."""

WORTH_TELLING: Final = 0.2
"""By what part usable memory must change before plans are worth making anew."""

_BREATH_S: Final = 1.0
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Rest(BaseModel):
    """What a resting client must know; ``command`` is how the client itself was started."""

    model_config = ConfigDict(frozen=True)

    server: str
    home: Path
    membership: Path
    poll_s: float
    caps: SiteCaps
    contributed: int
    command: tuple[str, ...]


def fall_asleep(rest: Rest, told_to_stop: threading.Event) -> NoReturn:
    """Put this program in place of the one that runs, which may have been told to stop just now."""
    _hold_signals()
    if told_to_stop.is_set():
        signal.raise_signal(signal.SIGTERM)
    _become("-m", "fedra_edge.resting", rest.model_dump_json())


def wake_up(rest: Rest) -> NoReturn:
    """Put the whole client back in place."""
    _hold_signals()
    _become("-m", "fedra_edge", *rest.command, CONTRIBUTED, str(rest.contributed))


def hear_signals() -> None:
    """Let signals through that came while programs changed places; handlers must stand."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def is_there_work(rest: Rest) -> bool:
    """Ask until there is something to do, or a signal ends it (then false).

    Raises:
        FedraEdgeError: The home is in use or cannot be read.
    """
    transport = Transport(open_http_client(rest.server))
    control = Control(on_stop=transport.interrupt)
    _stop_on_signals(control)
    with home_lock(rest.home):
        identity = IdentityFile(rest.membership, rest.server).load()
        if identity is None:
            return True
        transport.authenticate(identity.credential)
        api = ServerApi(transport, Retrier(control.stopping))
        memory_bytes = measure_usable_memory(rest.caps)
        try:
            while not _is_work(api.assignment(rest.poll_s)) and not _has_changed(
                memory_bytes, measure_usable_memory(rest.caps)
            ):
                control.stopping.wait(_BREATH_S)
        except WorkInterrupted:
            control.settle()
            transport.reopen()
            api.offline()
            return False
        except ServerRefusedError:
            return True  # the whole client knows what to say of it
        finally:
            transport.close()
    return True


def main() -> None:
    """Rest, then come back or end."""
    rest = Rest.model_validate_json(sys.argv[1])
    try:
        is_awaited = is_there_work(rest)
    except FedraEdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(exit_code_of(error))
    if is_awaited:
        wake_up(rest)


def _is_work(assignment: Assignment) -> bool:
    is_idle = isinstance(assignment, Wait) and not (assignment.calibrate or assignment.evaluate)
    return not is_idle


def _has_changed(before_bytes: int, now_bytes: int) -> bool:
    return abs(now_bytes - before_bytes) > WORTH_TELLING * before_bytes


def _stop_on_signals(control: Control) -> None:
    def on_signal(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=control.stop, daemon=True).start()

    for number in _STOP_SIGNALS:
        signal.signal(number, on_signal)
    hear_signals()


def _hold_signals() -> None:
    """Let signals to stop wait until the next program hears them."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)


def _become(*arguments: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    main()
