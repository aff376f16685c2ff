"""The fedra-server command: arguments in, store and files changed, outcome as an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedra_server.errors import ConfigurationError, FedraServerError
from fedra_server.exit_codes import exit_code_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process with the code that says how it went."""
    try:
        _run(arguments)
    except FedraServerError as error:
        sys.stderr.write(f"error: {error}\n")
        if error.remedy:
            sys.stderr.write(f"what to do: {error.remedy}\n")
        sys.exit(exit_code_of(error))


def _run(arguments: Sequence[str] | None) -> None:
    try:
        from fedra_server.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedra"):
            raise
        raise ConfigurationError(
            f"the server needs {error.name}", remedy='pip install "fedra[server]"'
        ) from error
    app(args=arguments, prog_name="fedra-server")
