"""What runs needed for a target, and how methods compare in that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.protocol import Target
from benchmarks.report.statistics import Estimate
from benchmarks.runs import Run


@dataclass(frozen=True)
class Reach:
    """What a run needed to reach a target; all infinite if it missed it."""

    steps: float
    gradients: float
    seconds: float

    @property
    def is_miss(self) -> bool:
        """Whether it did not."""
        return math.isinf(self.steps)


MISS = Reach(math.inf, math.inf, math.inf)


def reach(run: Run, target: float) -> Reach:
    """What a run needed, as of the first evaluation that reached the target."""
    index = run.first(target)
    return MISS if index is None else _at(run, index)


def _at(run: Run, index: int) -> Reach:
    return Reach(run.curve.step[index], run.curve.gradients[index], run.curve.seconds[index])


def needed(runs: Sequence[Run], target: Target, measure: str) -> Estimate:
    """The median over seeds of steps, gradients or seconds to the target; infinite if most seeds missed it."""
    target = target.varying(run.spec.seed for run in runs)

    def of(rows: np.ndarray) -> float:
        return float(np.median([getattr(one, measure) for one in _reached(runs, rows, target)]))

    return Estimate.of(of, len(runs), runs[0].spec.problem)


def speedup(runs: Sequence[Run], others: Sequence[Run], target: Target, measure: str) -> Estimate | None:
    """How many times less a method needs than another one, by seeds that both have.

    Where the other one missed, all that it used counts, so that the ratio is at least this. A seed on which both missed
    says nothing; a method that missed on most seeds has a ratio of 0, unless the other one did so, too. Each draw of
    seeds has the target that those seeds would have set; one in which both missed counts as no difference.

    Returns:
        The median over seeds, or None where there is nothing to compare.
    """
    pairs = paired(runs, others)
    ours, theirs = [run for run, _ in pairs], [run for _, run in pairs]
    target = target.varying(run.spec.seed for run in ours)
    if not pairs or math.isnan(_ratio(ours, theirs, np.arange(len(pairs)), target, measure)):
        return None

    def of(rows: np.ndarray) -> float:
        ratio = _ratio(ours, theirs, rows, target, measure)
        return 1.0 if math.isnan(ratio) else ratio

    return Estimate.of(of, len(pairs), runs[0].spec.problem)


def paired(runs: Sequence[Run], others: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of the same seeds, which have the same weights and batches."""
    by_seed = {run.spec.seed: run for run in others}
    return [(run, by_seed[run.spec.seed]) for run in runs if run.spec.seed in by_seed]


def _ratio(runs: Sequence[Run], others: Sequence[Run], rows: np.ndarray, target: Target, measure: str) -> float:
    """The median over some seeds; not a number where both mostly missed."""
    ours, theirs = _reached(runs, rows, target), _reached(others, rows, target)
    if _mostly_missed(ours):
        return math.nan if _mostly_missed(theirs) else 0.0
    return float(
        np.median(
            [
                getattr(_at(others[row], -1) if its.is_miss else its, measure) / getattr(own, measure)
                for row, own, its in zip(rows, ours, theirs, strict=True)
                if not (own.is_miss and its.is_miss)
            ]
        )
    )


def _reached(runs: Sequence[Run], rows: np.ndarray, target: Target) -> list[Reach]:
    metric = target.of(runs[row].spec.seed for row in rows)
    return [reach(runs[row], metric) for row in rows]


def _mostly_missed(found: Sequence[Reach]) -> bool:
    return bool(np.isinf(np.median([one.steps for one in found])))
