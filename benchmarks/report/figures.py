"""Pictures of a study: each returns a figure, or None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import REFERENCE
from benchmarks.report import styles
from benchmarks.report.statistics import FACTOR, Estimate, Profile
from benchmarks.report.study import LABELS, Study
from benchmarks.report.styles import grid, legend, plain
from benchmarks.runs import Run

HUGE = 1e300
"""What stands for infinite where something is interpolated."""

TARGET: dict[str, Any] = {"color": "0.3", "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}


def curves(study: Study, track: str, problem: str) -> Figure | None:
    """The validation metric over steps and over seconds: medians over seeds, and from the best to the worst."""
    found = {method: study.get(track, problem, method) for method in study.methods(track, problem)}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method, runs in found.items():
        for axis, measure in ((left, "step"), (right, "seconds")):
            _curve(axis, method, runs, measure)
    reached = study.targets[problem]
    target = None if reached is None else reached.metric
    for axis, label in ((left, "steps"), (right, "seconds of training")):
        if target is not None:
            axis.axhline(target, **TARGET)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, linewidth=0.5)
    left.set_xlim(left=0)
    right.set_xscale("log")  # some take twenty times as long as others
    plain(right.xaxis)
    _metric_axis(left, [run for runs in found.values() for run in runs], target)
    left.set_ylabel(f"validation {PROBLEMS[problem].metric}")
    figure.suptitle(f"{problem}, {LABELS[track]}")
    legend(figure, list(found), [Line2D([], [], label="target", **TARGET)] if target is not None else [])
    return figure


def _curve(axis: Axes, method: str, runs: Sequence[Run], measure: str) -> None:
    x, y = on_one_axis([getattr(run.curve, measure) for run in runs], [run.curve.valid_metric for run in runs])
    axis.plot(x, np.median(y, axis=0), **styles.line(method))
    if len(runs) > 1 and (METHODS[method].is_ours or method == REFERENCE):
        axis.fill_between(x, y.min(0), y.max(0), color=styles.colour(method), alpha=0.13, linewidth=0, zorder=2)


def on_one_axis(x: Sequence[Sequence[float]], y: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Curves at the same places, as far as half of them go; those that end early go on as they ended.

    Returns:
        The places, and a row of values for each curve, infinite where it diverged.
    """
    places = np.unique(np.concatenate(x))
    places = places[places <= np.median([values[-1] for values in x])]
    finite = [np.nan_to_num(values, nan=HUGE, posinf=HUGE) for values in y]
    found = np.array([np.interp(places, own, values) for own, values in zip(x, finite, strict=True)])
    return places, np.where(found > HUGE**0.5, np.inf, found)


def _metric_axis(axis: Axes, runs: Sequence[Run], target: float | None) -> None:
    """Logarithmic where that can be; without the first, steep part where it cannot."""
    values = np.array([v for run in runs for v in run.curve.valid_metric if np.isfinite(v)])
    if not len(values):
        return
    lowest = min(values.min(), values.min() if target is None else target)
    if lowest > 0:
        top = np.quantile(values, 0.98)
        axis.set_yscale("log")
        axis.set_ylim(lowest / 1.15, top * 1.3)
        plain(axis.yaxis)
        return
    top = np.quantile(values, 0.8)
    axis.set_ylim(lowest - 0.05 * (top - lowest), top)


# --- time to target ---


def speedups(study: Study, track: str) -> Figure | None:
    """AdamW's time and steps to target over each method's, by problem."""
    problems = [p for p in study.problems(track) if study.get(track, p, REFERENCE) and study.targets[p] is not None]
    methods = [name for name in study.methods(track) if name != REFERENCE]
    if not problems or not methods:
        return None
    figure, axes = grid(len(problems), 2.9, 0.26 * len(methods) + 0.7, sharey=True)
    for axis, problem in zip(axes, problems, strict=True):
        _speedup_panel(axis, study, track, problem, methods)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel(
        f"{REFERENCE}'s over the method's, 95% intervals (<: down to a miss): more than 1 is faster", fontsize=10
    )
    figure.suptitle(f"To the target, {LABELS[track]}")
    shapes = [("time", "o", "0.3"), ("steps", "o", "w"), ("missed", "x", "0.3")]
    handles = [
        Line2D([], [], marker=m, markerfacecolor=f, color="0.3", linestyle="", label=label) for label, m, f in shapes
    ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _speedup_panel(axis: Axes, study: Study, track: str, problem: str, methods: Sequence[str]) -> None:
    axis.set_xscale("log")
    axis.axvline(1, color="0.2", linewidth=1)
    axis.axvline(1.5, color="0.5", linewidth=0.8, linestyle=":")
    low, high = 0.4, 2.5
    for place, method in enumerate(methods):
        for measure, shift in (("seconds", -0.16), ("steps", 0.16)):
            found = study.speedup(track, problem, method, measure)
            if found is None or found.value == 0:
                continue
            low, high = (
                min(low, 0.8 * max(found.low, found.value / 2)),
                max(high, 1.25 * min(found.high, found.value * 2)),
            )
            _dot(axis, method, found, place + shift, filled=measure == "seconds")
    axis.set_xlim(low, high)
    for place, method in enumerate(methods):
        found = study.speedup(track, problem, method, "seconds")
        if study.get(track, problem, method) and (found is None or found.value == 0):
            axis.plot(0.04, place, "x", color=styles.colour(method), transform=axis.get_yaxis_transform(), markersize=7)
    axis.set_title(problem, fontsize=10)
    axis.grid(alpha=0.3, linewidth=0.5)
    plain(axis.xaxis)


def _dot(axis: Axes, method: str, found: Estimate, place: float, *, filled: bool) -> None:
    colour = styles.colour(method)
    width = 2.2 if filled else 1.1
    axis.plot([max(found.low, 1e-9), found.high], [place, place], color=colour, linewidth=width)
    if found.low == 0:  # some draws miss
        axis.plot(0.012, place, "<", color=colour, transform=axis.get_yaxis_transform(), markersize=3 + width)
    axis.plot(found.value, place, "o", color=colour, markerfacecolor=colour if filled else "w", markersize=5.5)


# --- profiles ---


def profiles(study: Study, tracks: Sequence[str] = ("final", "defaults")) -> Figure | None:
    """On what part of the problems each method is within a factor of the best."""
    panels = [
        (track, measure, study.profile(track, measure)[0]) for track in tracks for measure in ("seconds", "steps")
    ]
    found = [(track, measure, profile) for track, measure, profile in panels if profile is not None]
    if not found:
        return None
    figure, axes = grid(len(found), 4.6, 3.4, columns=2, sharey=True)
    for axis, (track, measure, profile) in zip(axes, found, strict=True):
        _profile_panel(axis, profile)
        axis.set_title(f"{'time' if measure == 'seconds' else 'steps'} to target, {LABELS[track]}", fontsize=10)
    figure.supxlabel("times the best method's", fontsize=10)
    figure.supylabel("part of the problems", fontsize=10)
    known = {method for _, _, profile in found for method in profile.areas}
    legend(figure, [method for method in METHODS if method in known])
    return figure


def _profile_panel(axis: Axes, profile: Profile) -> None:
    for method, ratios in profile.ratios.items():
        steps = sorted(ratio for ratio in ratios if ratio <= FACTOR)
        heights = [i / len(ratios) for i in range(len(steps) + 1)]
        axis.step([1, *steps, FACTOR], [*heights, heights[-1]], where="post", **styles.line(method))
    axis.set_xscale("log")
    axis.set_xlim(1, FACTOR)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.grid(alpha=0.3, linewidth=0.5)
