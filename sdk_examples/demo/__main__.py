"""Shows the main job from nothing to a tuned adapter: ``python -m sdk_examples.demo``."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sdk_examples.demo.following import Standing
from sdk_examples.demo.processes import DemoError, run_command
from sdk_examples.demo.running import BUDGETS, Outcome, Workplace, run_cohort
from sdk_examples.demo.sites import Site, make_sites

_MARK: Final = ".made-by-fedra-demo"
_CACHE: Final = Path(".cache") / "demo"
_CONSOLE: Final = Console(highlight=False)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds to tune.")] = 20,
    out: Annotated[Path, typer.Option(help="Where to put everything.")] = Path("demo-output"),
) -> None:
    """Tune a vision transformer on six sites' handwriting; no image leaves its site."""
    started = time.monotonic()
    try:
        _run(rounds, out)
    except DemoError as error:
        _CONSOLE.print(f"the demo failed: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _CONSOLE.print("stopped", style="yellow")
        raise typer.Exit(130) from None
    _CONSOLE.print(f"Done in {time.monotonic() - started:.0f} s; everything is in {out}.")


def _run(rounds: int, out: Path) -> None:
    _clear(out)
    model = _pretrain()
    sites = make_sites(out / "sites")
    images = sum(site.train_examples + site.test_examples for site in sites)
    _CONSOLE.print(f"Spread {images} handwritten digits over {len(sites)} sites.")
    outcome = _tune(Workplace(out), model, sites, rounds)
    _show(outcome, sites, out)
    _check(outcome, out)


def _clear(out: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    try:
        if out.exists() and any(out.iterdir()):
            if not (out / _MARK).exists():
                raise DemoError(f"{out} holds files that are not the demo's; choose another --out")
            _CONSOLE.print(f"Deleting what an earlier demo left in {out}.", markup=False)
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).touch()
    except OSError as error:
        raise DemoError(f"{out} cannot be used: {error}; choose another --out") from error


def _pretrain() -> Path:
    from sdk_examples.demo.pretraining import Pretraining, pretrained_model

    with _progress() as progress:
        task = progress.add_task("Pretraining on printed digits (once)", total=None, note="")

        def show(step: int, steps: int, share_right: float) -> None:
            note = f"{share_right:.0%} right"
            progress.update(task, completed=step, total=steps, note=note)

        model = pretrained_model(_CACHE, Pretraining(), show)
        progress.update(task, visible=False)
    _CONSOLE.print(f"The foundation model has only seen printed digits: {model}")
    return model


def _tune(place: Workplace, model: Path, sites: Sequence[Site], rounds: int) -> Outcome:
    with _progress() as progress:
        task = progress.add_task("Tuning at six sites", total=rounds, note="starting programs")
        seen: list[int | None] = []

        def show(standing: Standing) -> None:
            note = f"{standing.clients_ready} of {len(sites)} clients have joined"
            if standing.revision is not None:
                note = f"accuracy {standing.accuracy:.1%}"
            if standing.revision != (seen[-1] if seen else None) and not _CONSOLE.is_terminal:
                _CONSOLE.print(f"revision {standing.revision} of {rounds}: {note}")
            seen[:] = [standing.revision]
            progress.update(task, completed=standing.revision or 0, note=note)

        return run_cohort(place, model, sites, rounds, show)


def _show(outcome: Outcome, sites: Sequence[Site], out: Path) -> None:
    from sdk_examples.demo.charts import draw_report
    from sdk_examples.demo.report import all_tables

    budgets = {site.name: budget for site, budget in zip(sites, BUDGETS, strict=True)}
    layers = {name: budget.max_layers for name, budget in budgets.items()}
    draw_report(outcome.report, layers, out / "tuning.png")
    (out / "report.json").write_text(outcome.report.model_dump_json(indent=2), encoding="utf-8")
    _CONSOLE.print(all_tables(outcome.report, outcome.plans, budgets))
    _CONSOLE.print(f"Tuned in {outcome.tuning_s:.0f} s. Charts: {out / 'tuning.png'}")


def _check(outcome: Outcome, out: Path) -> None:
    """Compare the server's counts with those of a fresh process that uses plain peft."""
    told = run_command("sdk_examples.demo.checking", outcome.export, out / "sites")
    counted = json.loads(told)
    names = {client.client_id: client.name for client in outcome.report.clients}
    reported = {
        names[client_id]: {"num_examples": site.num_examples, "num_correct": site.num_correct}
        for client_id, site in outcome.report.accuracy[-1].sites.items()
    }
    if counted != reported:
        raise DemoError(f"plain peft counts {counted}, but the server reports {reported}")
    right = sum(site["num_correct"] for site in counted.values())
    total = sum(site["num_examples"] for site in counted.values())
    _CONSOLE.print(
        f"A fresh process loaded {outcome.export} with plain peft and got {right} of {total} "
        "right, exactly as the server reports.",
        style="green",
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=_CONSOLE,
        transient=True,
    )


if __name__ == "__main__":
    typer.run(main)
