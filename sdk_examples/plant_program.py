"""Tuning inside a program that has other work: ``python plant_program.py SERVER DATA [SECONDS]``.

The control loop wants to run every 5 ms. The training runtime is loaded before the loop starts,
because that would hold it up; then the client trains in a thread of its own, rests while the line
is busy and stops with the program. Both share one interpreter, so the loop can still be late: by
how much is told at the end. A loop that must never be late belongs in a process of its own.
"""

import sys
import threading
import time

from fedra_edge import FedraEdgeError, Phase, join
from fedra_edge.training import load_trainer

PERIOD_S = 0.005
BUSY_EVERY, BUSY_FOR = 2000, 200  # cycles


class ControlLoop:
    """The plant's own work; remembers how late it was at worst, and is busy now and then."""

    def __init__(self) -> None:
        self.cycles, self.worst_delay_s, self.is_line_busy = 0, 0.0, False
        self.stopping = threading.Event()
        threading.Thread(target=self._run).start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self.stopping.wait(max(0.0, due - time.monotonic())):
            self.worst_delay_s = max(self.worst_delay_s, time.monotonic() - due)
            self.cycles += 1  # read, decide, act
            self.is_line_busy = self.cycles % BUSY_EVERY > BUSY_EVERY - BUSY_FOR
            due = time.monotonic() + PERIOD_S


def main(server: str, data: str, seconds: str = "inf") -> None:
    """Run both side by side until the time or the run is over."""
    trainer, end = load_trainer(), time.monotonic() + float(seconds)
    control = ControlLoop()
    try:
        with join(server, data=data, trainer=trainer, threads=1) as client:
            while not client.wait(PERIOD_S) and time.monotonic() < end:
                client.pause() if control.is_line_busy else client.resume()
    finally:
        control.stopping.set()
    print(f"{control.cycles} cycles, worst delay {control.worst_delay_s * 1000:.0f} ms")
    print(f"client {client.status.phase}, {client.status.rounds_contributed} rounds contributed")
    sys.exit(client.status.phase is not Phase.STOPPED)


if __name__ == "__main__":
    if len(sys.argv) not in {3, 4}:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (FedraEdgeError, ValueError) as error:
        sys.exit(f"error: {error}")
