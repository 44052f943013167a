"""Figure 1 of the paper: natural gradient by either estimator of a 2 x 2 Fisher matrix, on two toy problems.

Inputs x ~ N(0, I) in the plane and a = x1 + x2; regression y ~ N(a, 1), classification y ~ Bernoulli(sigmoid(a)). The
model h = theta^T x trains for 256 epochs on 256 points, 4 to a step, by

    theta <- theta - lr * (F + damping)^-1 g,    F by I1 or I2 (Eq. 3) from the same 4 points, one sampled label each.

The paper's appendix prints a label mean of 1 for the regression; a is what the model can fit, and what is taken here.
It names no damping: without any, I1's matrix of 4 points is now and then all but singular, and throws theta away, which
is counted in shorter runs. Both estimators see the same data in the same order, in many repetitions at once. Writes
out/figure1.png, and out/figure1.json with the curves and the paper's claims, checked by number.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from claims import Claim, table
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

import fishopt

TRUE = torch.tensor([1.0, 1.0], dtype=torch.float64)
POINTS, TEST_POINTS, BATCH, LR, DAMPING = 256, 4096, 4, 0.01, 0.01
FAR = 10.0
"""Farther than this from the truth theta has been thrown away."""
LIKELIHOODS: dict[str, fishopt.Likelihood] = {
    "regression": fishopt.Gaussian(variance=1.0),
    "classification": fishopt.Bernoulli(),
}
ESTIMATORS = ("I1", "I2")
COLOURS = {"I1": "#c44e52", "I2": "#4c72b0"}


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    repetitions: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Run:
    """All repetitions of one estimator on one problem; R repetitions, E epochs, S steps.

    Attributes:
        path: theta before each step, and after the last: ``[S + 1, R, 2]``.
        excess: Test loss, less the least possible one, before each epoch and after the last: ``[E + 1, R]`` (nats).
    """

    path: Tensor
    excess: Tensor


def labels(likelihood: fishopt.Likelihood, h: Tensor, generator: torch.Generator) -> Tensor:
    """One label for each number in ``h``, of its shape."""
    return likelihood.sample(h.reshape(-1, 1), 1, generator)[0].reshape(h.shape)


def outer(x: Tensor, weight: Tensor) -> Tensor:
    """``mean_n weight_n x_n x_n^T`` of each repetition: ``[R, 2, 2]`` from ``[R, n, 2]`` and ``[R, n]``."""
    return torch.einsum("rni,rn,rnj->rij", x, weight, x) / x.shape[1]


def flat(likelihood: fishopt.Likelihood, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Residual ``eta - y`` and conditional Fisher information ``I(h|x)`` for each number in ``h``."""
    column = h.reshape(-1, 1)
    residual = likelihood.residual(column, y.reshape(-1, 1))
    return residual.reshape(h.shape), likelihood.covariance_diagonal(column).reshape(h.shape)


def solved(matrix: Tensor, damping: float, vector: Tensor) -> Tensor:
    """``(matrix + damping)^-1 vector`` of each repetition; infinite, not an error, where that is singular."""
    a, b, c = (matrix[:, 0, 0] + damping, matrix[:, 0, 1], matrix[:, 1, 1] + damping)
    u, v = vector.unbind(1)
    return torch.stack([c * u - b * v, a * v - b * u], 1) / (a * c - b * b)[:, None]


def train(problem: str, estimator: str, sizes: Sizes, damping: float, bar: tqdm[None]) -> Run:
    """Trains all repetitions at once; the same seed gives both estimators the same data and order."""
    likelihood = LIKELIHOODS[problem]
    data, draws = (torch.Generator().manual_seed(2 * sizes.seed + i) for i in (0, 1))
    x = torch.randn(sizes.repetitions, POINTS, 2, generator=data, dtype=torch.float64)
    x_test = torch.randn(sizes.repetitions, TEST_POINTS, 2, generator=data, dtype=torch.float64)
    y, y_test = (labels(likelihood, part @ TRUE, data) for part in (x, x_test))
    theta = torch.randn(sizes.repetitions, 2, generator=data, dtype=torch.float64)
    every = torch.arange(sizes.repetitions)[:, None]
    path = [theta]
    for _ in range(sizes.epochs):
        order = torch.rand(sizes.repetitions, POINTS, generator=data).argsort(1)
        for rows in order.split(BATCH, dim=1):
            xs, ys = x[every, rows], y[every, rows]
            h = (xs @ theta[:, :, None]).squeeze(2)
            residual, information = flat(likelihood, h, ys)
            sampled, _ = flat(likelihood, h, labels(likelihood, h, draws))
            # h is linear in theta, so I2 is the exact matrix of these points, whatever the labels (Remark 4.4).
            both = {"I1": outer(xs, sampled.square()), "I2": outer(xs, information)}
            gradient = (residual[:, :, None] * xs).mean(1)
            theta = theta - LR * solved(both[estimator], damping, gradient)
            path.append(theta)
        bar.update()
    return finished(likelihood, torch.stack(path), x_test, y_test)


def finished(likelihood: fishopt.Likelihood, path: Tensor, x: Tensor, y: Tensor) -> Run:
    """The run with its test losses, over the least that any theta has on these test points."""

    def loss(theta: Tensor) -> Tensor:
        h = (x @ theta[:, :, None]).reshape(-1, 1)
        return likelihood.nll(h, y.reshape(-1, 1)).reshape(y.shape).mean(1)

    best = TRUE.expand(len(x), 2)
    for _ in range(5):  # Newton's method, from nearby
        residual, information = flat(likelihood, (x @ best[:, :, None]).squeeze(2), y)
        best = best - solved(outer(x, information), 0.0, (residual[:, :, None] * x).mean(1))
    return Run(path, torch.stack([loss(theta) for theta in path[:: POINTS // BATCH]]) - loss(best))


def label_variances(problem: str, theta: Tensor, seed: int) -> dict[str, float]:
    """The label variance of a diagonal entry, E_x[V_j(theta_i|x)], in closed form (Lemma 3.1), by fishopt."""
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(theta)
    x = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = {e: fishopt.label_variance(model, x, LIKELIHOODS[problem], estimator=e) for e in ESTIMATORS}
    return {e: float(value["weight"].mean()) for e, value in found.items()}


def measures(run: Run) -> dict[str, Tensor]:
    """What the claims are about, for each repetition: ``[R]``.

    Over the second half of training, where there is nothing left to learn: the root mean square of the change of the
    test loss from one epoch to the next, and the variance of theta.
    """
    late_loss, late_path = run.excess[len(run.excess) // 2 :], run.path[len(run.path) // 2 :]
    return {
        "roughness": late_loss.diff(dim=0).square().mean(0).sqrt(),
        "spread": late_path.var(0).sum(1),
    }


def thrown(run: Run) -> int:
    """The repetitions in which theta was far away at some step, or not a number."""
    distance = (run.path - TRUE).norm(dim=2)
    return int((distance.isnan() | (distance > FAR)).any(0).sum())


def numbers(run: Run) -> dict[str, list[float]]:
    """What of a run is kept."""
    kept = {key: value.tolist() for key, value in measures(run).items()}
    return {"median_excess": run.excess.median(1).values.tolist(), **kept}


def check(problem: str, runs: dict[str, Run], undamped: dict[str, Run], variances: dict[str, float]) -> list[Claim]:
    """The paper's claims about Figure 1, and what comes of no damping."""
    lost = {name: thrown(run) for name, run in undamped.items()}
    first, second = (measures(runs[name]) for name in ESTIMATORS)
    count = len(first["roughness"])
    smoother = int((second["roughness"] < first["roughness"]).sum())
    ratios = {key: float((first[key] / second[key]).median()) for key in ("roughness", "spread")}
    return [
        Claim(
            f"{problem}: I2's label variance is the lower, in closed form",
            "V2 < V1",
            f"V2 = {variances['I2']:.1e}, V1 = {variances['I1']:.2f}",
            variances["I2"] < variances["I1"],
        ),
        Claim(
            f"{problem}: I2's test loss curve is smoother",
            "in most repetitions",
            f"in {smoother} of {count}; I1's is {ratios['roughness']:.1f}x as rough",
            2 * smoother > count and ratios["roughness"] > 1,
        ),
        Claim(
            f"{problem}: theta varies less under I2",
            "variance of I1 > I2",
            f"I1's is {ratios['spread']:.1f}x I2's",
            ratios["spread"] > 1,
        ),
        Claim(
            f"{problem}: without damping I2 stays, I1 may not",
            "repetitions thrown away: I2 0, I1 some",
            f"I2 {lost['I2']}, I1 {lost['I1']} of {count} in {len(undamped['I1'].excess) - 1} epochs",
            lost["I2"] == 0 < lost["I1"],
        ),
    ]


def draw(runs: dict[str, dict[str, Run]], path: Path) -> None:
    """For each problem test loss by epoch, and the way of theta in the first repetition."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    for axes, (problem, found) in zip(figure.subplots(2, 2, width_ratios=(1.6, 1)), runs.items(), strict=True):
        for name, run in found.items():
            losses(axes[0], run, name)
            # Every epoch's theta: all steps would be a blot.
            way = run.path[:: POINTS // BATCH, 0]
            axes[1].plot(way[:, 0], way[:, 1], color=COLOURS[name], linewidth=0.8, marker=".", markersize=2, label=name)
        axes[0].set(yscale="log", xlim=(0, len(run.excess) - 1), ylim=(1e-4, 3))
        axes[0].set(title=problem, xlabel="epoch", ylabel="test loss - its minimum (nats)")
        axes[1].plot(*TRUE.tolist(), marker="*", color="0.1", markersize=11, linestyle="", label="truth")
        axes[1].set(title="theta at each epoch, first repetition", xlabel="theta 1", ylabel="theta 2", aspect="equal")
        axes[1].set(adjustable="datalim")
        for axis in axes:
            axis.grid(alpha=0.3, linewidth=0.5)
            axis.legend(frameon=False)
    figure.suptitle("Natural gradient by the 2 x 2 Fisher matrix, estimated from 4 points a step")
    figure.savefig(path, dpi=130)


def losses(axis: Any, run: Run, name: str) -> None:
    """The first repetition's curve, and the median and middle four fifths of all."""
    epochs = range(len(run.excess))
    low, middle, high = (run.excess.quantile(q, dim=1) for q in (0.1, 0.5, 0.9))
    axis.fill_between(epochs, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axis.plot(epochs, run.excess[:, 0], color=COLOURS[name], linewidth=0.5, alpha=0.6)
    axis.plot(epochs, middle, color=COLOURS[name], linewidth=1.8, label=f"{name}, median of {run.excess.shape[1]}")


def main(arguments: list[str] | None = None) -> None:
    """Trains, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20, help="data sets, each with its own start and order")
    parser.add_argument("--epochs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="8 repetitions of 24 epochs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for picture and numbers")
    options = parser.parse_args(arguments)
    sizes = Sizes(8, 24, options.seed) if options.quick else Sizes(options.repetitions, options.epochs, options.seed)
    short = replace(sizes, epochs=-(-sizes.epochs // 4))
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are tiny

    with tqdm(total=len(LIKELIHOODS) * len(ESTIMATORS) * (sizes.epochs + short.epochs), unit="epoch") as bar:
        runs, undamped = (
            {p: {name: train(p, name, size, damping, bar) for name in ESTIMATORS} for p in LIKELIHOODS}
            for size, damping in ((sizes, DAMPING), (short, 0.0))
        )
    variances = {problem: label_variances(problem, TRUE, sizes.seed) for problem in runs}
    claims = [claim for p in runs for claim in check(p, runs[p], undamped[p], variances[p])]
    content = {
        "settings": {**asdict(sizes), "lr": LR, "batch": BATCH, "points": POINTS, "damping": DAMPING},
        "claims": [asdict(claim) for claim in claims],
        "label_variance": variances,
        "runs": {p: {name: numbers(run) for name, run in found.items()} for p, found in runs.items()},
    }
    (options.out / "figure1.json").write_text(json.dumps(content) + "\n")
    draw(runs, options.out / "figure1.png")
    Console(width=140).print(table("Figure 1, the claims", claims))
    print(f"picture: {(options.out / 'figure1.png').resolve()}")


if __name__ == "__main__":
    main()
