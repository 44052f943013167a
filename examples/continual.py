"""Continual learning on handwritten digits: which diagonal keeps the first task while the second is learned?

A network learns the digits 0-4, then 5-9 without seeing the first again. Without a penalty it forgets; elastic weight
consolidation (Kirkpatrick et al., PNAS 2017) adds to the new task's loss

    strength * 1/2 sum_i F_i (theta_i - theta*_i)^2          (`fishopt.penalty.fisher_penalty`)

with F the Fisher diagonal at the end theta* of the first task, from some of its inputs: the same for all estimators,
one label or sign vector each (`"exact"` takes a column per output). Negative entries of I2 count as zero. "L2" has a
constant F of the exact diagonal's trace. Two settings, in which nothing tells which task an image is of:

    shared outputs     five outputs, for the digit modulo 5: the tasks differ in their images (domain-incremental)
    own outputs        ten outputs, for the digit: the second task's labels are new (class-incremental)

Forgetting is large in both. With five outputs for each task and the task known, it is some three points here, too few
to compare by, and left out. Each method takes the strength, of one grid, with the best mean accuracy over both tasks on
validation images of all seeds; reported is the accuracy on test images.

With shared outputs the exact diagonal protects better than L2, given enough inputs, and I2 is close to it. With own
outputs exact is not shown to be better than L2, and I1, I2 and the empirical Fisher are worse: parameters that I2 has
below zero are left free at every strength. `"hutchinson"` is as good as exact in both, at I1's cost.

A seed is a split of the images, a start and an order. Seeds share the 1,797 images of scikit-learn, so the p-values, of
paired one-sided t-tests over seeds, are a little too small. Writes out/continual.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from checks import Check, show
from continual_results import DIAGONALS, METHODS, Penalty, Results, Sizes, compared, draw, table
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fishopt
from fishopt.penalty import fisher_penalty

SETTINGS = {"shared outputs": 5, "own outputs": 10}
HIDDEN, BATCH, LR = 32, 32, 0.01
Diagonal = dict[str, Tensor]
Images = tuple[Tensor, Tensor]


FULL = Sizes(10, 200, tuple(10 ** (k / 2) for k in range(2, 16)), (4, 16, 64, 256))
QUICK = Sizes(2, 80, tuple(10.0**k for k in range(1, 9)), (64,))


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


def plain(outputs: int, generator: torch.Generator) -> nn.Sequential:
    """One network at its start, as `fisher_diagonal` takes it; torch's own bounds, from a generator."""
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs))
    for layer in (part for part in model if isinstance(part, nn.Linear)):
        bound = layer.in_features**-0.5
        for p in (layer.weight, layer.bias):
            nn.init.uniform_(p, -bound, bound, generator=generator)
    return model


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
    """Every estimator's diagonal from the same inputs."""
    x, y = data
    return {
        name: fishopt.fisher_diagonal(
            model, x, "categorical", estimator=name, targets=y if name == "empirical" else None, generator=generator
        )
        for name in DIAGONALS
    }


def constant(diagonal: Diagonal, value: float) -> Diagonal:
    """The same for every parameter."""
    return {name: torch.full_like(entries, value) for name, entries in diagonal.items()}


def penalties(sizes: Sizes) -> Iterator[Penalty]:
    """All that are tried."""
    yield Penalty("none", 0, 0.0)
    for method in METHODS:
        for inputs in sizes.inputs if method in DIAGONALS else (0,):
            yield from (Penalty(method, inputs, strength) for strength in sizes.strengths)


def run(seed: int, outputs: int, sizes: Sizes) -> tuple[dict[Penalty, Tensor], float, float]:
    """Both tasks by one seed.

    Returns:
        Accuracies ``[validation or test, task]`` by penalty; the first task's on test images before the second was
        learned; and the share of I2's entries below zero, from the fewest inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    (old, new), *held_out = digits(seed, outputs)
    model = plain(outputs, generator)
    first = stacked([model.state_dict()])
    train(first, old, sizes.steps, generator, None)
    before = float(accuracy(first, held_out[1][0]))
    model.load_state_dict({name: value[0] for name, value in first.state_dict().items()})

    order = torch.randperm(len(old[0]), generator=generator)
    found = {n: estimates(model, (old[0][order[:n]], old[1][order[:n]]), generator) for n in sizes.inputs}
    negative = torch.cat([value.flatten() < 0 for value in found[sizes.inputs[0]]["I2"].values()])
    tried, anchor = list(penalties(sizes)), {name: p.detach().clone() for name, p in model.named_parameters()}
    # Of the exact diagonal's trace; which inputs that is from makes no odds, as the strength is chosen.
    mean = float(torch.cat([value.flatten() for value in found[sizes.inputs[-1]]["exact"].values()]).mean())
    found[0] = {"none": constant(anchor, 0.0), "L2": constant(anchor, mean)}
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


def checks(results: Results, sizes: Sizes) -> list[Check]:
    """Whether much is forgotten, and whether the grid of strengths is wide enough."""
    lost = results.before - results.test("none")[:, 0]
    ends = (sizes.strengths[0], sizes.strengths[-1])
    at_ends = sum(results.best(*key).strength in ends for key in results.tried)
    return [
        Check("accuracy on the old task before the new one", 0.95, float(results.before.mean()), relation=">="),
        Check("lost of it without a penalty", 0.4, float(lost.mean()), relation=">="),
        Check("strengths chosen at an end of the grid", 0, at_ends),
        Check("share of I2's entries that are negative", 0.01, float(results.negative.mean()), relation=">="),
    ]


def comparisons(name: str, results: Results, sizes: Sizes) -> list[Check]:
    """Who protects better; it takes all seeds to tell."""
    most = sizes.inputs[-1:]
    listed = [
        compared(results, "L2", "none", (0,)),
        compared(results, "exact", "empirical", most),
        compared(results, "exact", "I1", sizes.inputs),
        compared(results, "hutchinson", "I1", sizes.inputs),
    ]
    # Each was shown in one setting only. Where the labels are new, the diagonal is hardly worth more than its trace.
    one = ("exact", "I2", sizes.inputs) if name == "own outputs" else ("exact", "L2", most)
    return [*listed, compared(results, *one)]


def main(arguments: list[str] | None = None) -> None:
    """Trains, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--quick", action="store_true", help="smaller, with too few seeds to compare by")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are small

    with tqdm(total=sizes.seeds * len(SETTINGS), unit="run") as bar:
        found = {name: settle(outputs, sizes, options.seed, bar) for name, outputs in SETTINGS.items()}
    for name, results in found.items():
        Console(width=140).print(table(f"{name}: test accuracy (%)", results))
        show(name, [*checks(results, sizes), *([] if options.quick else comparisons(name, results, sizes))])
    draw(found, sizes, options.out / "continual.png")
    print(f"picture: {(options.out / 'continual.png').resolve()}")


if __name__ == "__main__":
    main()
