"""Has the server's certificate issued by a process of its own, which takes the memory along."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from fedra_server.authority import AuthorityFiles, is_certificate_due, refresh_certificate
from fedra_server.config import ServerHome

_LIBRARY: Final = "cryptography"
_LONGEST_S: Final = 20.0


def issue_if_due(home: ServerHome, names: Collection[str], lifetime: timedelta) -> Path:
    """Give the file with the server's key and chain, as `refresh_certificate` does.

    This process issues it where it has the library anyway, as after making an authority. It also
    does what the other process cannot do, or tells why.

    Raises:
        ConfigurationError: The authority is damaged, has expired, or a name is none.
        StorageError: The disk refused.
    """
    now = datetime.now(UTC)
    is_due = is_certificate_due(home, names, lifetime, now)
    if is_due and _LIBRARY not in sys.modules and _issue_apart(home, names, lifetime):
        return AuthorityFiles.of(home).server
    return refresh_certificate(home, names, lifetime, now)


def _issue_apart(home: ServerHome, names: Collection[str], lifetime: timedelta) -> bool:
    command = [sys.executable, "-P", "-m", "fedra_server.issuing"]
    told = [str(home.path), str(lifetime.total_seconds()), *names]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(  # noqa: S603 (this program, without a shell)
            [*command, *told],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LONGEST_S,
        )
        return done.returncode == 0
    return False


def main() -> None:
    """Do it here."""
    path, lifetime_s, *names = sys.argv[1:]
    lifetime = timedelta(seconds=float(lifetime_s))
    refresh_certificate(ServerHome(Path(path)), names, lifetime, datetime.now(UTC))


if __name__ == "__main__":
    main()
