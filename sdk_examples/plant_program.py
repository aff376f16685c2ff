"""Tuning inside a program that has other work: ``python plant_program.py SERVER DATA [SECONDS]``.

The control loop below must run every 20 ms, whatever happens. The client trains in its own
thread, rests while the line is busy, and is stopped with the program.
"""

import sys
import threading
import time

from fedra_edge import Phase, join

PERIOD_S = 0.02
BUSY_EVERY, BUSY_FOR = 500, 50  # cycles


class ControlLoop:
    """The plant's own work; remembers how late it was at worst."""

    def __init__(self) -> None:
        self.cycles = 0
        self.worst_delay_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            self.worst_delay_s = max(self.worst_delay_s, time.monotonic() - due)
            self.cycles += 1  # read, decide, act
            due = time.monotonic() + PERIOD_S

    @property
    def is_line_busy(self) -> bool:
        """A busy spell now and then."""
        return self.cycles % BUSY_EVERY > BUSY_EVERY - BUSY_FOR

    def stop(self) -> None:
        """End after this cycle."""
        self._stopping.set()
        self._thread.join()


def main(server: str, data: str, seconds: str = "inf") -> None:
    """Run both side by side until the time or the run is over."""
    control = ControlLoop()
    end = time.monotonic() + float(seconds)
    try:
        with join(server, data=data, threads=1) as client:
            while not client.wait(PERIOD_S) and time.monotonic() < end:
                client.pause() if control.is_line_busy else client.resume()
    finally:
        control.stop()
    print(f"{control.cycles} cycles, worst delay {control.worst_delay_s * 1000:.0f} ms")
    print(f"client {client.status.phase}, {client.status.rounds_contributed} rounds contributed")
    sys.exit(client.status.phase is not Phase.STOPPED)


if __name__ == "__main__":
    main(*sys.argv[1:])
