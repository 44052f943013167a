"""Every optimizer at its defaults, on scikit-learn's tables and on MNIST: ``python -m benchmarks.defaults``.

Writes one JSON with its environment, and prints tables of medians over seeds, the README's last. MNIST takes
``--data-dir`` with the official IDX files in ``MNIST/raw``. Timings are ratios to AdamW (fused), runs interleaved.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn import datasets
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

import fishopt
from benchmarks.data import read_idx
from benchmarks.models import mlp

METHODS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model, loss: torch.optim.AdamW(model.parameters(), fused=True),
    "FisherAdam": fishopt.FisherAdam,
    "DiagonalNGD": fishopt.DiagonalNGD,
}


@dataclass(frozen=True)
class Problem:
    """Data and the network for it."""

    name: str
    widths: tuple[int, ...]
    activation: type[nn.Module]
    epochs: int
    batch: int
    classes: int


@dataclass(frozen=True)
class Result:
    """One training; ``error`` is the test error rate, or the mean squared error in units of the targets' variance."""

    problem: str
    method: str
    seed: int
    train_loss: float
    test_loss: float
    error: float
    seconds: float
    curvature_share: float


TABLES = [
    Problem(name, (64, 64), activation, epochs, 32, classes)
    for name, epochs, classes in (
        ("iris", 60, 3),
        ("wine", 60, 3),
        ("breast_cancer", 60, 2),
        ("digits", 20, 10),
        ("diabetes", 30, 0),
        ("friedman1", 60, 0),
    )
    for activation in (nn.ReLU, nn.Tanh)
]
MNIST = [Problem("mnist", (256, 256, 128), activation, 4, 128, 10) for activation in (nn.ReLU, nn.Sigmoid)]


def load(problem: Problem, seed: int, data_dir: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test inputs (standardised) and targets."""
    if problem.name == "mnist":
        assert data_dir is not None
        parts = [read_idx(data_dir / "MNIST" / "raw" / f"{p}-{k}-ubyte.gz") for p in ("train", "t10k") for k in _KINDS]
        images = [torch.tensor(part / 255, dtype=torch.float32).flatten(1) for part in parts[::2]]
        labels = [torch.tensor(part.astype(np.int64)) for part in parts[1::2]]
        return images[0], labels[0], images[1], labels[1]
    if problem.name == "friedman1":
        x, y = datasets.make_friedman1(600, noise=1.0, random_state=0)
    else:
        x, y = getattr(datasets, f"load_{problem.name}")(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    cut = 3 * len(x) // 4
    # Scaled by the training part; what is constant there, as some of the digits' pixels, is left as it is.
    inputs = torch.tensor(StandardScaler().fit(x[order[:cut]]).transform(x), dtype=torch.float32)[order]
    if problem.classes:
        targets = torch.tensor(y)[order]
    else:
        scaled = StandardScaler().fit(y[order[:cut], None]).transform(y[:, None])
        targets = torch.tensor(scaled, dtype=torch.float32)[order]
    return inputs[:cut], targets[:cut], inputs[cut:], targets[cut:]


_KINDS = ("images-idx3", "labels-idx1")


def run(problem: Problem, method: str, seed: int, data_dir: Path | None) -> Result:
    """Trains one network; the same seed gives every method the same split, weights and batches."""
    x, y, x_test, y_test = load(problem, seed, data_dir)
    torch.manual_seed(seed)
    sizes = (x.shape[1], *problem.widths, problem.classes or 1)
    model = mlp(sizes, problem.activation)
    loss_fn: nn.Module = nn.CrossEntropyLoss() if problem.classes else nn.MSELoss()
    optimizer = METHODS[method](model, loss_fn)
    start = time.perf_counter()
    for _ in range(problem.epochs):
        for rows in torch.randperm(len(x)).split(problem.batch):
            optimizer.zero_grad()
            loss_fn(model(x[rows]), y[rows]).backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        h = model(x_test)
        train_loss, test_loss = float(loss_fn(model(x), y)), float(loss_fn(h, y_test))
    error = float((h.argmax(1) != y_test).float().mean()) if problem.classes else test_loss
    ours = isinstance(optimizer, fishopt.FisherAdam | fishopt.DiagonalNGD)
    share = optimizer.report().curvature_share if ours else 0.0
    name = f"{problem.name} {problem.activation.__name__}"
    return Result(name, method, seed, train_loss, test_loss, error, seconds, share)


def show(results: list[Result]) -> Table:
    """Medians over seeds; time as the median over seeds of the ratio to AdamW."""
    table = Table(title="optimizers at their defaults: medians over seeds")
    for heading in ("problem", "method", "train loss", "test loss", "test error", "time / AdamW", "curvature share"):
        table.add_column(heading, justify="left" if heading in ("problem", "method") else "right", no_wrap=True)
    for problem in dict.fromkeys(r.problem for r in results):
        base = {r.seed: r.seconds for r in results if r.problem == problem and r.method == "AdamW"}
        for method in METHODS:
            group = [r for r in results if r.problem == problem and r.method == method]
            middle = [f"{median(getattr(r, key) for r in group):.4f}" for key in ("train_loss", "test_loss", "error")]
            ratio = median(r.seconds / base[r.seed] for r in group)
            share = median(r.curvature_share for r in group)
            table.add_row(problem, method, *middle, f"{ratio:.2f}", f"{share:.0%}")
        table.add_section()
    return table


def markdown(results: list[Result]) -> str:
    """The README's table: median test errors, train losses in brackets, and the ratio of times."""
    lines = ["| problem | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for problem in dict.fromkeys(r.problem for r in results):
        cells = []
        for method in METHODS:
            group = [r for r in results if r.problem == problem and r.method == method]
            cells.append(f"{median(r.error for r in group):.3f} ({median(r.train_loss for r in group):.4f})")
        lines.append(f"| {problem} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs everything, interleaved, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw/*.gz; without it, tables only")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/defaults.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    problems = TABLES + (MNIST if options.data_dir else [])
    jobs = [(p, method, seed) for p in problems for seed in range(options.seeds) for method in METHODS]
    run(TABLES[0], "FisherAdam", 0, None)  # lazy imports and thread pools, not to be timed
    results = [run(*job, options.data_dir) for job in tqdm(jobs, unit="run")]
    environment = {"torch": torch.__version__, "python": platform.python_version(), "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(asdict(result)) for result in results)
    options.out.write_text(f'{{"environment": {json.dumps(environment)}, "results": [\n{rows}\n]}}\n')
    Console(width=120).print(show(results))
    print(markdown(results))
    print(f"results: {options.out}")


if __name__ == "__main__":
    main()
