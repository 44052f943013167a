"""The protocol: the same trials for every method, chosen on validation, run again on fresh seeds, targets by AdamW."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import qmc
from tqdm import tqdm

from benchmarks.methods import METHODS, Config, Method
from benchmarks.problems import PROBLEMS
from benchmarks.runs import Run, Spec, Store
from benchmarks.training import Training

TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
"""Those that results are reported on; trials have another."""

DECADES = 2.0
"""The width of the range of learning rates, log-uniform, around a method's default."""

WEIGHT_DECAY = (1e-4, 1e-1)
"""The range of weight decays, log-uniform."""

REFERENCE = "AdamW"
"""The method whose tuned median is the target."""

Heat = list[Spec]
"""Runs of one problem and seed, which take turns."""


def trials(method: Method, count: int, *, decays: bool = True) -> list[Config]:
    """The configurations that are tried: a method as it comes, and the same quasi-random points for every method.

    Args:
        method: A method.
        count: How many points.
        decays: Whether weights are to decay at all; not where a function is to be fitted to the last digit.
    """
    low, high = WEIGHT_DECAY
    found: list[Config] = [{} if decays or method.closure else {"weight_decay": 0.0}]
    for u in qmc.Halton(3, rng=0).random(count):
        config: Config = {"schedule": "constant", **method.steady} if u[2] < 0.5 else {"schedule": "cosine"}
        if method.lr is not None:
            config["lr"] = float(f"{method.lr * 10 ** (DECADES * (u[0] - 0.5)):.3g}")
        if not method.closure:  # L-BFGS has none
            config["weight_decay"] = float(f"{low * (high / low) ** u[1]:.3g}") if decays else 0.0
        found.append(config)
    return found


def rates(method: Method, around: float | None = None, points: int = 9, decades: float = 4.0) -> list[float]:
    """Learning rates in equal ratios, around the default one."""
    middle = around or method.lr
    assert middle is not None, f"{method.name} has no learning rate"
    return [float(f"{middle * 10 ** (decades * (i / (points - 1) - 0.5)):.3g}") for i in range(points)]


def heats(specs: Iterable[Spec]) -> list[Heat]:
    """Runs of the same track, problem and seed together, each method once: its next trial is for the next heat.

    On the way to a goal all at once: only afterwards is it known which rate is the one to compare with.
    """
    found: dict[tuple[Any, ...], Heat] = defaultdict(list)
    times: Counter[tuple[Any, ...]] = Counter()
    for spec in specs:
        where = spec.track, spec.problem, spec.seed
        found[*where, times[*where, spec.method]].append(spec)
        times[*where, spec.method] += spec.track != "goals"
    return list(found.values())


def run_heat(heat: Heat, folder: Path | None, store: Store, threads: int = 1) -> int:
    """Runs what is not finished yet, in turns, from one evaluation to the next: a noisy machine is as noisy for all.

    Returns:
        How many runs that were.
    """
    torch.set_num_threads(threads)
    running = [Training(spec, folder) for spec in heat if not store.has(spec)]
    count = len(running)
    while running:
        for training in running:
            training.advance()
            if training.is_done:
                store.save(training.finish())
        running = [training for training in running if not training.is_done]
    return count


def run_all(specs: Sequence[Spec], folder: Path | None, store: Store, jobs: int = 1) -> None:
    """Runs what is not finished yet, heat by heat, with a progress bar.

    Args:
        specs: All of the runs.
        folder: Where data sets are.
        store: Where runs are kept.
        jobs: Processes, with one thread each.
    """
    missing = [spec for spec in specs if not store.has(spec)]
    for name in {PROBLEMS[spec.problem].source: spec.problem for spec in missing}.values():
        PROBLEMS[name].data(folder)  # fetched once, before several processes would
    with tqdm(total=len(missing), unit="run") as bar:
        if jobs == 1:
            for heat in heats(missing):
                bar.update(run_heat(heat, folder, store))
            return
        with ProcessPoolExecutor(jobs) as pool:
            for done in as_completed(pool.submit(run_heat, heat, folder, store) for heat in heats(missing)):
                bar.update(done.result())


def tuning(problems: Iterable[str], methods: Iterable[str], count: int) -> list[Spec]:
    """The trials."""
    return [
        Spec("tune", problem, method, config, TUNING_SEED, PROBLEMS[problem].steps)
        for problem in problems
        for method in fit_for(problem, methods)
        for config in trials(METHODS[method], count, decays=not fixed(problem))
    ]


def defaults(problems: Iterable[str], methods: Iterable[str], seeds: Iterable[int] = SEEDS) -> list[Spec]:
    """Every method as it comes, one configuration for all problems."""
    return [
        Spec("defaults", problem, method, {}, seed, PROBLEMS[problem].steps)
        for problem in problems
        for seed in seeds
        for method in fit_for(problem, methods)
    ]


def finals(runs: Iterable[Run], seeds: Iterable[int] = SEEDS) -> list[Spec]:
    """Each method's best trial on each problem, on fresh seeds."""
    chosen = best(runs)
    return [
        Spec("final", problem, method, config, seed, PROBLEMS[problem].steps)
        for seed in seeds
        for (problem, method), config in chosen.items()
    ]


def sensitivity(problems: Iterable[str], methods: Iterable[str], seeds: Iterable[int]) -> list[Spec]:
    """A grid of learning rates over four decades, all else at its default."""
    return [
        Spec("sensitivity", problem, method, {"lr": lr, **fixed(problem)}, seed, PROBLEMS[problem].steps)
        for problem in problems
        for seed in seeds
        for method in methods
        if METHODS[method].lr is not None
        for lr in rates(METHODS[method])
    ]


def goals(problems: Iterable[str], methods: Iterable[str], seeds: Iterable[int]) -> list[Spec]:
    """On the way to a goal: a grid of AdamW's learning rates, and the methods that have none to tune."""
    found = []
    for problem in (name for name in problems if PROBLEMS[name].has_goal):
        grid: list[tuple[str, Config]] = [(REFERENCE, {"lr": lr, **fixed(problem)}) for lr in rates(METHODS[REFERENCE])]
        grid += [(name, {}) for name in METHODS if METHODS[name].lr is None]
        chosen = [(name, config) for name, config in grid if name in methods]
        steps = PROBLEMS[problem].steps
        found += [Spec("goals", problem, name, config, seed, steps) for seed in seeds for name, config in chosen]
    return found


def fit_for(problem: str, methods: Iterable[str]) -> list[str]:
    """The methods that can be used on a problem: those with line searches need the same batch in each step."""
    return [name for name in methods if PROBLEMS[problem].batch is None or not METHODS[name].closure]


def fixed(problem: str) -> Config:
    """What is not a method's own affair on a problem: weights do not decay where a function is fitted to a goal."""
    return {"weight_decay": 0.0} if PROBLEMS[problem].has_goal else {}


def best(runs: Iterable[Run]) -> dict[tuple[str, str], Config]:
    """The configuration with the best final validation metric among the trials of each problem and method.

    Where there is a goal, at which training ends: the one that arrives first.
    """
    found: dict[tuple[str, str], Run] = {}
    for run in runs:
        key = run.spec.problem, run.spec.method
        if run.spec.track == "tune" and (key not in found or _order(run) < _order(found[key])):
            found[key] = run
    return {key: run.spec.config for key, run in found.items()}


def _order(run: Run) -> tuple[float, float]:
    goal = PROBLEMS[run.spec.problem].goal
    arrival = None if goal is None else run.first(goal)
    return math.inf if arrival is None else run.curve.step[arrival], run.metric


@dataclass(frozen=True)
class Target:
    """The metric to reach.

    Attributes:
        metric: A goal known in advance, or the median of tuned AdamW's at the end of its curves.
        by_seed: Seed -> what that is the median of; none for a goal.
    """

    metric: float
    by_seed: Mapping[int, float] = field(default_factory=dict)

    def varying(self, seeds: Iterable[int]) -> Target:
        """Itself where these are the seeds that it is the median of; else as it is, for draws say nothing of it."""
        return self if set(seeds) == self.by_seed.keys() else Target(self.metric)

    def of(self, seeds: Iterable[int]) -> float:
        """The target, had there been these seeds: each as often as it is named."""
        return median(self.by_seed[seed] for seed in seeds) if self.by_seed else self.metric


def target(runs: Iterable[Run], problem: str) -> Target | None:
    """What there is to reach, None where tuned AdamW has not run."""
    goal = PROBLEMS[problem].goal
    if goal is not None:
        return Target(goal)
    # As the curves have it, rounded and of as many examples: it is compared with curves.
    own = {
        run.spec.seed: math.inf if run.diverged else run.curve.valid_metric[-1]
        for run in runs
        if _is_reference(run, problem)
    }
    return Target(median(own.values()), own) if own else None


def _is_reference(run: Run, problem: str) -> bool:
    return run.spec.track == "final" and run.spec.problem == problem and run.spec.method == REFERENCE
