"""Pictures of what was chosen, and of training runs; the only room that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

COLOURS = {"I1": "#c44e52", "I2": "#4c72b0", "hutchinson": "#55a868", "exact": "#8172b3", "empirical": "#937860"}
"""One colour for each estimator, in every picture."""


def plot_choices(history: list[dict[str, Any]], path: Path) -> Path:
    """One panel per group: each candidate's bound over the steps of selection, the chosen one marked.

    Args:
        history: As in `fishopt.report.Report.history`.
        path: Where to save the picture.
    """
    groups = [choice["group"] for choice in history[-1]["choices"]]
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis, group in zip(axes.flat, groups, strict=False):
        _panel(axis, group, history)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    shown = sorted({name for entry in history for choice in entry["choices"] for name in choice["bounds"]})
    handles = [Line2D([], [], color=COLOURS[name], label=name) for name in shown]
    handles.append(Line2D([], [], color="0.3", marker="o", linestyle="", label="chosen"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel("step of selection (symmetric log scale)")
    figure.supylabel("mean label variance, or the bound on it")
    figure.savefig(path, dpi=150)
    return path


def _panel(axis: Any, group: str, history: list[dict[str, Any]]) -> None:
    found = [(e["step"], c) for e in history for c in e["choices"] if c["group"] == group]
    names = {name for _, choice in found for name in choice["bounds"]}
    positive = [v for _, choice in found for v in choice["bounds"].values() if v > 0]
    # A bound of zero is drawn on the floor of a logarithmic scale.
    floor = min(positive, default=1.0) / 10
    for name in sorted(names):
        points = [(step, max(choice["bounds"][name], floor)) for step, choice in found if name in choice["bounds"]]
        axis.plot(*zip(*points, strict=True), color=COLOURS[name], linewidth=1.5)
    for step, choice in found:
        value = max(choice["bounds"].get(choice["estimator"], 0.0), floor)
        axis.plot(step, value, marker="o", color=COLOURS[choice["estimator"]], markersize=6)
    axis.set_xscale("symlog", linthresh=32)
    axis.set_yscale("log")
    last = found[-1][1]["estimator"]
    axis.set_title(f"{group}: {last}", fontsize=10)
    zero = any(v == 0 for _, choice in found for v in choice["bounds"].values())
    if zero:
        axis.annotate("drawn at the bottom: 0", (0.03, 0.11), xycoords="axes fraction", fontsize=7, color="0.4")
    axis.grid(alpha=0.3, linewidth=0.5)


class Characterised(NamedTuple):
    """A training run.

    Attributes:
        lr: Its learning rate.
        batch_size: Its batch size.
        condition: The mean of ``C_k``.
        length: ``L_K``.
        error: Its test error, a share.
    """

    lr: float
    batch_size: int
    condition: float
    length: float
    error: float


def plot_characterisation(runs: Sequence[Characterised], path: Path) -> Path:
    """Runs in the plane of Liao et al. (2020): condition number across, length of the way up, both logarithmic.

    Args:
        runs: One or more.
        path: Where to save the picture.
    """
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    draw_characterisation(figure.subplots(), runs)
    figure.savefig(path, dpi=130)
    return path


def draw_characterisation(axis: Any, runs: Sequence[Characterised]) -> None:
    """The same in a part of a picture: one line for each learning rate, larger dots for larger batches."""
    errors = [100 * max(run.error, 1e-4) for run in runs]
    colours = LogNorm(min(errors), max(*errors, 1.01 * min(errors)))
    for lr in sorted({run.lr for run in runs}):
        own = sorted((run for run in runs if run.lr == lr), key=lambda run: run.batch_size)
        axis.plot([r.condition for r in own], [r.length for r in own], color="0.75", linewidth=0.8, zorder=1)
        last = own[-1]
        axis.annotate(
            f"lr {lr:g}", (last.condition, last.length), (8, 0), textcoords="offset points", fontsize=7, va="center"
        )
    sizes = sorted({run.batch_size for run in runs})
    for rank, size in enumerate(sizes):
        own = [run for run in runs if run.batch_size == size]
        dots = axis.scatter(
            [r.condition for r in own],
            [r.length for r in own],
            c=[100 * max(r.error, 1e-4) for r in own],
            s=22 + 24 * rank,
            norm=colours,
            cmap="viridis",
            edgecolors="0.2",
            linewidths=0.5,
            zorder=2,
            label=f"B = {size}",
        )
    axis.set(xscale="log", yscale="log", xlabel=r"mean condition number  $\bar C_K$", ylabel="length  $L_K$")
    axis.margins(x=0.12, y=0.08)
    axis.grid(alpha=0.3, linewidth=0.5)
    legend = axis.legend(frameon=False, fontsize=7, loc="best")
    for handle in legend.legend_handles:
        handle.set_facecolor("0.6")
    bar = axis.figure.colorbar(dots, ax=axis, label="test error (%)")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.minorticks_off()
