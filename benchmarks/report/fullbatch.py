"""Full batches and a goal known in advance: a method without a learning rate against Adam's best one, and L-BFGS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.problems import PROBLEMS
from benchmarks.protocol import REFERENCE, Target
from benchmarks.report.reaching import needed, speedup
from benchmarks.report.statistics import Estimate, inverse
from benchmarks.report.study import Study
from benchmarks.report.tables import Table, counted, spread
from benchmarks.runs import Run

NEWTON = "L-BFGS"


@dataclass(frozen=True)
class Comparison:
    """On one problem.

    Attributes:
        problem: Which.
        needs: Who, in words -> runs.
        ratios: ``"steps"`` and ``"seconds"`` over Adam's at its best learning rate, ``"gradients"`` over L-BFGS's;
            without those that there are no runs for, None where both missed.
    """

    problem: str
    needs: dict[str, Sequence[Run]]
    ratios: dict[str, Estimate | None]

    @classmethod
    def of(cls, study: Study, problem: str, method: str) -> Comparison:
        """Against whatever has run."""
        goal, (rate, adam) = _goal(problem), best_rate(study, problem)
        own, newton = study.get("goals", problem, method), study.get("goals", problem, NEWTON)
        ratios = {}
        for measure, others in (("steps", adam), ("seconds", adam), ("gradients", newton)):
            if own and others:
                found = speedup(own, others, goal, measure)
                ratios[measure] = None if found is None else inverse(found)
        needs = {method: own, f"{REFERENCE}, lr {rate:g}": adam, NEWTON: newton}
        return cls(problem, {name: runs for name, runs in needs.items() if runs}, ratios)


def best_rate(study: Study, problem: str) -> tuple[float, list[Run]]:
    """Adam's learning rate that reaches the goal in the fewest steps, or ends lowest if none does; and its runs."""
    by_rate: dict[float, list[Run]] = defaultdict(list)
    for run in study.get("goals", problem, REFERENCE):
        by_rate[run.spec.config["lr"]].append(run)
    if not by_rate:
        return 0.0, []

    def order(rate: float) -> tuple[float, float]:
        runs = by_rate[rate]
        return needed(runs, _goal(problem), "steps").value, Estimate.median([run.metric for run in runs]).value

    best = min(by_rate, key=order)
    return best, by_rate[best]


def table(study: Study, method: str) -> Table:
    """What each needed to the goal."""
    columns = ["problem", "method", "steps", "gradient evaluations", "seconds", "final training loss"]
    rows, seeds = [], []
    for problem in (name for name in study.targets if PROBLEMS[name].has_goal):
        for name, runs in Comparison.of(study, problem, method).needs.items():
            needs = [_need(runs, measure) for measure in ("steps", "gradients", "seconds")]
            last = Estimate.median([run.curve.train_loss[-1] for run in runs], problem)
            rows.append([problem, name, *needs, spread(last)])
            seeds.append(len(runs))
    note = (
        f"Medians over {counted(seeds)}. {method} also takes two products with the Jacobian and at least one "
        "more loss in each step, which the seconds tell and the gradients do not."
    )
    return Table(f"Full batch: {method} and others to the goal", columns, rows, note)


def _need(runs: Sequence[Run], measure: str) -> str:
    estimate = needed(runs, _goal(runs[0].spec.problem), measure)
    return "miss" if estimate.value == float("inf") else spread(estimate)


def _goal(problem: str) -> Target:
    goal = PROBLEMS[problem].goal
    assert goal is not None, f"{problem} has no goal"
    return Target(goal)
