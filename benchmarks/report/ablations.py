"""What each part is worth: variants of a method side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.protocol import Target
from benchmarks.report.reaching import needed, reach
from benchmarks.report.statistics import Estimate
from benchmarks.report.study import Study
from benchmarks.report.summaries import configuration, shown
from benchmarks.report.tables import Strong, Table, counted, spread
from benchmarks.runs import Run


@dataclass(frozen=True)
class Ablation:
    """One of them.

    Attributes:
        name: Without ``"ablate-"``.
        common: What all variants share, in words.
        runs: Variant -> problem -> runs.
        targets: Problem -> tuned AdamW's target, or else the best variant's median.
    """

    name: str
    common: str
    runs: dict[str, dict[str, list[Run]]]
    targets: dict[str, Target]

    @classmethod
    def of(cls, study: Study, track: str) -> Ablation:
        """The runs of a track, by what differs in them."""
        runs = [run for (found, _, _), some in study.runs.items() if found == track for run in some]
        arguments = [{"method": run.spec.method, **run.spec.config} for run in runs]
        same = {k: v for k, v in arguments[0].items() if all(k in other and other[k] == v for other in arguments)}
        found: dict[str, dict[str, list[Run]]] = {}
        for run, given in sorted(zip(runs, arguments, strict=True), key=lambda pair: _order(pair[1])):
            variant = _name({k: v for k, v in given.items() if k not in same})
            found.setdefault(variant, {}).setdefault(run.spec.problem, []).append(run)
        targets = {problem: _target(study, problem, found) for problem in study.problems(track)}
        return cls(track.removeprefix("ablate-"), _name(same), found, targets)

    def metric(self, variant: str, problem: str) -> Estimate | None:
        """The final validation metric."""
        runs = self.runs[variant].get(problem)
        return Estimate.median([run.metric for run in runs], problem) if runs else None

    def steps(self, variant: str, problem: str) -> Estimate | None:
        """To the target."""
        runs = self.runs[variant].get(problem)
        return needed(runs, self.targets[problem], "steps") if runs else None

    def tables(self) -> list[Table]:
        """Of metrics, and of steps."""
        head, problems = f"Ablation: {self.name}", list(self.targets)
        number = counted(len(runs) for found in self.runs.values() for runs in found.values())
        metrics, steps = [], []
        for variant in self.runs:
            metrics.append([variant, *(self._metric(variant, problem) for problem in problems)])
            steps.append([variant, *(self._steps(variant, problem) for problem in problems)])
        columns = ["variant", *problems]
        shared = f"All: {self.common}. " if self.common else ""
        return [
            Table(f"{head}, final validation metric", columns, metrics, f"{shared}{number}. Strong: the best."),
            Table(
                f"{head}, steps to target",
                columns,
                steps,
                f"Of tuned AdamW, or else of the best variant. {number}.",
            ),
        ]

    def _metric(self, variant: str, problem: str) -> str:
        found = {other: e.value for other in self.runs if (e := self.metric(other, problem)) is not None}
        text = shown(problem)(self.metric(variant, problem))
        return Strong(text) if found.get(variant) == min(found.values()) else text

    def _steps(self, variant: str, problem: str) -> str:
        estimate = self.steps(variant, problem)
        if estimate is None or np.isfinite(estimate.value):
            return spread(estimate)
        runs = self.runs[variant][problem]
        return f"miss ({sum(not reach(run, self.targets[problem].metric).is_miss for run in runs)} of {len(runs)})"


def _name(arguments: dict[str, Any]) -> str:
    others = {key: value for key, value in arguments.items() if key != "method"}
    parts = [arguments.get("method", ""), configuration(others) if others else ""]
    return ", ".join(part for part in parts if part)


def _target(study: Study, problem: str, found: dict[str, dict[str, list[Run]]]) -> Target:
    medians = [float(np.median([run.metric for run in runs[problem]])) for runs in found.values() if problem in runs]
    return study.targets[problem] or Target(min(medians))


def _order(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """By method, then by the values of each argument: numbers by size, and before texts."""
    numbers = {key: value if isinstance(value, int | float) else 0.0 for key, value in arguments.items()}
    return arguments["method"], [(key, isinstance(v, str), numbers[key], str(v)) for key, v in arguments.items()]
