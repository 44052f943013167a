"""More pictures: learning rates, estimators over layers and time, ablations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from benchmarks.problems import PROBLEMS
from benchmarks.report import styles
from benchmarks.report.ablations import Ablation
from benchmarks.report.statistics import Estimate
from benchmarks.report.study import Study
from benchmarks.report.styles import legend, plain
from benchmarks.runs import Run
from fishopt.plotting import COLOURS

# --- learning rates ---


def sensitivity(study: Study) -> Figure | None:
    """The final validation metric over the learning rate; below, the range that ends within 1% of the best."""
    problems, methods = study.swept, study.methods("sensitivity")
    if not problems:
        return None
    columns = min(len(problems), 4)
    rows, strip = -(-len(problems) // columns), 0.07 * len(methods) + 0.2
    figure = Figure(figsize=(3.4 * columns + 2, (2.6 + strip) * rows + 0.4), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.4, strip] * rows)
    for axis in axes.flat:
        axis.set_visible(False)
    for place, problem in enumerate(problems):
        row, column = 2 * (place // columns), place % columns
        _rates_panel(axes[row, column], axes[row + 1, column], study, problem, methods)
    figure.supxlabel("learning rate; bars: within 1% of the method's best", fontsize=10)
    figure.supylabel("final validation metric", fontsize=10)
    legend(figure, methods, points=True)
    return figure


def _rates_panel(above: Axes, below: Axes, study: Study, problem: str, methods: Sequence[str]) -> None:
    found = {m: _medians(study, problem, m) for m in methods if study.get("sensitivity", problem, m)}
    for method, points in found.items():
        above.plot(*points, marker=styles.marker(method), markersize=4, **styles.line(method))
    for place, method in enumerate(methods):
        _bar(below, study, problem, method, place)
    _metric_limits(above, np.concatenate([values for _, values in found.values()]))
    above.set_title(problem, fontsize=10)
    for axis in (above, below):
        axis.set_visible(True)
        axis.set_xscale("log")
        axis.grid(alpha=0.3, linewidth=0.5)
    below.sharex(above)
    above.tick_params(axis="x", labelbottom=False)
    below.set_yticks([])
    below.set_ylim(len(methods) - 0.3, -0.7)


def _medians(study: Study, problem: str, method: str) -> tuple[list[float], list[float]]:
    found = study.rates(problem, method)
    return list(found), [float(np.median(values)) for values in found.values()]


def _metric_limits(axis: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, top = values.min(), np.quantile(values, 0.8)
    if low > 0:
        axis.set_yscale("log")
        axis.set_ylim(low / max(top / low, 1.1) ** 0.06, max(top, 1.1 * low))
        plain(axis.yaxis)
    elif top > low:
        axis.set_ylim(low - 0.06 * (top - low), top)


def _bar(axis: Axes, study: Study, problem: str, method: str, place: int) -> None:
    good = study.good_rates(problem, method)
    if good is not None:
        ends = [good.low, good.high] if good.decades > 0.05 else [good.low / 1.05, good.low * 1.05]
        axis.plot(ends, [place, place], color=styles.colour(method), linewidth=4, solid_capstyle="butt")


# --- estimators ---


def estimators(study: Study, problem: str) -> Figure | None:
    """Which estimator each layer used, over time: one run of each of our methods."""
    found = dict(_chosen(study, problem))
    if not found:
        return None
    rows = max(len(run.choices[-1][1]) for run in found.values())
    figure = Figure(figsize=(3.6 * len(found) + 2, 0.24 * rows + 1.3), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, (method, run) in zip(axes, found.items(), strict=True):
        _map(axis, run)
        axis.set_title(f"{method}, seed {run.spec.seed}", fontsize=10)
        axis.set_xlabel("step, from 1", fontsize=9)
    used = {name for run in found.values() for _, choices in run.choices for name in choices.values()}
    handles = [Patch(color=_estimator_colour(name), label=name) for name in sorted(used)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _chosen(study: Study, problem: str) -> Iterator[tuple[str, Run]]:
    for track in ("final", "defaults"):
        ours = study.methods(track, problem)
        found = {m: runs[0] for m in ours if (runs := study.get(track, problem, m)) and runs[0].choices}
        if found:
            yield from found.items()
            return


def _map(axis: Axes, run: Run) -> None:
    groups = list(run.choices[-1][1])
    for row, group in enumerate(groups):
        for start, end, name in stretches(run, group):
            axis.barh(row, end - start, left=start, height=0.86, color=_estimator_colour(name))
            if np.log(end / start) > 0.04 * len(name) * np.log(run.curve.step[-1]):
                axis.text(np.sqrt(start * end), row, name, color="w", ha="center", va="center", fontsize=7.5)
    axis.set_xscale("log")
    axis.set_xlim(1, run.curve.step[-1] + 1)
    axis.set_yticks(range(len(groups)), groups, fontsize=8)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    plain(axis.xaxis)


def stretches(run: Run, group: str) -> list[tuple[int, int, str]]:
    """From which step (counted from 1) to before which one a group used which estimator."""
    changes: list[tuple[int, str]] = []
    for step, choices in run.choices:
        if group in choices and (not changes or changes[-1][1] != choices[group]):
            changes.append((step + 1, choices[group]))
    ends = [start for start, _ in changes[1:]] + [run.curve.step[-1] + 1]
    return [(start, end, name) for (start, name), end in zip(changes, ends, strict=True)]


def _estimator_colour(name: str) -> str:
    return COLOURS.get(name, styles.GREY)


# --- ablations ---


def ablation(study: Ablation) -> Figure:
    """The final metric of each variant, by problem, and steps to target where any arrives."""
    variants, problems = list(study.runs), list(study.targets)
    steps = {problem: [study.steps(variant, problem) for variant in variants] for problem in problems}
    arrives = any(e is not None and np.isfinite(e.value) for found in steps.values() for e in found)
    rows = 1 + arrives
    figure = Figure(figsize=(2.9 * len(problems) + 2, rows * (0.26 * len(variants) + 0.9)), layout="constrained")
    axes = figure.subplots(rows, len(problems), squeeze=False, sharey=True)
    for column, problem in enumerate(problems):
        axes[0, column].set_title(problem, fontsize=10)
        axes[0, column].set_xlabel(f"final validation {PROBLEMS[problem].metric}", fontsize=9)
        _dots(axes[0, column], [study.metric(variant, problem) for variant in variants])
        if arrives:
            axes[1, column].set_xlabel("steps to target", fontsize=9)
            _dots(axes[1, column], steps[problem])
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(variants)), variants, fontsize=8)
        axis.set_ylim(len(variants) - 0.4, -0.6)
    figure.suptitle(f"{study.name} ({study.common})" if study.common else study.name, fontsize=10)
    return figure


def _dots(axis: Axes, found: Sequence[Estimate | None]) -> None:
    known = [(place, e) for place, e in enumerate(found) if e is not None]
    finite = [e.value for _, e in known if np.isfinite(e.value)]
    for place, estimate in known:
        if not np.isfinite(estimate.value):
            axis.plot(0.97, place, "x", color=styles.GREY, transform=axis.get_yaxis_transform())
            continue
        best = estimate.value == min(finite)
        colour = "#0072b2" if best else "0.45"
        high = estimate.high if np.isfinite(estimate.high) else 1.1 * max(finite)
        axis.plot([estimate.low, high], [place, place], color=colour, linewidth=1.6)
        axis.plot(estimate.value, place, "o", color=colour, markersize=5.5)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(axis="x", labelsize=8, labelbottom=bool(finite))
    axis.grid(alpha=0.3, linewidth=0.5)
