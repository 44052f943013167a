"""Pruning by Fisher saliency: which weights of a trained network can go, with no training after?

Optimal brain damage (LeCun et al. 1990) removes the weights of the smallest saliency, here with the Fisher diagonal in
the place of the Hessian's (Theis et al. 2018):

    s_i = 1/2 F_i theta_i^2     the KL divergence of predictions (nats per input) that zeroing theta_i alone makes

to second order. Compared are the estimators of F, from few and from many training inputs with one label or sign vector
each (`"exact"` takes a column per class), magnitude |theta_i|, and random order: test accuracy on handwritten digits by
the fraction of weights kept, biases left alone. Negative entries of I2 count as zero, as in `fisher_penalty`.

A seed is a split of scikit-learn's 1,797 images, a start and an order; seeds share the images, so the p-values, of
paired t-tests over seeds on the mean accuracy over all fractions, are a little too small. Writes out/pruning.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from checks import Check, show
from matplotlib.figure import Figure
from scipy.stats import spearmanr, ttest_rel
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fishopt

ESTIMATORS = ("I1", "I2", "exact", "hutchinson", "empirical")
COLOURS = dict(
    zip(
        ("random", "magnitude", *ESTIMATORS),
        ("0.75", "0.3", "#c44e52", "#dd8452", "#4c72b0", "#55a868", "#8172b3"),
        strict=True,
    )
)
FEW, MANY = 16, 1024
KEPT = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)
LEVEL = 0.05
"""Of the tests."""

Curves = dict[tuple[str, int], Tensor]
"""Test accuracy by order and number of inputs: ``[seed, fraction kept]``."""


def trained(x: Tensor, y: Tensor, seed: int, epochs: int) -> nn.Sequential:
    """A network with two hidden layers, by Adam."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What may be pruned: the matrices."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}


def saliency(theta: dict[str, Tensor], diagonal: dict[str, Tensor]) -> dict[str, Tensor]:
    """``1/2 max(F_i, 0) theta_i^2``."""
    return {name: 0.5 * diagonal[name].clamp_min(0) * value.square() for name, value in theta.items()}


def pruned(model: nn.Module, score: dict[str, Tensor], kept: float, x: Tensor) -> Tensor:
    """The network's output where only the fraction ``kept`` of its weights is left, those of the highest score."""
    flat = torch.cat([value.flatten() for value in score.values()])
    keep = torch.zeros_like(flat)
    # By rank, not by a threshold: scores of zero may be many.
    keep[flat.argsort(descending=True, stable=True)[: round(kept * len(flat))]] = 1.0
    theta = weights(model)
    masks = keep.split([value.numel() for value in theta.values()])
    left = {name: value * mask.view_as(value) for (name, value), mask in zip(theta.items(), masks, strict=True)}
    with torch.no_grad():
        return torch.func.functional_call(model, left, (x,))


@torch.no_grad()
def kl_without(model: nn.Module, x: Tensor, name: str, index: int) -> float:
    """Mean KL divergence from the network's predictions to those without one weight (nats per input)."""
    before = model(x).log_softmax(1)
    left = weights(model)[name].clone()
    left.view(-1)[index] = 0.0
    after = torch.func.functional_call(model, {name: left}, (x,)).log_softmax(1)
    return float((before.exp() * (before - after)).sum(1).mean())


def single_weights(
    model: nn.Module, x: Tensor, score: dict[str, Tensor], count: int, generator: torch.Generator
) -> list[tuple[float, float]]:
    """Saliency and the divergence that it stands for, of ``count`` weights of each layer."""
    pairs = []
    for name, value in score.items():
        for i in torch.randperm(value.numel(), generator=generator)[:count].tolist():
            pairs.append((float(value.view(-1)[i]), kl_without(model, x, name, i)))
    return pairs


def run(seed: int, epochs: int, singles: int) -> tuple[dict[tuple[str, int], list[float]], list[tuple[float, float]]]:
    """All orders on one network: test accuracy by fraction kept, and what single weights do."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, stratify=labels, random_state=seed)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    model, generator = trained(x, y, seed, epochs), torch.Generator().manual_seed(seed)
    theta = weights(model)
    order = torch.randperm(len(x), generator=generator)
    scores = {
        ("random", 0): {n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in theta.items()},
        ("magnitude", 0): {n: p.abs() for n, p in theta.items()},
    }
    for inputs in (FEW, MANY):
        rows = order[:inputs]
        for name in ESTIMATORS:
            targets = y[rows] if name == "empirical" else None
            diagonal = fishopt.fisher_diagonal(
                model, x[rows], "categorical", estimator=name, targets=targets, generator=generator
            )
            scores[name, inputs] = saliency(theta, diagonal)
    curves = {
        key: [float((pruned(model, score, kept, x_test).argmax(1) == y_test).double().mean()) for kept in KEPT]
        for key, score in scores.items()
    }
    return curves, single_weights(model, x[order[:MANY]], scores["exact", MANY], singles, generator)


def better(curves: Curves, first: tuple[str, int], second: tuple[str, int]) -> Check:
    """Whether the first order's accuracy, averaged over the fractions kept, is above the second's."""
    a, b = (curves[key][:, 1:].mean(1) for key in (first, second))
    words = " > ".join(f"{name} ({inputs} inputs)" if inputs else name for name, inputs in (first, second))
    p = float(ttest_rel(a, b, alternative="greater").pvalue)
    return Check(f"{words}, by {100 * float((a - b).mean()):.1f} points: p-value", LEVEL, p, relation="<=")


def checks(curves: Curves, singles: list[tuple[float, float]]) -> list[Check]:
    """The saliency's scale and order, and which order of pruning is better."""
    predicted, measured = torch.tensor(singles, dtype=torch.float64).T
    small = (predicted > 1e-9) & (predicted < predicted.median())
    whole = curves["exact", MANY][:, 0].mean()
    return [
        Check(
            "single weights of small saliency: median of KL / saliency",
            1.0,
            float((measured[small] / predicted[small]).median()),
            0.05,
        ),
        Check(
            "all single weights: rank correlation of KL and saliency",
            0.95,
            float(spearmanr(measured, predicted).statistic),
            relation=">=",
        ),
        Check("accuracy of the whole network", 0.95, float(whole), relation=">="),
        better(curves, ("magnitude", 0), ("random", 0)),
        better(curves, ("exact", MANY), ("magnitude", 0)),
        better(curves, ("exact", FEW), ("I1", FEW)),
        better(curves, ("hutchinson", FEW), ("I1", FEW)),
        better(curves, ("exact", FEW), ("I2", FEW)),
        better(curves, ("exact", FEW), ("magnitude", 0)),
    ]


def draw(curves: Curves, path: Path) -> None:
    """Accuracy by fraction kept: estimates from few inputs, and from many."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, inputs in zip(figure.subplots(1, 2, sharey=True), (FEW, MANY), strict=True):
        for (name, from_inputs), values in curves.items():
            if from_inputs in (0, inputs):
                curve(axes, name, values)
        axes.set(xscale="log", title=f"Fisher diagonal from {inputs} inputs", xlabel="weights kept")
        axes.set_xticks(KEPT, [f"{kept:.0%}" if kept not in (0.7, 0.4, 0.15, 0.07) else "" for kept in KEPT])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(frameon=False, loc="lower left")
    figure.axes[0].set(ylabel="test accuracy")
    seeds = len(next(iter(curves.values())))
    figure.suptitle(f"Pruning a network for digits, nothing trained after: mean and standard error of {seeds} seeds")
    figure.savefig(path, dpi=110)


def curve(axes: Any, name: str, values: Tensor) -> None:
    """One order's mean and standard error over seeds."""
    spread = values.std(0) / len(values) ** 0.5
    style = "-" if name in ESTIMATORS else "--"
    axes.errorbar(
        KEPT, values.mean(0), spread, color=COLOURS[name], label=name, linestyle=style, linewidth=1.4, capsize=2
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, prunes, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--quick", action="store_true", help="4 seeds of 15 epochs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    seeds, epochs, singles = (4, 15, 20) if options.quick else (12, 40, 100)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are small

    found = [run(options.seed + i, epochs, singles) for i in tqdm(range(seeds), unit="seed")]
    curves = {key: torch.tensor([run_curves[key] for run_curves, _ in found]) for key in found[0][0]}
    show("Pruning by Fisher saliency", checks(curves, [pair for _, pairs in found for pair in pairs]))
    draw(curves, options.out / "pruning.png")
    print(f"picture: {(options.out / 'pruning.png').resolve()}")


if __name__ == "__main__":
    main()
