"""Pictures of what was chosen; the only room that imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = {"I1": "#c44e52", "I2": "#4c72b0", "hutchinson": "#55a868", "exact": "#8172b3"}
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
