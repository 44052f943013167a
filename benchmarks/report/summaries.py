"""Tables of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import REFERENCE
from benchmarks.report.reaching import reach
from benchmarks.report.statistics import FACTOR, Estimate, Profile
from benchmarks.report.study import LABELS, Study
from benchmarks.report.tables import Strong, Table, counted, number, percent, spread
from benchmarks.report.targets import width_ratio

MEASURES = {"seconds": "time", "steps": "steps", "gradients": "gradient evaluations"}


def speedups(study: Study, track: str, measure: str, only: Sequence[str] = tuple(METHODS)) -> Table:
    """How many times less each method needs to the target than AdamW."""
    methods = [name for name in only if name != REFERENCE and name in study.methods(track)]
    problems = [name for name in study.problems(track) if study.get(track, name, REFERENCE)]
    rows = [[p, *(_speedup(study, track, p, m, measure) for m in methods)] for p in problems]
    note = (
        f"{REFERENCE}'s {MEASURES[measure]} to the target over the method's, median over {seeds(study, track)}; more "
        f"than 1 is faster. A miss is given with the seeds that hit. Where {REFERENCE} misses, its whole budget "
        "counts. Strong: 1.5 or more."
    )
    return Table(f"{MEASURES[measure].capitalize()} to target, {LABELS[track]}", ["problem", *methods], rows, note)


def _speedup(study: Study, track: str, problem: str, method: str, measure: str) -> str:
    runs, target = study.get(track, problem, method), study.targets[problem]
    if not runs or target is None:
        return "-"
    found = study.speedup(track, problem, method, measure)
    if found is None or found.value == 0:
        return _hits(study, track, problem, method)
    return Strong(spread(found)) if found.value >= 1.5 else spread(found)


def _hits(study: Study, track: str, problem: str, method: str) -> str:
    runs, target = study.get(track, problem, method), study.targets[problem]
    assert target is not None
    hits = sum(not reach(run, target.metric).is_miss for run in runs)
    return f"miss ({hits} of {len(runs)})"


def paces(study: Study, track: str, only: Sequence[str] = tuple(METHODS)) -> Table:
    """What a step of each method takes."""
    methods = [name for name in only if name != REFERENCE and name in study.methods(track)]
    problems = [name for name in study.problems(track) if study.get(track, name, REFERENCE)]
    rows = [[p, *(spread(study.pace(track, p, m)) for m in methods)] for p in problems]
    note = f"Time of a step, refreshes included, over {REFERENCE}'s; median over {seeds(study, track)}."
    return Table(f"Time of a step, {LABELS[track]}", ["problem", *methods], rows, note)


def metrics(study: Study, track: str, only: Sequence[str] = tuple(METHODS)) -> Table:
    """The final test metric, where there is no goal at which training ends."""
    methods = [name for name in only if name in study.methods(track)]
    rows = []
    for problem in (name for name in study.problems(track) if not PROBLEMS[name].has_goal):
        found = {m: study.test(track, problem, m) for m in methods}
        values = {m: e.value for m, e in found.items() if e is not None and not METHODS[m].is_matrix}
        best = {m for m, value in values.items() if value == min(values.values())}
        show = shown(problem)
        rows.append([problem, *(Strong(show(found[m])) if m in best else show(found[m]) for m in methods)])
    note = f"Error rate in percent, or loss; median over {seeds(study, track)}. Strong: the best but matrix methods."
    return Table(f"Final test metric, {LABELS[track]}", ["problem", *methods], rows, note)


def shown(problem: str) -> Callable[[Estimate | None], str]:
    """How a problem's metric is written."""
    return percent if PROBLEMS[problem].is_classification else partial(spread, digits=4)


def profile(study: Study, track: str) -> Table:
    """Scores of the performance profiles."""
    (by_time, left_out), (by_steps, _) = study.profile(track, "seconds"), study.profile(track, "steps")
    columns = ["method", "score, time", "place", "score, steps", "best on", "within 2x", "misses"]
    rows = []
    if by_time is not None and by_steps is not None:
        order = sorted(by_time.areas, key=lambda m: by_time.ranks[m].value)
        rows = [_profile_row(m, by_time, by_steps) for m in order]
    note = (
        f"Of time to target. The score is the area under the profile up to {FACTOR:g} times the best, 1 for a method "
        f"that is best everywhere; {seeds(study, track)}."
    )
    if left_out and rows:
        note += f" Not run on every problem, so not here: {', '.join(left_out)}."
    return Table(f"Performance profile, {LABELS[track]}", columns, rows, note)


def _profile_row(method: str, by_time: Profile, by_steps: Profile) -> list[str]:
    ratios = np.array(by_time.ratios[method])
    misses = f"{np.isinf(ratios).sum()} of {len(ratios)}"
    parts = [f"{100 * by_time.within(method, factor):.0f}%" for factor in (1, 2)]
    scores = spread(by_time.areas[method]), spread(by_time.ranks[method]), spread(by_steps.areas[method])
    return [method, *scores, *parts, misses]


def widths(study: Study) -> Table:
    """How robust each method is to its learning rate."""
    methods = study.methods("sensitivity")
    ours = study.ours("sensitivity")
    columns = ["problem", "seeds", *methods, *(f"{name} / {REFERENCE}" for name in ours)]
    rows = []
    for problem in study.swept:
        cells = [_width(study, problem, method) for method in methods]
        tried = counted(len(values) for m in methods for values in study.rates(problem, m).values())
        rows.append([problem, tried, *cells, *(spread(width_ratio(study, name, problem)) for name in ours)])
    note = (
        "Decades of learning rates, around the best one, that end within 1% of it on validation: 0.99 times its "
        "accuracy, or 1.01 times its loss; linear in the logarithm of the rate between two of the nine. +: up to an "
        "end of the grid, and maybe beyond, so that a ratio to it is at most what is given. Not here: what has a goal, "
        f"and Poisson's loss, which has no zero. Of medians over {rate_seeds(study)}."
    )
    return Table("Width of the range of good learning rates", columns, rows, note)


def rate_seeds(study: Study) -> str:
    """How many seeds each learning rate has."""
    keys = [key[1:] for key in study.runs if key[0] == "sensitivity"]
    return counted(len(values) for key in keys for values in study.rates(*key).values())


def _width(study: Study, problem: str, method: str) -> str:
    found = study.good_rates(problem, method)
    return spread(study.width(problem, method)) + ("+" if found is not None and found.is_open else "")


def problems(study: Study) -> Table:
    """What was trained, for how long, and what there was to reach."""
    columns = ["problem", "what it is", "steps", "batch", "validation in training, at most", "target"]
    rows = []
    for name, target in study.targets.items():
        problem = PROBLEMS[name]
        batch, most = "all" if problem.batch is None else str(problem.batch), str(problem.most)
        goal = "-" if target is None else number(target.metric)
        rows.append([name, problem.about.rstrip("."), str(problem.steps), batch, most, goal])
    note = (
        "The target is on the examples of validation that are looked at in training; trials are chosen on all of them."
    )
    return Table("Problems", columns, rows, note)


def of_problem(study: Study, track: str, problem: str) -> Table:
    """All about one problem."""
    rows = [_method_row(study, track, problem, method) for method in study.methods(track, problem)]
    target = study.targets[problem]
    to = "no target yet" if target is None else f"target {number(target.metric)}"
    columns = [
        "method", "hits", "steps", "gradients", "seconds", f"time, {REFERENCE}'s over its", "test metric", "test loss",
        "curvature", "configuration",
    ]  # fmt: skip
    about = PROBLEMS[problem].about.rstrip(".")
    note = (
        f"{about}. Steps, gradients, seconds: to {to}, on validation. {_several(study, track, problem).capitalize()}. "
        "Gradients are the loss's; what curvature takes besides is in the seconds."
    )
    return Table(f"{problem}, {LABELS[track]}", columns, rows, note)


def _method_row(study: Study, track: str, problem: str, method: str) -> list[str]:
    runs, target = study.get(track, problem, method), study.targets[problem]
    hits, needs = "-", ["-"] * 3
    if target is not None:
        found = [study.need(track, problem, method, measure) for measure in ("steps", "gradients", "seconds")]
        hits = f"{sum(not reach(run, target.metric).is_miss for run in runs)} of {len(runs)}"
        needs = ["miss" if e is not None and np.isinf(e.value) else spread(e) for e in found]
    ratio = "1" if method == REFERENCE else _speedup(study, track, problem, method, "seconds")
    loss = Estimate.median([float("inf") if run.diverged else run.final["test_loss"] for run in runs], problem)
    share = f"{100 * np.median([run.curvature_share for run in runs]):.0f}%" if METHODS[method].is_ours else "-"
    test = shown(problem)(study.test(track, problem, method))
    return [method, hits, *needs, ratio, test, spread(loss, 4), share, configuration(runs[0].spec.config)]


def configuration(config: dict[str, Any]) -> str:
    """Arguments, as text."""
    values = ((k, f"{v:g}" if isinstance(v, float) else v) for k, v in config.items())
    return ", ".join(f"{key}={value}" for key, value in values) or "defaults"


def seeds(study: Study, track: str) -> str:
    """How many seeds there are."""
    return counted(len(runs) for (found, _, _), runs in study.runs.items() if found == track)


def all_seeds(study: Study) -> str:
    """The same of all tracks, in a sentence."""
    return (
        f"Tuned: {seeds(study, 'final')}; at defaults: {seeds(study, 'defaults')}; learning rates: {rate_seeds(study)}."
    )


def _several(study: Study, track: str, problem: str) -> str:
    return counted(len(study.get(track, problem, m)) for m in study.methods(track, problem))


def environments(study: Study) -> Table:
    """What the runs ran on."""
    names = ("torch", "python", "fishopt", "sources", "threads", "machine")
    found = Counter(tuple(str(run.environment.get(name, "-")) for name in names) for run in _all(study))
    rows = [[*values, str(count)] for values, count in found.most_common()]
    return Table("Environment", [*names, "runs"], rows, "Sources: a digest of fishopt's. Threads: of each run.")


def counts(study: Study) -> Table:
    """How many runs of what."""
    rows = []
    for track in dict.fromkeys(track for track, _, _ in study.runs):
        runs = [run for (found, _, _), some in study.runs.items() if found == track for run in some]
        diverged = sum(run.diverged for run in runs)
        found = (some for (name, _, _), some in study.runs.items() if name == track)
        distinct = counted(len({run.spec.seed for run in some}) for some in found)
        numbers = len(study.problems(track)), len(study.methods(track)), len(runs), diverged
        rows.append([track, distinct, *map(str, numbers)])
    note = f"{study.left_out} runs are left out: not of today's problems, methods, budgets or tuned configurations."
    columns = ["track", "seeds", "problems", "methods", "runs", "diverged"]
    return Table("Runs", columns, rows, note if study.left_out else "")


def _all(study: Study) -> Iterable[Any]:
    return (run for runs in study.runs.values() for run in runs)
