"""The demo's picture: accuracy over revisions, and which layers were trained in which round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedra_server.reports import RunReport

_COLOURS: Final = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#9c6b4e")
_INK: Final = "#1b1e23"
_MUTED: Final = "#6b7280"
_LINES: Final = "#e5e7eb"
_STYLE: Final = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINES,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}


def draw_report(report: RunReport, budgets: Mapping[str, int], path: Path) -> None:
    """Draw both charts side by side into a PNG file."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.06)
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are typed one by one
        figure = Figure(figsize=(14, 5.6), dpi=150, layout=layout)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _draw_accuracy(left, report, budgets)
        _draw_coverage(figure, right, report)
        figure.savefig(path)


def _draw_accuracy(axes: Axes, report: RunReport, budgets: Mapping[str, int]) -> None:
    names = {client.client_id: client.name for client in report.clients}
    order = list(budgets)
    for client_id in sorted(names, key=lambda client_id: order.index(names[client_id])):
        points = [
            (entry.revision, entry.sites[client_id].accuracy)
            for entry in report.accuracy
            if client_id in entry.sites
        ]
        colour = _COLOURS[order.index(names[client_id]) % len(_COLOURS)]
        label = f"{names[client_id]} ({budgets[names[client_id]]} of {report.num_layers} layers)"
        axes.plot(
            *zip(*points, strict=True), color=colour, linewidth=1.6, label=label, clip_on=False
        )
    pooled = [(entry.revision, entry.pooled.accuracy) for entry in report.accuracy]
    axes.plot(*zip(*pooled, strict=True), color=_INK, linewidth=3, label="all sites", clip_on=False)
    _name_ends(axes, pooled)
    axes.set_title("Accuracy on each site's own held-out images", loc="left", fontweight="bold")
    axes.set_xlabel("revision")
    axes.set_ylim(0, 1)
    axes.set_xlim(0, max(1, pooled[-1][0]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=_LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(loc="lower right", frameon=False, fontsize=9, ncols=2)


def _name_ends(axes: Axes, pooled: Sequence[tuple[int, float]]) -> None:
    """Write the first and the last accuracy beside the ends of the pooled curve."""
    for (revision, accuracy), offset in ((pooled[0], (8, -10)), (pooled[-1], (6, -4))):
        axes.annotate(
            f"{accuracy:.0%}",
            (revision, accuracy),
            offset,
            textcoords="offset points",
            fontweight="bold",
            annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _draw_coverage(figure: Figure, axes: Axes, report: RunReport) -> None:
    columns = [record.coverage for record in report.rounds]
    most = max((max(column) for column in columns), default=1)
    colours = mpl.colormaps["Blues"].resampled(most + 1)
    image = axes.imshow(
        list(zip(*columns, strict=True)),
        aspect="auto", cmap=colours, vmin=-0.5, vmax=most + 0.5, origin="lower",
        extent=(0.5, len(columns) + 0.5, -0.5, report.num_layers - 0.5),
    )  # fmt: skip
    axes.set_title("Coverage: clients that trained a layer", loc="left", fontweight="bold")
    axes.set_xlabel("round")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(report.num_layers))
    axes.set_xticks([number + 0.5 for number in range(1, len(columns))], minor=True)
    axes.set_yticks([layer_id + 0.5 for layer_id in range(report.num_layers - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, ticks=range(most + 1), shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
