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
from benchmarks.report.styles import grid, legend, plain
from benchmarks.runs import Run
from fishopt.plotting import COLOURS

# --- learning rates ---


def sensitivity(study: Study) -> Figure | None:
    """The final validation metric over the learning rate, and the range that ends within 1% of the best."""
    problems, methods = study.problems("sensitivity"), study.methods("sensitivity")
    if not problems:
        return None
    figure, axes = grid(len(problems), 3.4, 2.9)
    for axis, problem in zip(axes, problems, strict=True):
        found = [method for method in methods if study.get("sensitivity", problem, method)]
        for method in found:
            axis.plot(
                *_medians(study, problem, method), marker=styles.marker(method), markersize=4, **styles.line(method)
            )
        _frame(axis, study, problem, found)
        axis.set_title(problem, fontsize=10)
    figure.supxlabel("learning rate; bars below: within 1% of the method's best", fontsize=10)
    figure.supylabel("final validation metric", fontsize=10)
    legend(figure, methods, points=True)
    return figure


def _medians(study: Study, problem: str, method: str) -> tuple[list[float], list[float]]:
    by_seed = study.rates(problem, method)
    rates = sorted(set.intersection(*(set(metrics) for metrics in by_seed.values())))
    return rates, [float(np.median([metrics[rate] for metrics in by_seed.values()])) for rate in rates]


def _frame(axis: Axes, study: Study, problem: str, methods: Sequence[str]) -> None:
    """Limits that leave room for the bars, and the bars."""
    values = np.concatenate([_medians(study, problem, method)[1] for method in methods])
    values = values[np.isfinite(values)]
    low, top = values.min(), np.quantile(values, 0.8)
    axis.set_xscale("log")
    room = 0.08 * len(methods)
    if low > 0:
        axis.set_yscale("log")
        ratio = max(top / low, 1.2)
        axis.set_ylim(low * ratio**-room / 1.05, low * ratio**1.1)
        plain(axis.yaxis)
    else:
        span = top - low
        axis.set_ylim(low - room * span, top + 0.1 * span)
    for place, method in enumerate(methods):
        _bar(axis, study, problem, method, 0.03 + 0.045 * place)
    axis.grid(alpha=0.3, linewidth=0.5)


def _bar(axis: Axes, study: Study, problem: str, method: str, height: float) -> None:
    for good in study.ranges(problem, method).values():
        if good is not None:
            ends = [good.low, good.high] if good.decades else [good.low * 0.95, good.low * 1.05]
            transform, colour = axis.get_xaxis_transform(), styles.colour(method)
            axis.plot(
                ends, [height] * 2, color=colour, transform=transform, linewidth=4, alpha=0.6, solid_capstyle="butt"
            )


# --- estimators ---


def estimators(study: Study, method: str) -> Figure | None:
    """Which estimator each layer used, over time: of one seed on each problem."""
    found = dict(_chosen(study, method))
    if not found:
        return None
    rows = [len(run.choices[-1][1]) for run in found.values()]
    figure = Figure(figsize=(10, 0.24 * sum(rows) + 0.75 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=[count + 1 for count in rows])[:, 0]
    for axis, (problem, run) in zip(axes, found.items(), strict=True):
        _map(axis, run)
        axis.set_title(f"{problem}, seed {run.spec.seed}", fontsize=10, loc="left")
    used = {name for run in found.values() for _, choices in run.choices for name in choices.values()}
    handles = [Patch(color=_estimator_colour(name), label=name) for name in sorted(used)]
    figure.legend(handles=handles, loc="outside upper right", frameon=False, ncols=len(handles), fontsize=9)
    axes[-1].set_xlabel("step, from 1")
    return figure


def _chosen(study: Study, method: str) -> Iterator[tuple[str, Run]]:
    for problem in study.targets:
        runs = study.get("final", problem, method) or study.get("defaults", problem, method)
        if runs and runs[0].choices:
            yield problem, runs[0]


def _map(axis: Axes, run: Run) -> None:
    groups = list(run.choices[-1][1])
    for row, group in enumerate(groups):
        for start, end, name in stretches(run, group):
            axis.barh(row, end - start, left=start, height=0.86, color=_estimator_colour(name))
            if np.log(end / start) > 0.08 * np.log(run.spec.steps):
                centre = np.sqrt(start * end)
                axis.text(centre, row, name, color="w", ha="center", va="center", fontsize=7.5)
    axis.set_xscale("log")
    axis.set_xlim(1, run.spec.steps + 1)
    axis.set_yticks(range(len(groups)), groups, fontsize=8)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    plain(axis.xaxis)


def stretches(run: Run, group: str) -> list[tuple[int, int, str]]:
    """From which step (counted from 1) to before which one a group used which estimator."""
    changes: list[tuple[int, str]] = []
    for step, choices in run.choices:
        if group in choices and (not changes or changes[-1][1] != choices[group]):
            changes.append((step + 1, choices[group]))
    ends = [start for start, _ in changes[1:]] + [run.spec.steps + 1]
    return [(start, end, name) for (start, name), end in zip(changes, ends, strict=True)]


def _estimator_colour(name: str) -> str:
    return COLOURS.get(name, styles.GREY)


# --- ablations ---


def ablation(study: Ablation) -> Figure:
    """Final metric and steps to target of each variant, by problem."""
    variants, problems = list(study.runs), list(study.targets)
    height = 2 * (0.26 * len(variants) + 0.7) + 0.4
    figure = Figure(figsize=(2.9 * len(problems) + 2, height), layout="constrained")
    upper, lower = figure.subplots(2, len(problems), squeeze=False, sharey=True)
    for above, below, problem in zip(upper, lower, problems, strict=True):
        is_classification = PROBLEMS[problem].is_classification
        _dots(above, [study.metric(variant, problem) for variant in variants])
        _dots(below, [study.steps(variant, problem) for variant in variants])
        above.set_title(problem, fontsize=10)
        above.set_xlabel(f"final validation {'error rate' if is_classification else 'loss'}", fontsize=9)
        below.set_xlabel("steps to target", fontsize=9)
    for axis in (upper[0], lower[0]):
        axis.set_yticks(range(len(variants)), variants, fontsize=8)
        axis.set_ylim(len(variants) - 0.4, -0.6)
    figure.suptitle(f"{study.name} ({study.common})", fontsize=10)
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
