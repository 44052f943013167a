"""Pictures of what curvature costs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cost.curvature import METHODS
from benchmarks.cost.curvature import OURS as ESTIMATES
from benchmarks.cost.growth import AUTO, DEFAULTS, ESTIMATORS, exponent
from benchmarks.cost.records import Measured, Row
from benchmarks.cost.training import OURS as TRAINED
from fishopt.plotting import COLOURS

OURS, OTHERS, MEMORY = "#4c72b0", "0.62", "#dd8452"
OPTIMIZERS = {
    "FisherAdam": "#4c72b0",
    "FisherAdam schedule-free": "#8172b3",
    "DiagonalNGD": "#55a868",
    "AdamW foreach": "0.45",
    "AdamW": "0.7",
}
LINES = {"gradient": "0.55", **{name: COLOURS[name] for name in ESTIMATORS}, AUTO: "0.1"}


def draw(measured: Measured, folder: Path, device: str) -> list[Path]:
    """One picture for the ratios to what else there is, one for growth, of the sections that there are."""
    suffix = "" if device == "cpu" else f"_{device}"
    drawn = []
    if {"passes", "update", "step"} & measured.keys():
        drawn.append(_save(_overview(measured), folder / f"cost{suffix}.png"))
    if "growth" in measured:
        drawn.append(_save(_growth(measured["growth"]), folder / f"cost_growth{suffix}.png"))
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path


def _overview(measured: Measured) -> Figure:
    figure = Figure(figsize=(15, 9.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1.25, 1))
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    if rows := measured.get("passes"):
        _passes(upper, rows)
    left, middle, right = lower.subplots(1, 3, width_ratios=(1.1, 1, 1.1))
    for axis, section, panel in ((left, "update", _update), (middle, "step", _step), (right, "passes", _memory)):
        if rows := measured.get(section):
            panel(axis, rows)
        else:
            axis.set_visible(False)
    return figure


def _passes(figure: Any, rows: list[Row]) -> None:
    problems = list(dict.fromkeys(row.problem for row in rows))
    axes = figure.subplots(1, len(problems), sharey=True, sharex=True)
    highest = max(row.ratio.high for row in rows)
    for axis, problem in zip(axes, problems, strict=True):
        found = {row.method: row.ratio for row in rows if row.problem == problem}
        for place, method in enumerate(METHODS):
            if method not in found:
                axis.text(1.1, place, "not measured", color="0.6", va="center", fontsize=8)
                continue
            spread = found[method]
            error = [[spread.median - spread.low], [spread.high - spread.median]]
            colour = OURS if method in ESTIMATES else OTHERS
            axis.barh(place, spread.median, xerr=error, color=colour, height=0.72, ecolor="0.2")
            text = f"{spread.median:.0f}" if spread.median >= 20 else f"{spread.median:.1f}"
            blank = {"facecolor": "w", "edgecolor": "none", "pad": 0.5}
            axis.text(spread.high * 1.12, place, text, va="center", fontsize=8, bbox=blank)
        axis.axvline(1, color="0.1", linewidth=1, linestyle="--")
        axis.set_xscale("log")
        axis.set_xlim(_below(rows), highest * 2.5)
        axis.set_title(problem, fontsize=11)
        _plain(axis.xaxis)
        _grid(axis, "x")
    axes[0].set_yticks(range(len(METHODS)), METHODS)
    axes[0].invert_yaxis()
    figure.suptitle("One estimate, with its forward pass: time / time of a gradient (dashed). Blue: fishopt.")


def _update(axis: Any, rows: list[Row]) -> None:
    rows = sorted((row for row in rows if row.baseline == "AdamW fused"), key=lambda row: row.size)
    for method, colour in OPTIMIZERS.items():
        _line(axis, [row for row in rows if row.method == method], colour, method)
    axis.axhline(1, color="0.1", linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain(axis.yaxis)
    axis.set_xlabel("parameters")
    axis.set_ylim(bottom=_below(rows))
    axis.set_title("step() without a refresh: time / AdamW fused (dashed)", fontsize=11)
    axis.legend(frameon=False, fontsize=9)
    _grid(axis, "both")


def _step(axis: Any, rows: list[Row]) -> None:
    problems = list(dict.fromkeys(row.problem for row in rows))
    width = 0.8 / len(TRAINED)
    for i, method in enumerate(TRAINED):
        for row in (row for row in rows if row.method == method):
            place = problems.index(row.problem) + (i - (len(TRAINED) - 1) / 2) * width
            spread, share = row.ratio, row.extra["share"] * row.ratio.median
            error = [[spread.median - spread.low], [spread.high - spread.median]]
            style = {"color": OPTIMIZERS[method], "label": method if row.problem == problems[0] else None}
            axis.bar(place, spread.median, 0.94 * width, yerr=error, ecolor="0.2", **style)
            axis.bar(place, share, 0.94 * width, bottom=spread.median - share, color="none", hatch="///", edgecolor="w")
            axis.text(place, spread.high + 0.03, f"{spread.median:.2f}", ha="center", fontsize=8)
    axis.axhline(1, color="0.1", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(problems)), problems)
    axis.set_ylim(0, 1.25 * max(row.ratio.high for row in rows))
    axis.set_title("whole training step / with AdamW fused; hatched: curvature", fontsize=11)
    axis.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    _grid(axis, "y")


def _memory(axis: Any, rows: list[Row]) -> None:
    problems = list(dict.fromkeys(row.problem for row in rows))
    found = {(row.problem, row.method): row.extra["memory"] for row in rows if "memory" in row.extra}
    methods = [m for m in METHODS if any((p, m) in found for p in problems)]
    width = 0.8 / len(problems)
    for i, problem in enumerate(problems):
        places = [j + (i - (len(problems) - 1) / 2) * width for j in range(len(methods))]
        values = [found[problem, method] for method in methods]
        shade = 0.35 + 0.65 * (i + 1) / len(problems)
        axis.barh(places, values, width * 0.9, color=MEMORY, alpha=shade, label=problem)
        for place, value in zip(places, values, strict=True):
            axis.text(value * 1.06, place, f"{value:.1f}", va="center", fontsize=7)
    axis.axvline(1, color="0.1", linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, *found.values()) * 0.8, 2.2 * max(found.values()))
    _plain(axis.xaxis)
    axis.set_yticks(range(len(methods)), [method.replace("BackPACK ", "BackPACK\n") for method in methods])
    axis.invert_yaxis()
    axis.set_title("peak memory / a gradient's (dashed)", fontsize=11)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    _grid(axis, "x")


def _growth(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(14, 8.2), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, what in zip(axes.flat, DEFAULTS, strict=True):
        mine = sorted((row for row in rows if row.problem == what), key=lambda row: row.size)
        for method, colour in LINES.items():
            found = [row for row in mine if row.method == method]
            style = {"linestyle": "--", "zorder": 3} if method == AUTO else {}
            _line(axis, found, colour, f"{method}: $size^{{{exponent(found):.2f}}}$", **style)
        _handover(axis, [row for row in mine if row.method == AUTO])
        axis.set_xscale("log")
        axis.set_yscale("log")
        sizes = sorted({row.size for row in mine})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axis.set_xticks([], minor=True)
        axis.set_ylim(bottom=_below(mine))
        _plain(axis.yaxis)
        axis.set_xlabel("depth (hidden layers)" if what == "depth" else what)
        axis.set_title(", ".join(f"{name} {size}" for name, size in mine[0].extra["others"].items()), fontsize=10)
        corner = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "alignment": "left"}
        axis.legend(frameon=False, fontsize=9, title="time itself grows as", title_fontsize=9, **corner)
        _grid(axis, "both")
    figure.supylabel("time / time of a gradient")
    figure.suptitle("One estimate on a ReLU MLP as one size grows")
    return figure


def _handover(axis: Any, picked: list[Row]) -> None:
    """Where the choice for hidden layers goes from one set of estimators to another."""
    for last, first in itertools.pairwise(picked):
        before, after = (", ".join(row.extra["hidden"]) for row in (last, first))
        if before != after:
            between = (last.size * first.size) ** 0.5
            axis.axvline(between, color="0.4", linewidth=1, linestyle=":")
            text = f"hidden layers: {before} \N{RIGHTWARDS ARROW} {after}"
            place = axis.get_xaxis_transform()
            axis.annotate(text, (between, 0.94), xycoords=place, fontsize=8, xytext=(4, 0), textcoords="offset points")


def _below(rows: list[Row]) -> float:
    """Where a logarithmic axis begins: below the baseline and all that is cheaper."""
    return 0.8 * min(0.9, *(row.ratio.low for row in rows))


def _line(axis: Any, rows: list[Row], colour: str, label: str, **style: Any) -> None:
    sizes = [row.size for row in rows]
    axis.plot(sizes, [row.ratio.median for row in rows], color=colour, marker="o", markersize=4, label=label, **style)
    axis.fill_between(sizes, [r.ratio.low for r in rows], [r.ratio.high for r in rows], color=colour, alpha=0.18, lw=0)


def _plain(axis: Any) -> None:
    """Numbers, not powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axis.get_view_interval()
    short = high / max(low, 1e-9) < 30
    minor = FuncFormatter(lambda value, _: f"{value:g}" if str(value).strip("0.")[:1] in "2346" and short else "")
    axis.set_minor_formatter(minor if short else NullFormatter())
    axis.set_tick_params(which="both", labelsize=8)


def _grid(axis: Any, which: str) -> None:
    axis.grid(axis=which, alpha=0.3, linewidth=0.5)
    axis.set_axisbelow(True)
