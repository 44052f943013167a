"""Handwritten digits: AdamW, FisherAdam and DiagonalNGD at their defaults, with the same budget.

The 1,797 digits come with scikit-learn. Writes out/digits.png, and out/digits_choices.png with the estimator choices.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fishopt

LOSS = nn.CrossEntropyLoss()
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "FisherAdam": lambda model: fishopt.FisherAdam(model, LOSS),
    "DiagonalNGD": lambda model: fishopt.DiagonalNGD(model, LOSS),
}
COLOURS = {"AdamW": "0.4", "FisherAdam": "#4c72b0", "DiagonalNGD": "#c44e52"}
TARGET = 0.95


@dataclass
class Run:
    """One training: test accuracy and loss by step, time without evaluation."""

    name: str
    optimizer: torch.optim.Optimizer
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def to_target(self) -> tuple[float, float]:
        """Steps and seconds until the test accuracy first reaches the target; infinite if it never does."""
        reached = [i for i, value in enumerate(self.accuracy) if value >= TARGET]
        return (self.steps[reached[0]], self.seconds[reached[0]]) if reached else (float("inf"), float("inf"))


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, ``[N, 64]`` in [0, 1], and labels; a quarter is held out."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.25, stratify=labels, random_state=seed)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    return x.float(), y.long(), x_test.float(), y_test.long()


def train(name: str, seed: int, epochs: int, bar: tqdm[None]) -> Run:
    """Trains one network; the same seed gives every optimizer the same weights and batches."""
    x, y, x_test, y_test = digits(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))
    run = Run(name, OPTIMIZERS[name](model))
    step, seconds = 0, 0.0
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            start = time.perf_counter()
            run.optimizer.zero_grad()
            LOSS(model(x[rows]), y[rows]).backward()
            run.optimizer.step()
            seconds += time.perf_counter() - start
            step += 1
            if step % 10 == 0:
                with torch.no_grad():
                    h = model(x_test)
                run.steps.append(step)
                run.seconds.append(seconds)
                run.loss.append(float(LOSS(h, y_test)))
                run.accuracy.append(float((h.argmax(1) == y_test).float().mean()))
        bar.update()
    return run


def table(runs: dict[str, list[Run]]) -> Table:
    """Medians over seeds."""
    result = Table(title=f"digits, test set: medians over {len(next(iter(runs.values())))} seeds")
    columns = ("optimizer", "accuracy", "loss", "steps to 95%", "seconds to 95%", "seconds", "curvature share")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for name, group in runs.items():
        steps, seconds = (median(run.to_target()[i] for run in group) for i in (0, 1))
        shares = [r.optimizer.report().curvature_share for r in group if isinstance(r.optimizer, OURS)]
        result.add_row(
            name,
            f"{median(run.accuracy[-1] for run in group):.1%}",
            f"{median(run.loss[-1] for run in group):.3f}",
            f"{steps:.0f}" if steps < float("inf") else "not reached",
            f"{seconds:.2f}" if steps < float("inf") else "not reached",
            f"{median(run.seconds[-1] for run in group):.2f}",
            f"{median(shares):.0%}" if shares else "-",
        )
    return result


OURS = (fishopt.FisherAdam, fishopt.DiagonalNGD)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Test loss by step and by time, and error by step: each seed thin, the median thick."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, group in runs.items():
        middle = Run(name, group[0].optimizer, group[0].steps)
        for key in ("accuracy", "loss", "seconds"):
            values = zip(*(getattr(run, key) for run in group), strict=True)
            setattr(middle, key, [median(v) for v in values])
        for run, style in [(r, {"alpha": 0.25, "linewidth": 0.7}) for r in group] + [(middle, {"label": name})]:
            options = {"color": COLOURS[name], **style}
            axes[0].plot(run.steps, run.loss, **options)
            axes[1].plot(run.seconds, run.loss, **options)
            axes[2].plot(run.steps, [max(1 - a, 1e-3) for a in run.accuracy], **options)
    axes[2].axhline(1 - TARGET, color="0.7", linewidth=0.8, linestyle="--")
    for axis, xlabel, ylabel in zip(
        axes, ("step", "seconds of training", "step"), ("test loss", "test loss", "test error"), strict=True
    ):
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
        axis.grid(alpha=0.3, linewidth=0.5)
    axes[0].legend(frameon=False)
    figure.suptitle("Handwritten digits, every optimizer at its defaults")
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Trains, prints the tables, saves the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25, help="passes over the training set")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each optimizer")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)

    runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
    with tqdm(total=len(runs) * options.seeds * options.epochs, unit="epoch", desc="training") as bar:
        for seed in range(options.seeds):
            for name in OPTIMIZERS:  # interleaved, so that a slow moment of the machine hits all of them
                runs[name].append(train(name, seed, options.epochs, bar))

    console = Console()
    console.print(table(runs))
    for name in ("FisherAdam", "DiagonalNGD"):
        optimizer = runs[name][0].optimizer
        assert isinstance(optimizer, OURS)
        print(optimizer.report())
    draw(runs, options.out / "digits.png")
    fisher_adam = runs["FisherAdam"][0].optimizer
    assert isinstance(fisher_adam, OURS)
    fisher_adam.report().plot(options.out / "digits_choices.png")
    print(f"choices over training: {options.out / 'digits_choices.png'}")
    print(f"curves: {(options.out / 'digits.png').resolve()}")


if __name__ == "__main__":
    main()
