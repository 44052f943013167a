"""Runs in order: by track, problem and method, with the targets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks import protocol
from benchmarks.methods import METHODS, Config
from benchmarks.problems import PROBLEMS
from benchmarks.protocol import REFERENCE, Target
from benchmarks.report.reaching import needed, paired, speedup
from benchmarks.report.statistics import Estimate, Profile, Range, good_rates, width
from benchmarks.runs import Run

LABELS = {"final": "tuned", "defaults": "at defaults", "sensitivity": "over learning rates"}
"""Tracks, as pictures and tables name them."""


@dataclass(frozen=True)
class Study:
    """What there is to report.

    Attributes:
        runs: Track, problem, method -> runs, by seed.
        targets: Problem -> what there is to reach, None where tuned AdamW has not run.
        left_out: How many runs are of other problems, methods, budgets or configurations than today's.
    """

    runs: dict[tuple[str, str, str], list[Run]]
    targets: dict[str, Target | None]
    left_out: int

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Study:
        """The runs that count, once each, and what they are to reach."""
        distinct = {run.spec.file: run for run in runs}
        chosen = protocol.best(run for run in distinct.values() if _is_known(run))
        current = [run for run in distinct.values() if _is_current(run, chosen)]
        found = defaultdict(list)
        for run in sorted(current, key=lambda run: run.spec.seed):
            found[run.spec.track, run.spec.problem, run.spec.method].append(run)
        problems = [name for name in PROBLEMS if any(name == problem for _, problem, _ in found)]
        targets = {name: protocol.target(current, name) for name in problems}
        return cls(dict(found), targets, len(distinct) - len(current))

    def problems(self, track: str) -> list[str]:
        """Those of a track, in the order of `benchmarks.problems`."""
        return [name for name in PROBLEMS if any(key[:2] == (track, name) for key in self.runs)]

    def methods(self, track: str, problem: str | None = None) -> list[str]:
        """Those of a track, in the order of `benchmarks.methods`."""
        keys = [key for key in self.runs if key[0] == track and problem in {None, key[1]}]
        return [name for name in METHODS if any(key[2] == name for key in keys)]

    def ours(self, track: str) -> list[str]:
        """Our methods of a track."""
        return [name for name in self.methods(track) if METHODS[name].is_ours]

    @property
    def ablations(self) -> list[str]:
        """The tracks of ablations."""
        return sorted({track for track, _, _ in self.runs if track.startswith("ablate-")})

    def get(self, track: str, problem: str, method: str) -> list[Run]:
        """Runs, by seed; none if there are none."""
        return self.runs.get((track, problem, method), [])

    def test(self, track: str, problem: str, method: str) -> Estimate | None:
        """The final test metric."""
        runs = self.get(track, problem, method)
        return Estimate.median([tested(run) for run in runs], problem) if runs else None

    def excess(self, track: str, problem: str, method: str, other: str) -> Estimate | None:
        """By how much its final test metric is above another method's, over the seeds that both have."""
        pairs = paired(self.get(track, problem, method), self.get(track, problem, other))
        if not pairs:
            return None
        ours, theirs = np.array([[tested(run) for run in pair] for pair in pairs]).T

        def of(rows: np.ndarray) -> float:
            own = float(np.median(ours[rows]))
            return own - float(np.median(theirs[rows])) if math.isfinite(own) else math.inf

        return Estimate.of(of, len(pairs), problem)

    def need(self, track: str, problem: str, method: str, measure: str) -> Estimate | None:
        """Steps, gradients or seconds to the target."""
        runs, target = self.get(track, problem, method), self.targets[problem]
        return needed(runs, target, measure) if runs and target is not None else None

    def pace(self, track: str, problem: str, method: str) -> Estimate | None:
        """The time of a step over AdamW's, by seeds that both have."""
        pairs = paired(self.get(track, problem, method), self.get(track, problem, REFERENCE))
        ratios = [run.curve.pace / other.curve.pace for run, other in pairs]
        return Estimate.median(ratios, problem) if ratios else None

    def speedup(self, track: str, problem: str, method: str, measure: str, than: str = REFERENCE) -> Estimate | None:
        """How many times less it needs to the target than another method."""
        target = self.targets[problem]
        if target is None:
            return None
        return speedup(self.get(track, problem, method), self.get(track, problem, than), target, measure)

    def profile(self, track: str, measure: str) -> tuple[Profile | None, list[str]]:
        """The performance profile of the methods that have run on all problems with a target, and the others."""
        problems = [name for name in self.problems(track) if self.targets[name] is not None]
        methods = self.methods(track)
        everywhere = [m for m in methods if all(self.get(track, problem, m) for problem in problems)]
        if not problems or not everywhere:
            return None, methods
        needs = {m: [_known(self.need(track, problem, m, measure)) for problem in problems] for m in everywhere}
        return Profile.of(needs), [m for m in methods if m not in everywhere]

    @property
    def swept(self) -> list[str]:
        """The problems of the sensitivity track whose end is a result, and has a percent."""
        found = [PROBLEMS[name] for name in self.problems("sensitivity")]
        return [problem.name for problem in found if problem.has_zero and not problem.has_goal]

    def rates(self, problem: str, method: str) -> dict[float, list[float]]:
        """Learning rate -> final validation metrics by seed, of the sensitivity track; rates that all seeds have."""
        found: dict[float, list[float]] = defaultdict(list)
        for run in self.get("sensitivity", problem, method):
            found[run.spec.config["lr"]].append(run.metric)
        most = max(map(len, found.values()), default=0)
        return {rate: found[rate] for rate in sorted(found) if len(found[rate]) == most}

    def good_rates(self, problem: str, method: str) -> Range | None:
        """The learning rates that end within 1% of the best, by medians over seeds."""
        metrics = {rate: float(np.median(values)) for rate, values in self.rates(problem, method).items()}
        return good_rates(metrics, PROBLEMS[problem].is_classification) if metrics else None

    def width(self, problem: str, method: str) -> Estimate | None:
        """How many decades that is."""
        found = self.rates(problem, method)
        return width(found, PROBLEMS[problem].is_classification, problem) if found else None


def tested(run: Run) -> float:
    """The final test metric, infinite if the run diverged."""
    metric: float = run.final["test_metric"]
    return math.inf if run.diverged or math.isnan(metric) else metric


def _is_known(run: Run) -> bool:
    return run.spec.problem in PROBLEMS and run.spec.method in METHODS


def _is_current(run: Run, chosen: dict[tuple[str, str], Config]) -> bool:
    spec = run.spec
    if not _is_known(run):
        return False
    if spec.track.startswith("ablate-"):
        return True
    if spec.track == "final" and spec.config != chosen.get((spec.problem, spec.method), spec.config):
        return False  # tuned anew since
    return spec.steps == PROBLEMS[spec.problem].steps


def _known(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate
