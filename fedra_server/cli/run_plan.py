"""A run's next round as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import typer

from fedra_server.cli.output import format_bytes, format_layers, tell_table
from fedra_server.previewing import ClientPreview, RoundPreview, WorkPreview
from fedra_server.reporting import READY

_UNKNOWN: Final = "-"


def tell_preview(preview: RoundPreview, *, explain: bool) -> None:
    """Print what each client would be given, and on demand what that follows from."""
    following = "no round is to come" if preview.round is None else f"next is round {preview.round}"
    typer.echo(f"Run {preview.run} on {preview.model}: {preview.state}, {following}")
    if preview.round is not None:
        needed = preview.spec.min_participants
        typer.echo(f"Ready: {preview.num_ready} of at least {needed} participants")
        typer.echo(f"Coverage per layer: {' '.join(str(count) for count in preview.coverage)}")
        if explain and preview.holders_needed > 1:
            typer.echo(_holders(preview))
    typer.echo()
    tell_table(
        [
            "CLIENT", "ONLINE", "DEPTH", "RESIDENCY", "TRAINS", "LAYERS", "AT ONCE", "STEPS",
            "STEP", "PROMISE", "USABLE", "STATE",
        ],
        [_row(client) for client in preview.clients],
        empty="No clients yet; one enrols with `fedra-edge join --server URL --data DIR`.",
    )  # fmt: skip
    if explain:
        for client in preview.clients:
            typer.echo(f"\n{client.name}")
            for what, told in _inputs(client, preview):
                typer.echo(f"  {what:<10}{told}")


def _holders(preview: RoundPreview) -> str:
    """Say which layers too few would train for the run's merge, and what would help."""
    merge, short = preview.spec.merge, preview.short_layer_ids
    needed = f"{merge} needs {preview.holders_needed} holders of a layer"
    if not short:
        return f"Holders: {needed}; every layer has them"
    trained = sum(preview.coverage)
    wanted = preview.holders_needed * preview.num_layers
    return (
        f"Holders: {needed}; layers {format_layers(short)} would stay as they are: the machines "
        f"together train {trained} layers, and {wanted} would do for all of them"
    )


def _row(client: ClientPreview) -> list[object]:
    known = [client.name, "yes" if client.is_online else "no"]
    usable, state = format_bytes(client.profile.memory_bytes), client.reason
    work = client.work
    if work is None:
        return [*known, *[_UNKNOWN] * 8, usable, state]
    drawn = work.trained_layer_ids
    return [
        *known,
        work.depth,
        work.residency,
        work.num_layers,
        _UNKNOWN if drawn is None else format_layers(drawn),
        _at_once(work),
        work.steps,
        f"{work.step_s:.3g} s",
        format_bytes(work.predicted_peak_bytes),
        usable,
        state,
    ]


def _inputs(client: ClientPreview, preview: RoundPreview) -> Iterator[tuple[str, str]]:
    """Give what a client's work follows from, and what stands against more."""
    profile, measured, work = client.profile, client.calibration, client.work
    idle_bytes = max(profile.baseline_bytes, measured.memory.idle_bytes if measured else 0)
    yield "memory", f"{format_bytes(profile.memory_bytes)} usable, {format_bytes(idle_bytes)} idle"
    if measured is not None:
        memory = measured.memory
        kept = f"{format_bytes(memory.kept_bytes)} of that is kept for the way back"
        example = f"{format_bytes(memory.working_bytes)} for each example; {kept}"
        yield "a block", f"{format_bytes(memory.fixed_bytes)}, and {example}"
        forward_ms, backward_ms = 1000 * measured.forward_s, 1000 * measured.backward_s
        yield "speed", f"{forward_ms:.2f} ms forward, {backward_ms:.2f} ms back, an example"
        held_out = measured.held_out_examples
        yield "examples", f"{measured.train_examples} to train on, {held_out} held out"
    site, run = profile.max_layers, preview.spec.max_layers
    yield (
        "layers",
        f"{preview.num_layers}; the site's cap is {site or 'none'}, the run's {run or 'none'}",
    )
    allowed = f"{preview.training_s:.0f} s of the deadline of {preview.spec.deadline_s:.0f} s"
    needs = "" if work is None else f"training takes {work.steps * work.step_s:.1f} s; "
    yield "time", f"{needs}it may take {allowed}"
    if work is not None:
        yield "not more", work.why_not_more or "this is all there is"
    if client.reason != READY:
        yield "left out", client.reason


def _at_once(work: WorkPreview) -> str:
    """Write how many examples go through a block at once, of how many before the next one."""
    if work.walk_batch > work.micro_batch:
        return f"{work.micro_batch} of {work.walk_batch}"
    return str(work.micro_batch)
