"""Continual learning on handwritten digits: which diagonal keeps the first task while the second is learned?

A network learns the digits 0-4, then 5-9 without seeing the first again. Without a penalty it forgets; elastic weight
consolidation (Kirkpatrick et al., PNAS 2017) adds to the new task's loss

    strength * 1/2 sum_i F_i (theta_i - theta*_i)^2          (`fishopt.penalty.fisher_penalty`)

with F the Fisher diagonal at the end theta* of the first task, from some of its inputs: the same for all estimators, one
label or sign vector each (`"exact"` takes a column per output). Negative entries of I2 count as zero. "L2" has a
constant F of the exact diagonal's trace. Two settings, in which nothing tells which task an image is of:

    shared outputs     five outputs, for the digit modulo 5: the tasks differ in their images (domain-incremental)
    own outputs        ten outputs, for the digit: the second task's labels are new (class-incremental)

Forgetting is large in both. With five outputs for each task and the task known, it is some three points here, too few
to compare by, and left out. Each method takes the strength, of one grid, with the best mean accuracy over both tasks on
validation images of all seeds; reported is the accuracy on test images.

A seed is a split of the images, a start and an order. Seeds share the 1,797 images of scikit-learn, so the p-values, of
paired one-sided t-tests over seeds, are a little too small. Writes out/continual.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checks import Check, show
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fishopt
from fishopt.penalty import fisher_penalty

SETTINGS = {"shared outputs": 5, "own outputs": 10}
DIAGONALS = ("I1", "I2", "exact", "hutchinson", "empirical")
METHODS = ("L2", *DIAGONALS)
COLOURS = dict(zip(METHODS, ("0.45", "#c44e52", "#dd8452", "#4c72b0", "#55a868", "#8172b3"), strict=True))
HIDDEN, BATCH, LR = 32, 32, 0.01
LEVEL = 0.05
"""Of the tests."""

Diagonal = dict[str, Tensor]
Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much is run: seeds, steps for each task, penalty strengths, inputs that diagonals are estimated from."""

    seeds: int
    steps: int
    strengths: tuple[float, ...]
    inputs: tuple[int, ...]


FULL = Sizes(10, 200, tuple(10 ** (k / 2) for k in range(2, 16)), (4, 16, 64, 256))
QUICK = Sizes(4, 100, tuple(10.0**k for k in range(1, 8)), (16, 256))


class Penalty(NamedTuple):
    """How the first task is protected; by "none" at strength 0."""

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
        tried = [p for p in self.scores if p[:2] == (method, inputs)]
        return max(tried, key=lambda p: float(self.scores[p][:, 0].mean()))

    def test(self, method: str, inputs: int) -> Tensor:
        """Test accuracy at that strength: ``[seed, task]``."""
        return self.scores[self.best(method, inputs)][:, 1]

    def keys(self) -> list[tuple[str, int]]:
        """Methods and numbers of inputs."""
        return list(dict.fromkeys(p[:2] for p in self.scores))


class Stacked(nn.Module):
    """R linear layers side by side: ``[R, N, in]`` to ``[R, N, out]``."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(count, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """All layers, each on its own inputs."""
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


def stacked(states: list[Diagonal]) -> nn.Sequential:
    """The networks of these parameters side by side, whose parameters have the same names and one dimension more."""
    outputs = len(states[0]["2.bias"])
    layers = [Stacked(len(states), *sizes) for sizes in pairwise((64, HIDDEN, outputs))]
    networks = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    networks.load_state_dict({name: torch.stack([state[name] for state in states]) for name in states[0]})
    return networks


def plain(outputs: int) -> nn.Sequential:
    """One network, as `fisher_diagonal` takes it."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))


def digits(seed: int, outputs: int) -> list[list[Images]]:
    """Images ``[N, 64]`` in [0, 1] and the digit modulo ``outputs``: for training, validation and test, by task."""
    x, y = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    train, held_out = train_test_split(range(len(y)), test_size=0.4, stratify=y, random_state=seed)
    parts = (train, *train_test_split(held_out, test_size=0.5, stratify=y[held_out], random_state=seed))
    tasks = [[torch.tensor(part)[y[part] // 5 == task] for task in (0, 1)] for part in parts]
    return [[(x[rows].float() / 16, y[rows] % outputs) for rows in part] for part in tasks]


def train(
    networks: nn.Module, data: Images, steps: int, generator: torch.Generator, hold: tuple[Diagonal, Diagonal] | None
) -> None:
    """Adam on the same batches for all networks side by side, each under its own penalty.

    Args:
        networks: R of them, from `stacked`. Their losses add up, and Adam works entry by entry: each trains as alone.
        data: Images and labels.
        steps: Steps, the learning rate falling linearly to zero.
        generator: Draws the batches.
        hold: Anchor and diagonal, ``[R, ...]``, each network's diagonal times its strength; or no penalty.
    """
    x, y = data
    count = len(next(networks.parameters()))
    optimizer = torch.optim.Adam(networks.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        h = networks(x[rows].expand(count, -1, -1)).flatten(0, 1)
        loss = nn.functional.cross_entropy(h, y[rows].repeat(count), reduction="sum") / BATCH
        if hold is not None:
            loss = loss + fisher_penalty(networks, *hold)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(networks: nn.Module, data: Images) -> Tensor:
    """Of each network: ``[R]``."""
    x, y = data
    count = len(next(networks.parameters()))
    return (networks(x.expand(count, -1, -1)).argmax(2) == y).double().mean(1)


def estimates(model: nn.Module, data: Images, generator: torch.Generator) -> dict[str, Diagonal]:
    """Every method's diagonal from the same inputs."""
    x, y = data
    found: dict[str, Diagonal] = {
        name: fishopt.fisher_diagonal(
            model, x, "categorical", estimator=name, targets=y if name == "empirical" else None, generator=generator
        )
        for name in DIAGONALS
    }
    exact = found["exact"]
    mean = torch.cat([value.flatten() for value in exact.values()]).mean()
    return {"L2": {name: mean.expand(value.shape).clone() for name, value in exact.items()}, **found}


def penalties(sizes: Sizes) -> Iterator[Penalty]:
    """All that are tried; L2 needs inputs for its scale alone, so at the largest number only."""
    yield Penalty("none", 0, 0.0)
    for method in METHODS:
        for inputs in sizes.inputs[-1:] if method == "L2" else sizes.inputs:
            yield from (Penalty(method, inputs, strength) for strength in sizes.strengths)


def run(seed: int, outputs: int, sizes: Sizes) -> tuple[dict[Penalty, Tensor], float, float]:
    """Both tasks by one seed.

    Returns:
        Accuracies ``[validation or test, task]`` by penalty; the first task's on test images before the second was
        learned; and the share of I2's entries below zero, from the fewest inputs.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (old, new), *held_out = digits(seed, outputs)
    model = plain(outputs)
    first = stacked([model.state_dict()])
    train(first, old, sizes.steps, generator, None)
    before = float(accuracy(first, held_out[1][0]))
    model.load_state_dict({name: value[0] for name, value in first.state_dict().items()})

    order = torch.randperm(len(old[0]), generator=generator)
    found = {n: estimates(model, (old[0][order[:n]], old[1][order[:n]]), generator) for n in sizes.inputs}
    negative = torch.cat([value.flatten() < 0 for value in found[sizes.inputs[0]]["I2"].values()])
    tried, anchor = list(penalties(sizes)), {name: p.detach().clone() for name, p in model.named_parameters()}
    found[0] = {"none": {name: torch.zeros_like(value) for name, value in anchor.items()}}
    networks = stacked([anchor] * len(tried))
    start = {name: p.detach().clone() for name, p in networks.named_parameters()}
    held = {name: torch.stack([p.strength * found[p.inputs][p.method][name] for p in tried]) for name in anchor}
    train(networks, new, sizes.steps, generator, (start, held))
    scores = torch.stack([torch.stack([accuracy(networks, task) for task in part]) for part in held_out])
    return {p: scores[:, :, i] for i, p in enumerate(tried)}, before, float(negative.double().mean())


def settle(outputs: int, sizes: Sizes, seed: int, bar: tqdm[None]) -> Results:
    """One setting by all seeds."""
    found = []
    for i in range(sizes.seeds):
        found.append(run(seed + i, outputs, sizes))
        bar.update()
    scores = {p: torch.stack([one[0][p] for one in found]) for p in found[0][0]}
    return Results(scores, *(torch.tensor([one[k] for one in found]) for k in (1, 2)))


def mean_and_error(values: Tensor) -> tuple[Any, Any]:
    """Over seeds."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def table(title: str, results: Results, most: int) -> Table:
    """Test accuracies in percent, with standard errors over seeds."""
    listed = Table(title=title)
    for heading in ("diagonal", "inputs", "strength", "old task", "new task", "mean", "mean over L2's"):
        listed.add_column(heading, justify="left" if heading == "diagonal" else "right")
    base = results.test("L2", most).mean(1)
    for method, inputs in results.keys():
        values = 100 * results.test(method, inputs)
        columns = (values[:, 0], values[:, 1], values.mean(1), values.mean(1) - 100 * base)
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in map(mean_and_error, columns)]
        listed.add_row(method, str(inputs or "-"), f"{results.best(method, inputs).strength:.3g}", *cells)
    return listed


def better(results: Results, first: tuple[str, int], second: tuple[str, int]) -> Check:
    """Whether the first's mean accuracy over both tasks is above the second's."""
    a, b = (results.test(*key).mean(1) for key in (first, second))
    p = float(ttest_rel(a, b, alternative="greater").pvalue)
    same = f", {first[1]} inputs" if first[1] == second[1] else ""
    gain = 100 * float((a - b).mean())
    return Check(f"{first[0]} > {second[0]}{same}, by {gain:.1f} points: p-value", LEVEL, p, relation="<=")


def checks(name: str, results: Results, sizes: Sizes) -> list[Check]:
    """Forgetting, that the grid is wide enough, and who protects better."""
    few, most = sizes.inputs[-2:]
    lost = results.before - results.test("none", 0)[:, 0]
    ends = (sizes.strengths[0], sizes.strengths[-1])
    at_ends = sum(results.best(*key).strength in ends for key in results.keys())
    over_l2 = better(results, ("exact", most), ("L2", most))
    if name == "own outputs":
        # Against expectation: where the labels are new, a diagonal is not shown to be worth more than its trace.
        over_l2 = replace(over_l2, what=f"not shown: {over_l2.what}", relation=">=")
    return [
        Check("accuracy on the old task before the new one", 0.95, float(results.before.mean()), relation=">="),
        Check("lost of it without a penalty", 0.4, float(lost.mean()), relation=">="),
        Check("strengths chosen at an end of the grid", 0, at_ends),
        Check("share of I2's entries that are negative", 0.01, float(results.negative.mean()), relation=">="),
        better(results, ("L2", most), ("none", 0)),
        over_l2,
        *(better(results, (method, few), ("I1", few)) for method in ("exact", "hutchinson")),
        better(results, ("exact", few), ("I2", few)),
        better(results, ("exact", most), ("empirical", most)),
    ]


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
    figure.axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle(f"Digits 0-4, then 5-9: test accuracy, mean and standard error of {sizes.seeds} seeds")
    figure.savefig(path, dpi=110)


def trade_off(axes: Any, results: Results, sizes: Sizes) -> None:
    """Old against new: a line through all strengths, and a mark at the chosen one."""
    for method in METHODS:
        key = (method, sizes.inputs[-1])
        line = torch.stack([results.scores[Penalty(*key, s)][:, 1].mean(0) for s in sizes.strengths])
        axes.plot(line[:, 1], line[:, 0], color=COLOURS[method], linewidth=1, alpha=0.45)
        mark(axes, method, results.test(*key), COLOURS[method])
    mark(axes, "none", results.test("none", 0), "0.1")
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
    mean, error = mean_and_error(results.test("L2", sizes.inputs[-1]).mean(1))
    axes.axhline(mean, color=COLOURS["L2"], linestyle="--", linewidth=1)
    axes.axhspan(mean - error, mean + error, color=COLOURS["L2"], alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel="inputs that the diagonal is estimated from", ylabel="mean accuracy of both tasks")
    axes.set_xticks(sizes.inputs, [str(n) for n in sizes.inputs])
    axes.minorticks_off()


def main(arguments: list[str] | None = None) -> None:
    """Trains, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--quick", action="store_true", help="fewer seeds, steps, strengths and inputs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are small

    with tqdm(total=sizes.seeds * len(SETTINGS), unit="run") as bar:
        found = {name: settle(outputs, sizes, options.seed, bar) for name, outputs in SETTINGS.items()}
    for name, results in found.items():
        Console(width=140).print(table(f"{name}: test accuracy (%)", results, sizes.inputs[-1]))
        show(name, checks(name, results, sizes))
    draw(found, sizes, options.out / "continual.png")
    print(f"picture: {(options.out / 'continual.png').resolve()}")


if __name__ == "__main__":
    main()
