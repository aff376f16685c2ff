"""The client while there is nothing to do: the same process with a much smaller program in it.

A training runtime cannot be unloaded. So a client of the command line that has been idle for a
while replaces its program by this one, which only asks for work, and comes back when there is
some. Process id, limits, environment and open outputs stay; Windows cannot do that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, Self

from fedra_edge.api import ServerApi
from fedra_edge.control import Control
from fedra_edge.errors import (
    ConfigurationError,
    FedraEdgeError,
    ServerRefusedError,
    WorkInterrupted,
)
from fedra_edge.exit_codes import exit_code_of
from fedra_edge.home_lock import home_lock
from fedra_edge.identity import IdentityFile
from fedra_edge.link import Link
from fedra_edge.profiling import SiteCaps, is_other_memory, measure_usable_memory
from fedra_edge.protocol.rounds import Assignment, Wait
from fedra_edge.retrying import Retrier
from fedra_edge.sessions import GivenSession
from fedra_edge.transport import Transport, open_http_client

CAN_REST: Final = os.name == "posix"
CONTRIBUTED: Final = "--contributed"
"""The hidden option that carries a client's count of contributions through its rests."""

_PROXY: Final = "FEDRA_EDGE_PROXY"
_SESSION: Final = "FEDRA_EDGE_RESTING_SESSION"
_BREATH_S: Final = 1.0
_START: Final = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Rest:
    """What a resting client must know; ``command`` is how the client itself was started.

    It asks with the ``session`` it is given and cannot make one, which would take memory.
    """

    server: str
    home: Path
    membership: Path
    poll_s: float
    caps: SiteCaps
    contributed: int
    command: tuple[str, ...]
    link: Link = field(default_factory=Link)
    session: str | None = field(default=None, repr=False)

    def to_json(self) -> str:
        """Write it down for all to see: without session, and proxy, which may hold a password."""
        shown = replace(self, link=replace(self.link, proxy=None), session=None)
        return json.dumps(asdict(shown), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        values |= {name: Path(values[name]) for name in ("home", "membership")}
        caps = SiteCaps(**values.pop("caps"))
        link = replace(Link(**values.pop("link")), proxy=os.environ.get(_PROXY))
        values["session"] = take_session()
        return cls(caps=caps, link=link, command=tuple(values.pop("command")), **values)

    def hand_over(self) -> None:
        """Leave to the next program what nobody else may see."""
        if self.link.proxy is not None:
            os.environ[_PROXY] = self.link.proxy
        if self.session is not None:
            os.environ[_SESSION] = self.session


def take_session() -> str | None:
    """Take the session that the program before this one has left."""
    return os.environ.pop(_SESSION, None)


def fall_asleep(rest: Rest, told_to_stop: threading.Event) -> NoReturn:
    """Put this program in place of the one that runs, which may have been told to stop just now."""
    rest.hand_over()
    _become("fedra_edge.resting", (rest.to_json(),), told_to_stop)


def wake_up(rest: Rest, told_to_stop: threading.Event) -> NoReturn:
    """Put the whole client back in place, which then hears if it is to stop."""
    rest.hand_over()
    name, *arguments = rest.command
    added = (CONTRIBUTED, str(rest.contributed))
    _become("fedra_edge", (name, *added, *arguments), told_to_stop)


def hear_signals() -> None:
    """Let signals through that came while programs changed places; handlers must stand."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def is_there_work(rest: Rest, told_to_stop: threading.Event) -> bool:
    """Ask until there is something to do, or a signal ends it (then false), which sets the event.

    Raises:
        FedraEdgeError: The home is in use or cannot be read.
    """
    try:
        transport = Transport(open_http_client(rest.server, rest.link), rest.link)
    except ConfigurationError:  # such as a pin that is gone
        return True  # the whole client knows what to do, or to say
    control = Control(on_stop=transport.interrupt)
    _stop_on_signals(control, told_to_stop)
    with home_lock(rest.home):
        identity = IdentityFile(rest.membership, rest.server).load()
        if identity is None or rest.session is None:
            return True
        transport.authenticate(GivenSession(rest.session))
        api = ServerApi(transport, Retrier(control.stopping))
        memory_bytes = measure_usable_memory(rest.caps)
        try:
            while not _is_work(api.assignment(rest.poll_s)) and not is_other_memory(
                memory_bytes, measure_usable_memory(rest.caps)
            ):
                control.stopping.wait(_BREATH_S)
        except WorkInterrupted:
            control.settle()
            transport.reopen()
            with contextlib.suppress(FedraEdgeError):  # a server that is not there sees it itself
                api.offline()
            return False
        except ServerRefusedError:
            return True  # the whole client knows what to say of it
        finally:
            transport.close()
    return True


def main() -> None:
    """Rest, then come back or end."""
    rest, told_to_stop = Rest.from_json(sys.argv[1]), threading.Event()
    try:
        is_awaited = is_there_work(rest, told_to_stop)
    except FedraEdgeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(exit_code_of(error))
    if is_awaited:
        wake_up(rest, told_to_stop)


def _is_work(assignment: Assignment) -> bool:
    is_idle = isinstance(assignment, Wait) and not (assignment.calibrate or assignment.evaluate)
    return not is_idle


def _stop_on_signals(control: Control, told: threading.Event) -> None:
    def on_signal(number: int, _frame: FrameType | None) -> None:
        told.set()
        signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=control.stop, daemon=True).start()

    for number in _STOP_SIGNALS:
        signal.signal(number, on_signal)
    hear_signals()


def _hold_signals() -> None:
    """Let signals to stop wait until the next program hears them."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)


def _become(module: str, arguments: Sequence[str], told_to_stop: threading.Event) -> NoReturn:
    """Replace the program; one that was told to stop just now hands that on.

    The working directory stays off the path that modules are found on, and the package is found
    where this one is.
    """
    _hold_signals()
    if told_to_stop.is_set():
        signal.raise_signal(signal.SIGTERM)
    sys.stdout.flush()
    sys.stderr.flush()
    start = [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[1]), module]
    os.execv(sys.executable, [*start, *arguments])  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    main()
