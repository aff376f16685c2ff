"""The command that shows what the server's files take of the disk, and what they may."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from fedra_server.cli.output import format_bytes, tell_json
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    initialised_home,
    open_workplace,
)
from fedra_server.clock import SystemClock
from fedra_server.config import ServerConfig
from fedra_server.errors import StorageError
from fedra_server.expecting import largest_expected_bytes
from fedra_server.storage.durability import disk_errors
from fedra_server.storage.quotas import DiskQuota, measure_use


def show_disk(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show what the home takes, its limit, and what is free."""
    place = initialised_home(home)
    limit_bytes = ServerConfig.load(place).max_disk_bytes
    with disk_errors(f"looking at {home}"):
        use = measure_use(place)
        free_bytes = shutil.disk_usage(place.path).free
        needed_bytes = _needed_bytes(home)
        quota = DiskQuota(place, limit_bytes)
        now = SystemClock().now()
        shortage = quota.shortage(needed_bytes, free_bytes=free_bytes, now=now)
    if as_json:
        tell_json(
            {
                "blobs_bytes": use.blobs,
                "deltas_bytes": use.deltas,
                "uploads_bytes": use.uploads,
                "used_bytes": use.total,
                "max_disk_bytes": limit_bytes,
                "free_bytes": free_bytes,
                "shortage": shortage,
            }
        )
        return
    limit = "no limit set" if limit_bytes is None else f"of {format_bytes(limit_bytes)} allowed"
    typer.echo(f"used     {format_bytes(use.total)}, {limit}")
    typer.echo(f"  blobs    {format_bytes(use.blobs)} (weights and adapters)")
    typer.echo(f"  deltas   {format_bytes(use.deltas)}")
    typer.echo(f"  uploads  {format_bytes(use.uploads)}")
    typer.echo(f"free     {format_bytes(free_bytes)} on this disk")
    if shortage:
        typer.echo(f"full     a delta of {format_bytes(needed_bytes)} is refused: {shortage}")


def _needed_bytes(home: Path) -> int:
    """Give the largest delta expected; a byte where a full disk closes the records."""
    try:
        with open_workplace(home) as place:
            return largest_expected_bytes(place.store)
    except StorageError:
        return 1
