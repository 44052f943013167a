"""What a training run's gradients tell about it: condition number, length of the way, noise; and batches that grow.

Liao, Drummond, Reid & Carneiro (2020, arXiv 1810.06767) characterise a run by the mean of C_k and by L_K,

    C_k = max e / min e,    L_K = sum_k (lr_k / B_k) |J_k|_F,

e the singular values other than zero of J_k, whose rows are the gradients of the batch's single inputs at their labels.
Here they are measured on handwritten digits over their grid of learning rates and batch sizes. Then, at one learning
rate and for the same number of inputs, batches of fixed sizes against batches that grow: in stages, as they propose,
and when the gradient's variance over inputs and labels says that it pays (Byrd et al., 2012; McCandlish et al., 2018).
On the digits L_K behaves as reported. C_k rises with the batch at one theta, but over a run it is largest for small
batches and high rates: these fit their inputs, whose gradients then all but vanish. For the same number of inputs,
batches that grow save steps, not inputs: no rule beats a small fixed batch by more than chance here.

Writes out/characterising.png.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import Check, show
from claims import Claim, table
from figure2 import Data, load
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from fishopt.diagnostics import BatchSizeSchedule, TrainingMonitor
from fishopt.plotting import Characterised, draw_characterisation

LOSS = nn.CrossEntropyLoss()
RATES = (0.4, 0.2, 0.1, 0.05, 0.025)
SIZES = (8, 16, 32, 64, 128, 256)
STAGES = (16, 32, 64, 128, 256)
COLOURS = {"16": "0.75", "64": "0.5", "256": "0.2", "stages": "#4c72b0", "automatic": "#c44e52"}


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        rates: Learning rates of the grid.
        sizes: Batch sizes of the grid.
        epochs: Passes over the data in the grid.
        long_epochs: Passes over the data in the comparison.
        every: Steps between measurements in the grid.
        seeds: Repetitions of the comparison.
        seed: The first of them, and that of the grid.
        lr: Learning rate of the comparison.
    """

    rates: tuple[float, ...]
    sizes: tuple[int, ...]
    epochs: int
    long_epochs: int
    every: int
    seeds: int
    seed: int
    lr: float = 0.2


@dataclass(frozen=True)
class Curve:
    """A run of the comparison; one entry for each epoch.

    Attributes:
        errors: Test error, a share, after it.
        sizes: Batch size at its end.
        steps: All steps.
        inputs: All inputs that were trained on.
    """

    errors: list[float]
    sizes: list[int]
    steps: int
    inputs: int


def network(inputs: int, seed: int) -> nn.Sequential:
    """The same weights for the same seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()


def error(model: nn.Module, data: Data) -> float:
    """The share of test images that are mistaken."""
    with torch.no_grad():
        return float((model(data.x_test).argmax(1) != data.y_test).double().mean())


Sampler = Callable[[TrainingMonitor, torch.Generator], BatchSizeSchedule]


def fixed(data: Data, size: int, epochs: int) -> Sampler:
    """Batches of one size."""
    return lambda _, generator: BatchSizeSchedule(len(data.x), sizes=[size], epochs=epochs, generator=generator)


def staged(data: Data, epochs: int) -> Sampler:
    """Batches in stages of equal numbers of inputs."""
    return lambda _, generator: BatchSizeSchedule(len(data.x), sizes=STAGES, epochs=epochs, generator=generator)


def automatic(data: Data) -> Sampler:
    """Batches that grow with the gradient's noise."""
    return lambda monitor, generator: BatchSizeSchedule(len(data.x), sizes=STAGES, monitor=monitor, generator=generator)


def train(
    data: Data, sampler: Sampler, lr: float, epochs: int, every: int, seed: int
) -> tuple[nn.Module, TrainingMonitor, Curve]:
    """Stochastic gradient descent, watched."""
    model = network(data.x.shape[1], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    errors, sizes, steps = [], [], 0
    with TrainingMonitor(model, LOSS, optimizer, every=every) as monitor:
        batches = sampler(monitor, torch.Generator().manual_seed(seed))
        loader = DataLoader(TensorDataset(data.x, data.y), batch_sampler=batches, generator=torch.Generator())
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                optimizer.step()
                steps += 1
            errors.append(error(model, data))
            sizes.append(batches.size)
    return model, monitor, Curve(errors, sizes, steps, batches.seen)


def grid(data: Data, plan: Plan) -> list[Characterised]:
    """One run for each learning rate and batch size."""
    found = []
    with tqdm(total=len(plan.rates) * len(plan.sizes), unit="run") as bar:
        for lr in plan.rates:
            for size in plan.sizes:
                sampler = fixed(data, size, plan.epochs)
                _, monitor, curve = train(data, sampler, lr, plan.epochs, plan.every, plan.seed)
                found.append(Characterised(lr, size, monitor.condition, monitor.length, curve.errors[-1]))
                bar.update()
    return found


def comparison(data: Data, plan: Plan) -> dict[str, list[Curve]]:
    """Fixed and growing batches, the same number of inputs for each, several seeds."""
    epochs = plan.long_epochs
    rules = {name: fixed(data, int(name), epochs) for name in ("16", "64", "256")}
    rules |= {"stages": staged(data, epochs), "automatic": automatic(data)}
    found: dict[str, list[Curve]] = defaultdict(list)
    with tqdm(total=len(rules) * plan.seeds, unit="run") as bar:
        for seed in range(plan.seed, plan.seed + plan.seeds):
            for name, sampler in rules.items():
                found[name].append(train(data, sampler, plan.lr, epochs, 10, seed)[2])
                bar.update()
    return dict(found)


# --- checks ---


def rows(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """J by definition: a backward for each input, ``[B, P]``."""
    found = []
    for one, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(LOSS(model(one[None]), label[None]), list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


def exactness(data: Data, seed: int, size: int = 32, steps: int = 4) -> Iterable[Check]:
    """A few steps against their definition, and against the same steps unwatched."""
    watched = network(data.x.shape[1], seed)
    plain = copy.deepcopy(watched)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (watched, plain)]
    condition = length = 0.0
    with TrainingMonitor(watched, LOSS, optimizers[0], every=1) as monitor:
        for k in range(steps):
            x, y = data.x[k * size :][:size], data.y[k * size :][:size]
            j = rows(plain, x, y)
            e = torch.linalg.svdvals(j)
            condition += float(e[0] / e[-1]) / steps
            length += 0.1 / size * float(j.norm())
            for model, optimizer in zip((watched, plain), optimizers, strict=True):
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                optimizer.step()
    last = monitor.history[-1]
    pairs = zip(watched.parameters(), plain.parameters(), strict=True)
    yield Check("mean C_k: singular values of J, row by row", condition, monitor.condition, 1e-6)
    yield Check("L_K: |J|_F, row by row", length, monitor.length, 1e-10)
    yield Check("tr Cov of the gradient, row by row", float(j.var(0).sum()), last.gradient_variance, 1e-10)
    yield Check("parameters, watched less unwatched", 0.0, max(float((a - b).detach().abs().max()) for a, b in pairs))


def nested(data: Data, seed: int, sizes: tuple[int, ...]) -> Iterable[Check]:
    """At one theta: a row more can neither lower the largest nor raise the smallest singular value (interlacing)."""
    model = network(data.x.shape[1], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with TrainingMonitor(model, LOSS, optimizer, every=1) as monitor:
        for size in sizes:
            optimizer.zero_grad()
            LOSS(model(data.x[:size]), data.y[:size]).backward()
            optimizer.step()
    found = np.array([one.condition for one in monitor.history])
    yield Check("C_k over that of a smaller batch in it, the least", 1.0, (found[1:] / found[:-1]).min(), 0.0, ">=")


def trends(runs: list[Characterised]) -> Iterable[Claim]:
    """What the paper's figures show of batch size and learning rate, as rank correlations."""

    def claim(fixed: str, along: str, measure: str, words: str, sign: int) -> Claim:
        groups = defaultdict(list)
        for run in runs:
            groups[getattr(run, fixed)].append((getattr(run, along), getattr(run, measure)))
        found = {key: float(spearmanr(*zip(*group, strict=True)).statistic) for key, group in groups.items()}
        listed = ", ".join(f"{key:g}: {value:+.2f}" for key, value in found.items())
        holds = min(sign * value for value in found.values()) > 0
        return Claim(words, f"{'+' if sign > 0 else '-'} at each", listed, holds)

    yield claim("lr", "batch_size", "condition", "at each lr the mean C_k rises with B", 1)
    yield claim("lr", "batch_size", "length", "at each lr L_K falls with B", -1)
    yield claim("batch_size", "lr", "length", "at each B L_K rises with lr", 1)


def fairness(curves: dict[str, list[Curve]], inputs: int) -> Iterable[Check]:
    """All rules get the same number of inputs."""
    seen = [curve.inputs for listed in curves.values() for curve in listed]
    yield Check("inputs trained on, the fewest of all runs", inputs, min(seen))
    yield Check("inputs trained on, the most of all runs", inputs, max(seen))
    yield Check("sizes of stages in order", 0, min(np.diff(c.sizes).min() for c in curves["stages"]), 0, ">=")


# --- what is shown ---


def outcome(curves: dict[str, list[Curve]]) -> Table:
    """Test errors at the end."""
    shown = Table(
        "batch", "test error (%)", "standard error", "steps", "last batch size", title="the same inputs for all"
    )
    for name, listed in curves.items():
        last = 100 * np.array([curve.errors[-1] for curve in listed])
        spread = last.std(ddof=1) / len(last) ** 0.5 if len(last) > 1 else float("nan")
        steps, size = np.mean([(curve.steps, curve.sizes[-1]) for curve in listed], axis=0)
        shown.add_row(name, f"{last.mean():.2f}", f"{spread:.2f}", f"{steps:.0f}", f"{size:.0f}")
    return shown


def draw(runs: list[Characterised], curves: dict[str, list[Curve]], path: Path) -> None:
    """The plane of the paper, and the comparison by epoch."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    parts = figure.add_gridspec(2, 2, width_ratios=(1.35, 1), height_ratios=(2, 1))
    draw_characterisation(figure.add_subplot(parts[:, 0]), runs)
    upper = figure.add_subplot(parts[0, 1])
    lower = figure.add_subplot(parts[1, 1], sharex=upper)
    for name, listed in curves.items():
        epochs = np.arange(1, len(listed[0].errors) + 1)
        errors = 100 * np.array([curve.errors for curve in listed])
        style: dict[str, Any] = {"color": COLOURS[name], "linewidth": 1.6}
        upper.plot(epochs, errors.mean(0), label=f"B = {name}" if name.isdigit() else name, **style)
        lower.plot(epochs, np.exp2(np.mean([np.log2(c.sizes) for c in listed], 0)), **style)
    upper.set(yscale="log", ylabel="test error (%), mean")
    upper.set_yticks([2, 3, 5, 10, 20, 50, 90], labels=["2", "3", "5", "10", "20", "50", "90"])
    upper.minorticks_off()
    upper.legend(frameon=False, fontsize=8)
    lower.set(yscale="log", ylabel="batch size", xlabel="passes over the data")
    lower.set_yticks(STAGES, labels=map(str, STAGES))
    lower.minorticks_off()
    for axis in (upper, lower):
        axis.grid(alpha=0.3, linewidth=0.5)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Runs the grid and the comparison, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small grid, 3 passes, 2 seeds")
    parser.add_argument("--mnist", type=Path, default=None, help="folder with MNIST's files; the digits if not given")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    plan = Plan(RATES, SIZES, 12, 30, 50, 5, options.seed)
    if options.quick:
        plan = replace(plan, rates=(0.2, 0.05), sizes=(32, 128), epochs=2, long_epochs=3, every=20, seeds=2)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the network is tiny
    data = load(options.mnist, options.seed)
    center = data.x.double().mean(0)
    data = data._replace(x=data.x - center, x_test=data.x_test - center)

    runs, curves = grid(data, plan), comparison(data, plan)
    draw(runs, curves, options.out / "characterising.png")
    Console(width=140).print(outcome(curves))
    Console(width=140).print(table("what the paper reports: rank correlations here", list(trends(runs))))
    checks = [*exactness(data, plan.seed), *nested(data, plan.seed, plan.sizes)]
    show("characterising", [*checks, *fairness(curves, plan.long_epochs * len(data.x))])
    print(f"picture: {(options.out / 'characterising.png').resolve()}")


if __name__ == "__main__":
    main()
