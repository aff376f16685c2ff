"""fedra-server serve, also without the other commands: a server keeps what it has loaded."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from fedra_edge.protocol.plain_text import log_plainly
from fedra_server.cli.workplace import DEFAULT_HOME, HomeOption, example, initialised_home
from fedra_server.config import ServerConfig

EXAMPLE: Final = example("serve --host 0.0.0.0 --port 8470")
_UNLESS_SET: Final = "{} unless server.toml says otherwise"
_HOST: Final = ServerConfig.model_fields["host"].default
_PORT: Final = ServerConfig.model_fields["port"].default

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog=EXAMPLE)
def serve(
    home: HomeOption = DEFAULT_HOME,
    host: Annotated[
        str | None, typer.Option(help=f"Address to listen on; {_UNLESS_SET.format(_HOST)}.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65_535, help=f"Port; {_UNLESS_SET.format(_PORT)}; 0 takes any free one."
        ),
    ] = None,
) -> None:
    """Serve the clients until stopped by SIGINT or SIGTERM."""
    place = initialised_home(home)
    config = ServerConfig.load(place)
    chosen = {"host": host, "port": port}
    config = config.model_copy(update={k: v for k, v in chosen.items() if v is not None})
    log_plainly(config.log_level.upper())
    from fedra_server.http import serving

    raise typer.Exit(serving.serve(place, config))
