"""Full batches and a goal known in advance: a method without a learning rate against Adam's best one, and L-BFGS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.problems import PROBLEMS
from benchmarks.report.statistics import Estimate, inverse, needed, speedup
from benchmarks.report.study import Study
from benchmarks.report.tables import Table, counted, spread
from benchmarks.runs import Run

ADAMS = ("Adam", "AdamW")
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
        goal = _goal(problem)
        own, (rate, adam), newton = (
            _any_track(study, problem, method),
            best_rate(study, problem),
            _any_track(study, problem, NEWTON),
        )
        ratios = {}
        for measure, others in (("steps", adam), ("seconds", adam), ("gradients", newton)):
            if own and others:
                found = speedup(own, others, goal, measure)
                ratios[measure] = None if found is None else inverse(found)
        needs = {method: own, f"{adam[0].spec.method}, lr {rate:g}" if adam else "": adam, NEWTON: newton}
        return cls(problem, {name: runs for name, runs in needs.items() if runs}, ratios)


def best_rate(study: Study, problem: str) -> tuple[float, list[Run]]:
    """Adam's learning rate that reaches the goal in the fewest steps, or ends lowest if none does; and its runs."""
    by_rate: dict[float, list[Run]] = defaultdict(list)
    method = next((name for name in ADAMS if study.get("sensitivity", problem, name)), "")
    for run in study.get("sensitivity", problem, method):
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
    return Table(f"Full batch: {method} and others to the goal", columns, rows, f"Medians over {counted(seeds)}.")


def _need(runs: Sequence[Run], measure: str) -> str:
    estimate = needed(runs, _goal(runs[0].spec.problem), measure)
    return "miss" if estimate.value == float("inf") else spread(estimate)


def _any_track(study: Study, problem: str, method: str) -> list[Run]:
    """Runs of a method that has nothing to tune, wherever they are."""
    tracks = ("sensitivity", "defaults", "final")
    return next((found for track in tracks if (found := study.get(track, problem, method))), [])


def _goal(problem: str) -> float:
    goal = PROBLEMS[problem].goal
    assert goal is not None, f"{problem} has no goal"
    return goal
