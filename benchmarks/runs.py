"""What a training leaves: one JSON for each run, so that finished runs are not repeated."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

import fishopt
from benchmarks.methods import Config


@dataclass(frozen=True)
class Spec:
    """Which run.

    Attributes:
        track: What it is for: ``"tune"``, ``"final"``, ``"defaults"``, ``"sensitivity"``, ``"goals"``, or an
            ablation's name.
        problem: A problem's name.
        method: A method's name.
        config: The method's arguments, besides those that `benchmarks.methods` gives it, and its ``"schedule"``.
        seed: Of weights, batches and labels.
        steps: How many.
    """

    track: str
    problem: str
    method: str
    config: Config
    seed: int
    steps: int

    @property
    def file(self) -> Path:
        """Where it is kept."""
        digest = hashlib.sha256(json.dumps([self.config, self.steps], sort_keys=True).encode()).hexdigest()[:10]
        return Path(self.track) / self.problem / f"{self.method.replace(' ', '_')}-{digest}-{self.seed}.json"


@dataclass(frozen=True)
class Curve:
    """What was seen at evaluations, lists of equal length.

    Attributes:
        step: Steps made.
        gradients: Gradients evaluated.
        seconds: Time spent training, evaluations not included.
        train_loss: The mean over the steps since the last evaluation.
        valid_loss: On the validation set.
        valid_metric: The same.
    """

    step: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_metric: list[float] = field(default_factory=list)

    def add(self, **values: float) -> None:
        """Another evaluation."""
        for name, value in values.items():
            getattr(self, name).append(_short(value))

    @property
    def pace(self) -> float:
        """Seconds per step."""
        return self.seconds[-1] / self.step[-1]

    def last(self) -> Curve:
        """The last evaluation alone."""
        return Curve(**{name: values[-1:] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        spec: Which.
        curve: What was seen on the way.
        final: ``valid_metric``, ``test_loss``, ``test_metric`` of the weights at the end.
        diverged: Whether it ended in numbers that are not finite.
        curvature_share: The part of its time that went into curvature.
        choices: Of our methods, which estimator each group used and when: ``[step, {group: estimator}]``.
        environment: What the times depend on.
    """

    spec: Spec
    curve: Curve
    final: dict[str, float]
    diverged: bool
    curvature_share: float
    choices: list[Any]
    environment: dict[str, Any]

    @property
    def metric(self) -> float:
        """The final validation metric, infinite if the run diverged."""
        return float("inf") if self.diverged else self.final["valid_metric"]

    def first(self, target: float) -> int | None:
        """The index of the first evaluation that reaches a target."""
        return next((i for i, value in enumerate(self.curve.valid_metric) if value <= target), None)

    @classmethod
    def read(cls, values: dict[str, Any]) -> Run:
        """A run from JSON."""
        return cls(**{**values, "spec": Spec(**values["spec"]), "curve": Curve(**values["curve"])})


class Store:
    """A folder of runs.

    Args:
        folder: With a file for each run, or files with a list of runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, spec: Spec) -> bool:
        """Whether this run is finished."""
        return (self.folder / spec.file).exists()

    def save(self, run: Run) -> None:
        """Keeps a run; a reader finds all of it or nothing."""
        path = self.folder / run.spec.file
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(run)) + "\n")
        partial.replace(path)

    def read(self, spec: Spec) -> Run:
        """A run that is finished."""
        return Run.read(json.loads((self.folder / spec.file).read_text()))

    def runs(self) -> Iterator[Run]:
        """All of them, in the order of their files' names."""
        for path in sorted(self.folder.rglob("*.json")):
            content = json.loads(path.read_text())
            yield from (Run.read(values) for values in (content if isinstance(content, list) else [content]))


def keep_runs(runs: Iterable[Run], folder: Path) -> None:
    """Adds runs to a file for each track, a line for each run, to be kept under version control.

    Of trials and of other learning rates only the outcome is kept, as nothing else of them is looked at.
    """
    by_track: dict[str, list[Run]] = {}
    everything = {run.spec.file: run for source in (Store(folder).runs(), runs) for run in source}
    for _, run in sorted(everything.items()):
        is_outcome = run.spec.track in {"tune", "sensitivity"}
        short = replace(run, curve=run.curve.last(), choices=[]) if is_outcome else run
        by_track.setdefault(run.spec.track, []).append(short)
    folder.mkdir(parents=True, exist_ok=True)
    for track, found in by_track.items():
        lines = ",\n".join(json.dumps(asdict(run), separators=(",", ":")) for run in found)
        (folder / f"{track}.json").write_text(f"[\n{lines}\n]\n")


def environment(package: str | None = None) -> dict[str, Any]:
    """What a run depends on besides its spec.

    Args:
        package: Of the method, if it is of another than torch.
    """
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fishopt": version("fishopt"),
        "sources": SOURCES,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return found if package in {None, "fishopt"} else {**found, **_installed(package)}


@cache
def _installed(package: str) -> dict[str, str]:
    """The distribution that a package is of, and its version; kept, as all that is installed is looked through."""
    (name, *_) = packages_distributions()[package]
    return {name: version(name)}


def digest(files: Iterable[Path]) -> str:
    """Of what is in some files."""
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:10]


SOURCES = digest([*Path(fishopt.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")])
"""Of fishopt and of what trains here, as this process found them: a version does not tell two days' code apart."""


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
