"""The fedra-server command: arguments in, store and files changed, outcome as an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Final

from fedra_server.errors import ConfigurationError, FedraServerError
from fedra_server.exit_codes import ExitCode, exit_code_of

_JSON: Final = "--json"
_SERVE: Final = "serve"
_USAGE_REMEDY: Final = "See `fedra-server --help`, and --help after any command."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process with the code that says how it went.

    An error is told on standard error: as text, or with --json as one object
    ``{"error", "remedy", "exit_code"}``.
    """
    as_json = _JSON in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(arguments, as_json=as_json)
    except FedraServerError as error:
        code = exit_code_of(error)
        _tell(str(error), error.remedy, code, as_json=as_json)
    sys.exit(code)


def _run(arguments: Sequence[str] | None, *, as_json: bool) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = "fedra-server"
    try:
        if given[:1] == [_SERVE]:
            from fedra_server.cli.serving import app

            program = f"{program} {given.pop(0)}"
        else:
            from fedra_server.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedra"):
            raise
        raise ConfigurationError(
            f"the server needs {error.name}", remedy='pip install "fedra[server]"'
        ) from error
    if not as_json:
        app(args=given, prog_name=program)
    try:
        ended = app(args=given, prog_name=program, standalone_mode=False)
    except Exception as error:
        # typer carries a click of its own and exports no base class of its usage errors
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        _tell(describe(), _USAGE_REMEDY, ExitCode.USAGE, as_json=True)
        return ExitCode.USAGE
    return ended if isinstance(ended, int) else ExitCode.OK


def _tell(message: str, remedy: str, code: int, *, as_json: bool) -> None:
    if as_json:
        document = {"error": message, "remedy": remedy, "exit_code": int(code)}
        sys.stderr.write(json.dumps(document) + "\n")
        return
    sys.stderr.write(f"error: {message}\n")
    if remedy:
        sys.stderr.write(f"what to do: {remedy}\n")
