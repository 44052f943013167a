"""The targets that were set in advance, on whatever has run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import REFERENCE, fit_for
from benchmarks.report.checks import Check, Over, constant
from benchmarks.report.fullbatch import Comparison
from benchmarks.report.statistics import Estimate, combined, inverse
from benchmarks.report.study import Study

RIVAL = "Schedule-Free AdamW"

FASTER = f"time to target: 1.5x faster than tuned {REFERENCE} on half of the problems"
SLOWER = f"time to target: never below 0.9x of tuned {REFERENCE}"
STEPS = f"steps to target: no more than {RIVAL}'s on any problem (ratio)"
METRIC = "final test metric: within seed noise of all of others' but matrix methods that have run, on every problem"
WIDTH = f"learning rates within 1% of the best: twice as wide (in decades) as {REFERENCE}'s on 5 problems"
AUTO_STEPS = "full batch, no learning rate: steps to 1e-5 at most 0.33 of Adam's at its best rate of 9"
AUTO_TIME = "full batch, no learning rate: time at most 0.8 of the same"
AUTO_GRADIENTS = "full batch, no learning rate: fewer gradient evaluations than L-BFGS (ratio)"
NO_MISS = "defaults: problems on which the target is missed, none"
FIRST = "defaults: place in the performance profile of time to target, the first"

AUTO = ((AUTO_STEPS, "steps", 0.33), (AUTO_TIME, "seconds", 0.8), (AUTO_GRADIENTS, "gradients", 1.0))

TARGETS = (FASTER, SLOWER, STEPS, METRIC, WIDTH, AUTO_STEPS, AUTO_TIME, AUTO_GRADIENTS, NO_MISS, FIRST)


def checks(study: Study) -> list[Check]:
    """Every target for every method of ours that has run; one without a method where none has."""
    found = [check for make in (_time, _steps, _metric, _width, _full_batch, _defaults) for check in make(study)]
    measured = [check for check in found if check.value is not None]
    missing = [Check(target) for target in TARGETS if not any(check.target == target for check in measured)]
    return sorted([*measured, *missing], key=lambda check: TARGETS.index(check.target))


def _over(
    study: Study, track: str, problems: list[str], method: str, than: str, value: Callable[[str], Estimate | None]
) -> Over:
    """Of those problems on which the other method has run."""
    there = [problem for problem in problems if study.get(track, problem, than)]
    return Over({p: value(p) for p in there if study.get(track, p, method)}, len(there))


def _time(study: Study) -> Iterator[Check]:
    for method in study.ours("final"):
        over = _over(study, "final", study.problems("final"), method, REFERENCE, partial(_speed, study, method))
        yield over.count(Check(FASTER, method, bar=over.of / 2), lambda x: x >= 1.5)
        yield over.worst(Check(SLOWER, method, bar=0.9))


def _speed(study: Study, method: str, problem: str) -> Estimate | None:
    return study.speedup("final", problem, method, "seconds")


def _steps_ratio(study: Study, method: str, problem: str) -> Estimate | None:
    found = study.speedup("final", problem, method, "steps", than=RIVAL)
    return None if found is None else inverse(found)


def _steps(study: Study) -> Iterator[Check]:
    for method in study.ours("final"):
        over = _over(study, "final", study.problems("final"), method, RIVAL, partial(_steps_ratio, study, method))
        yield over.worst(Check(STEPS, method, bar=1.0, at_least=False))


def rivals(study: Study, problem: str) -> dict[str, Estimate]:
    """Method -> final test metric, tuned, of others' methods but matrix methods."""
    names = [m for m in study.methods("final", problem) if not (METHODS[m].is_ours or METHODS[m].is_matrix)]
    found = {name: study.test("final", problem, name) for name in names}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def is_within_noise(study: Study, problem: str, method: str, others: Iterable[str]) -> bool:
    """Whether it may be, on other seeds, that a metric is no worse than any of others'.

    Than any, not the best one alone: the best by its median may be the one with the most noise. The same seeds of both
    are compared, which have the same weights and batches.
    """
    excesses = (study.excess("final", problem, method, other) for other in others)
    return not any(excess is not None and excess.low > 0 for excess in excesses)


def _metric(study: Study) -> Iterator[Check]:
    problems = {p: found for p in study.problems("final") if not PROBLEMS[p].has_goal and (found := rivals(study, p))}
    for method in study.ours("final"):
        own = {p: estimate for p in problems if (estimate := study.test("final", p, method))}
        if own:
            bad = [p for p in own if not is_within_noise(study, p, method, problems[p])]
            remark = f" of {len(own)} problems" + (f"; not on {', '.join(bad)}" if bad else "")
            count = constant(len(own) - len(bad), min(e.seeds for e in own.values()))
            check = Check(METRIC, method, count, len(own), is_drawn=False)
            yield replace(check, remark=remark, tried=len(own), of=len(problems))


def width_ratio(study: Study, method: str, problem: str) -> Estimate | None:
    """How much wider the range of good learning rates is than AdamW's; as wide, if both are single rates."""
    ours, theirs = study.width(problem, method), study.width(problem, REFERENCE)
    if ours is None or theirs is None:
        return None
    return combined([ours, theirs], lambda x: np.where(x[0] == x[1], 1.0, x[0] / np.where(x[0] == x[1], 1.0, x[1])))


def _width(study: Study) -> Iterator[Check]:
    for method in study.ours("sensitivity"):
        over = _over(study, "sensitivity", study.swept, method, REFERENCE, partial(width_ratio, study, method))
        yield Over(over.found, max(over.of, 5)).count(Check(WIDTH, method, bar=5), lambda x: x >= 2)


def _full_batch(study: Study) -> Iterator[Check]:
    goals = [name for name, problem in PROBLEMS.items() if problem.has_goal]
    for method in (name for name, known in METHODS.items() if known.is_ours and "auto" in name):
        found = [Comparison.of(study, problem, method) for problem in goals]
        for target, name, bar in AUTO:
            ratios = {c.problem: c.ratios[name] for c in found if name in c.ratios}
            yield Over(ratios, len(goals)).worst(Check(target, method, bar=bar, at_least=False))


def _defaults(study: Study) -> Iterator[Check]:
    problems = [p for p in study.problems("defaults") if study.targets[p] is not None]
    profile, absent = study.profile("defaults", "seconds")
    # L-BFGS cannot run everywhere.
    absent = [name for name in absent if all(fit_for(problem, [name]) for problem in problems)]
    for method in study.ours("defaults"):
        needs = {p: e for p in problems if (e := study.need("defaults", p, method, "steps"))}
        if needs:
            missed = [p for p, e in needs.items() if np.isinf(e.value)]
            value = combined(list(needs.values()), lambda x: np.isinf(x).sum(0))
            remark = f" of {len(needs)} problems" + (f": {', '.join(missed)}" if missed else "")
            yield Check(NO_MISS, method, value, 0, at_least=False, remark=remark, tried=len(needs), of=len(problems))
        if profile is not None and method in profile.ranks:
            ran, of = len(profile.ranks), len(profile.ranks) + len(absent)
            remark = f" of the {ran} that ran on every problem"
            yield Check(FIRST, method, profile.ranks[method], 1, at_least=False, remark=remark, tried=ran, of=of)
