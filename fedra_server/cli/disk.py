"""The command that shows what the server's files take of the disk, and what they may."""

from __future__ import annotations

import shutil

import typer

from fedra_server.cli.output import format_bytes, tell_json
from fedra_server.cli.workplace import DEFAULT_HOME, HomeOption, JsonOption, initialised_home
from fedra_server.config import ServerConfig
from fedra_server.storage.durability import disk_errors
from fedra_server.storage.quotas import measure_use


def show_disk(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show what the home takes, its limit, and what is free."""
    place = initialised_home(home)
    limit_bytes = ServerConfig.load(place).max_disk_bytes
    with disk_errors(f"looking at {home}"):
        use = measure_use(place)
        free_bytes = shutil.disk_usage(place.path).free
    if as_json:
        tell_json(
            {
                "blobs_bytes": use.blobs,
                "deltas_bytes": use.deltas,
                "uploads_bytes": use.uploads,
                "used_bytes": use.total,
                "max_disk_bytes": limit_bytes,
                "free_bytes": free_bytes,
            }
        )
        return
    limit = "no limit set" if limit_bytes is None else f"of {format_bytes(limit_bytes)} allowed"
    typer.echo(f"used     {format_bytes(use.total)}, {limit}")
    typer.echo(f"  blobs    {format_bytes(use.blobs)} (weights and adapters)")
    typer.echo(f"  deltas   {format_bytes(use.deltas)}")
    typer.echo(f"  uploads  {format_bytes(use.uploads)}")
    typer.echo(f"free     {format_bytes(free_bytes)} on this disk")
