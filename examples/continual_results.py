"""What comes of continual.py: accuracies of every penalty, the best of each method, tables and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checks import Check, better
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from fishopt import plotting

DIAGONALS = ("I1", "I2", "exact", "hutchinson", "empirical")
METHODS = ("L2", *DIAGONALS)
COLOURS = {"L2": "0.45", **plotting.COLOURS}


@dataclass(frozen=True)
class Sizes:
    """How much is run: seeds, steps for each task, penalty strengths, inputs that diagonals are estimated from."""

    seeds: int
    steps: int
    strengths: tuple[float, ...]
    inputs: tuple[int, ...]


class Penalty(NamedTuple):
    """How the first task is protected; "L2" and "none", at strength 0, are of 0 inputs."""

    method: str
    inputs: int
    strength: float


@dataclass(frozen=True)
class Results:
    """One setting's, of all seeds.

    Attributes:
        scores: Accuracy after the second task, ``[seed, validation or test, first or second task]``.
        before: Test accuracy on the first task before the second: ``[seed]``.
        negative: Share of I2's entries below zero, from the fewest inputs: ``[seed]``.
    """

    scores: dict[Penalty, Tensor]
    before: Tensor
    negative: Tensor

    def best(self, method: str, inputs: int) -> Penalty:
        """The one with the strength that does best on validation images."""
        strengths = [p for p in self.scores if p[:2] == (method, inputs)]
        return max(strengths, key=lambda p: float(self.scores[p][:, 0].mean()))

    def test(self, method: str, inputs: int = 0) -> Tensor:
        """Test accuracy at that strength: ``[seed, task]``."""
        return self.scores[self.best(method, inputs if method in DIAGONALS else 0)][:, 1]

    @property
    def tried(self) -> list[tuple[str, int]]:
        """Methods and numbers of inputs."""
        return list(dict.fromkeys(p[:2] for p in self.scores))


def mean_and_error(values: Tensor) -> tuple[Any, Any]:
    """Over seeds."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def table(title: str, results: Results) -> Table:
    """Test accuracies in percent, with standard errors over seeds."""
    listed = Table(title=title)
    for heading in ("diagonal", "inputs", "strength", "old task", "new task", "mean", "mean over L2's"):
        listed.add_column(heading, justify="left" if heading == "diagonal" else "right")
    base = (100 * results.test("L2")).mean(1)
    for method, inputs in results.tried:
        values = 100 * results.test(method, inputs)
        columns = (values[:, 0], values[:, 1], values.mean(1), values.mean(1) - base)
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in map(mean_and_error, columns)]
        listed.add_row(method, str(inputs or "-"), f"{results.best(method, inputs).strength:.3g}", *cells)
    return listed


def compared(results: Results, first: str, second: str, inputs: Sequence[int]) -> Check:
    """Whether the first's accuracy, averaged over both tasks and these numbers of inputs, is above the second's."""
    a, b = (torch.stack([results.test(m, n).mean(1) for n in inputs]).mean(0) for m in (first, second))
    numbers = f", {', '.join(map(str, inputs))} inputs" if any(inputs) else ""
    return better(f"{first} > {second}{numbers}", a, b)


def draw(found: dict[str, Results], sizes: Sizes, path: Path) -> None:
    """For each setting the old task against the new one, and the mean of both by number of inputs."""
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    for axes, (name, results) in zip(figure.subplots(2, 2), found.items(), strict=True):
        trade_off(axes[0], results, sizes)
        by_inputs(axes[1], results, sizes)
        axes[0].set(title=f"{name}: diagonals from {sizes.inputs[-1]} inputs")
        axes[1].set(title=f"{name}: by inputs")
        for axis in axes:
            axis.grid(alpha=0.3, linewidth=0.5)
    figure.axes[0].legend(frameon=False, loc="lower left", title="line: every strength\nmark: the chosen one")
    figure.suptitle(f"Digits 0-4, then 5-9: test accuracy, mean and standard error of {sizes.seeds} seeds")
    figure.savefig(path, dpi=110)


def trade_off(axes: Any, results: Results, sizes: Sizes) -> None:
    """Old against new: a line through all strengths, and a mark at the chosen one."""
    for method in METHODS:
        inputs = sizes.inputs[-1] if method in DIAGONALS else 0
        line = torch.stack([results.scores[Penalty(method, inputs, s)][:, 1].mean(0) for s in sizes.strengths])
        axes.plot(line[:, 1], line[:, 0], color=COLOURS[method], linewidth=1, alpha=0.45)
        mark(axes, method, results.test(method, inputs), COLOURS[method])
    mark(axes, "none", results.test("none"), "0.1")
    axes.set(xlabel="accuracy on the new task", ylabel="accuracy on the old task")


def mark(axes: Any, label: str, values: Tensor, colour: str) -> None:
    """A point with its errors."""
    mean, error = mean_and_error(values)
    axes.errorbar(
        mean[1], mean[0], error[0], error[1], color=colour, marker="o", markersize=5, linestyle="", label=label
    )


def by_inputs(axes: Any, results: Results, sizes: Sizes) -> None:
    """Mean accuracy of both tasks."""
    for method in DIAGONALS:
        pairs = [mean_and_error(results.test(method, n).mean(1)) for n in sizes.inputs]
        mean, error = zip(*pairs, strict=True)
        axes.errorbar(sizes.inputs, mean, error, color=COLOURS[method], marker="o", markersize=4, capsize=2)
    mean, error = mean_and_error(results.test("L2").mean(1))
    axes.axhline(mean, color=COLOURS["L2"], linestyle="--", linewidth=1, label="L2")
    axes.axhspan(mean - error, mean + error, color=COLOURS["L2"], alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="inputs that the diagonal is estimated from", ylabel="mean accuracy of both tasks")
    axes.set_xticks(sizes.inputs, [str(n) for n in sizes.inputs])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
