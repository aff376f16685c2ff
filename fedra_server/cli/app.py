"""The command tree, and the commands that belong to no group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import JsonValue

from fedra_edge.protocol.version import PROTOCOL_VERSION
from fedra_server import __version__
from fedra_server.addressing import check_exposure, listens_at
from fedra_server.authority import ensure_authority
from fedra_server.chain import Event
from fedra_server.cli import (
    audit,
    clients,
    models,
    operators,
    pruning,
    quarantine,
    runs,
    serving,
    tokens,
)
from fedra_server.cli.disk import show_disk
from fedra_server.cli.output import tell_json
from fedra_server.cli.workplace import (
    CLOSED_REMEDY,
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    advising,
    check_access,
    example,
    open_workplace,
)
from fedra_server.config import CONFIG_TEMPLATE, ServerConfig, ServerHome
from fedra_server.errors import NotFoundError
from fedra_server.settings_file import Setting, with_settings
from fedra_server.storage.durability import disk_errors, is_owners_only, write_durably
from fedra_server.storage.runs import manifest_sha256
from fedra_server.storage.store import Store

app = typer.Typer(
    help="Tune a foundation model together with machines that cannot hold it.",
    epilog=example("init --home /srv/fedra"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(models.app, name="model")
app.add_typer(runs.app, name="run")
app.add_typer(clients.app, name="client")
app.add_typer(tokens.app, name="token")
app.add_typer(operators.app, name="operator")
app.add_typer(audit.app, name="audit")
app.add_typer(quarantine.app, name="quarantine")
app.command(epilog=serving.EXAMPLE)(serving.serve)
app.command("disk", epilog=example("disk --home /srv/fedra --json"))(show_disk)
app.command(epilog=example("prune digits --keep-revisions 5 --dry-run"))(pruning.prune)


@app.command(epilog=example("init --home /srv/fedra --host-name hq.example"))
def init(
    host_names: Annotated[
        list[str] | None,
        typer.Option(
            "--host-name",
            help="A further name or address by which sites reach this machine; may be repeated. "
            "It goes into the server's certificate, beside those that are there and, where the "
            "server listens on all addresses, this machine's own.",
        ),
    ] = None,
    certificate_file: Annotated[
        Path | None, typer.Option(help="Your own certificate with its chain, instead of one made.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="The key of your own certificate.")] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Make a server home, its settings and its certificates.

    Safe to repeat: what is there stays, and --host-name adds to it.
    """
    place = ServerHome(home.absolute())
    check_access(place)
    settings: dict[str, Setting] = {"host_names": host_names} if host_names else {}
    own = {"certificate_file": certificate_file, "key_file": key_file}
    settings |= {name: str(path.absolute()) for name, path in own.items() if path is not None}
    with advising(CLOSED_REMEDY), disk_errors(f"making the server home {home}"):
        place.create()
        is_new = not place.config_file.exists()
        before = CONFIG_TEMPLATE if is_new else place.config_file.read_text(encoding="utf-8")
        after = with_settings(before, settings)
        if is_new or after != before:
            is_private = is_new or is_owners_only(place.config_file)
            write_durably(place.config_file, after.encode(), is_private=is_private)
    config = ServerConfig.load(place)
    Store.open(place.path, config.database_url).close()
    authority = ensure_authority(place)
    _prepare_certificate(place, config)
    if after != before and listens_at(place) is not None:
        typer.echo("The server that runs takes this up when it is started again.", err=True)
    if as_json:
        told: dict[str, JsonValue] = {"home": str(place.path), "new": is_new}
        told |= {"config_file": str(place.config_file), "ca_sha256": authority.ca_sha256}
        tell_json(told)
    else:
        typer.echo(f"{'Made' if is_new else 'Found'} the server home {place.path}")


def _prepare_certificate(home: ServerHome, config: ServerConfig) -> None:
    """Make the certificate, or try the operator's own, so that `serve` has no surprises.

    A server that runs sees to a made one itself: it may have been told to listen elsewhere.
    """
    from fedra_server.http.securing import ServerTls

    check_exposure(config)
    if config.certificate_file is not None or listens_at(home) is None:
        ServerTls(home, config)


@app.command(epilog=example("export --run digits --out digits-adapter"))
def export(
    run: Annotated[str, typer.Option("--run", help="The run.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")],
    form: Annotated[
        Literal["peft", "onnx"],
        typer.Option("--format", help="A peft adapter and its base, or one ONNX model."),
    ] = "peft",
    revision: Annotated[
        int | None, typer.Option(min=0, help="Its revision; the latest by default.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Write a revision of a run, with its base."""
    from fedra_server.exporting import export_onnx, export_revision

    with open_workplace(home) as place:
        record = place.store.run(run)
        manifest = place.store.revision(run, revision).manifest
        if manifest.number < record.pruned_through:
            raise NotFoundError(
                f"revision {manifest.number} of run {run} was pruned",
                remedy=f"The oldest revision that is kept is {record.pruned_through}.",
            )
        spec = place.store.model(record.model_id).spec
        with disk_errors(f"exporting to {out}"):
            if form == "onnx":
                export_onnx(spec, record.spec.adapter, manifest, place.blobs, out)
            else:
                own = spec.model_copy(update={"graphs": record.spec.graphs})
                export_revision(own, record.spec.adapter, manifest, place.blobs, out)
        details: dict[str, JsonValue] = {
            "revision": manifest.number,
            "revision_sha256": manifest_sha256(manifest),
            "format": form,
        }
        place.store.note(Event.REVISION_EXPORTED, run, details)
    if as_json:
        tell_json({"run": run, "revision": manifest.number, "out": str(out.absolute())})
    else:
        typer.echo(f"Exported revision {manifest.number} of run {run} to {out}")


@app.command(epilog=example("version --json"))
def version(as_json: JsonOption = False) -> None:
    """Tell this version and the protocol it speaks."""
    if as_json:
        tell_json({"version": __version__, "protocol": PROTOCOL_VERSION})
    else:
        typer.echo(f"fedra-server {__version__}, protocol {PROTOCOL_VERSION}")
