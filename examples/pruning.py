"""Pruning by Fisher saliency: which weights of a trained network can go, with no training after?

Optimal brain damage (LeCun et al. 1990) removes the weights of the smallest saliency, here with the Fisher diagonal in
the place of the Hessian's (Theis et al. 2018):

    s_i = 1/2 F_i theta_i^2     to second order the KL divergence of predictions (nats per input) without theta_i alone

Compared are the estimators of F, from few and from many training inputs with one label or sign vector each (`"exact"`
takes a column per class), magnitude |theta_i|, and random order: test accuracy on handwritten digits by the fraction of
weights kept, biases left alone. Negative entries of I2 count as zero, as in `fisher_penalty`.

The saliency of a single weight is right to a percent. Many weights at once are another matter: their effects add up in
the outputs, which the matrix's off-diagonal would know of and its diagonal does not. So the exact saliency from many
inputs is the better order where at least 30% of the weights are kept. Against what the theory is cited for, magnitude
is better where few are, and where the diagonal is from 16 inputs.

A seed is a split of scikit-learn's 1,797 images, a start and an order; seeds share the images, so the p-values, of
paired one-sided t-tests over seeds, are a little too small. Writes out/pruning.png.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checks import Check, better, show
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fishopt
from fishopt import plotting

ESTIMATORS = ("I1", "I2", "exact", "hutchinson", "empirical")
COLOURS = {"random": "0.75", "magnitude": "0.3", **plotting.COLOURS}
FEW, MANY = 16, 1024
KEPT: tuple[float, ...] = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)
MOST, LEAST = slice(1, 5), slice(6, None)
"""Of the fractions kept: 30 to 70%, 5 to 15%."""
Curves = dict[tuple[str, int], Tensor]
"""Test accuracy by order and number of inputs: ``[seed, fraction kept]``."""


def trained(x: Tensor, y: Tensor, generator: torch.Generator, epochs: int) -> nn.Sequential:
    """A network with two hidden layers, by Adam."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    for layer in (part for part in model if isinstance(part, nn.Linear)):  # torch's own bounds, from a generator
        bound = layer.in_features**-0.5
        for p in (layer.weight, layer.bias):
            nn.init.uniform_(p, -bound, bound, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
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


def kept_of(score: dict[str, Tensor], kept: float) -> dict[str, Tensor]:
    """Ones at the fraction ``kept`` of all weights, those of the highest score; zeros at the others."""
    flat = torch.cat([value.flatten() for value in score.values()])
    ones = torch.zeros_like(flat)
    # By rank, not by a threshold: scores of zero may be many.
    ones[flat.argsort(descending=True, stable=True)[: round(kept * len(flat))]] = 1.0
    parts = ones.split([value.numel() for value in score.values()])
    return {name: part.view_as(score[name]) for name, part in zip(score, parts, strict=True)}


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the network with its weights times ``masks``."""
    left = {name: weights(model)[name] * mask for name, mask in masks.items()}
    return torch.func.functional_call(model, left, (x,)).log_softmax(1)


def divergence(model: nn.Module, x: Tensor, masks: dict[str, Tensor]) -> float:
    """Mean KL divergence from the network's predictions to those of the masked one (nats per input)."""
    before, after = outputs(model, x, {}), outputs(model, x, masks)
    return float((before.exp() * (before - after)).sum(1).mean())


def single_weights(
    model: nn.Module, x: Tensor, score: dict[str, Tensor], count: int, generator: torch.Generator
) -> list[tuple[float, float]]:
    """Saliency and the divergence that it stands for, of ``count`` weights of each layer alone."""
    pairs = []
    for name, value in score.items():
        for i in torch.randperm(value.numel(), generator=generator)[:count].tolist():
            mask = torch.ones_like(value)
            mask.view(-1)[i] = 0.0
            pairs.append((float(value.view(-1)[i]), divergence(model, x, {name: mask})))
    return pairs


def together(model: nn.Module, x: Tensor, score: dict[str, Tensor], kept: float) -> float:
    """The divergence that pruning makes over the sum of the saliencies that are gone."""
    masks = kept_of(score, kept)
    gone = sum(float((value * (1 - masks[name])).sum()) for name, value in score.items())
    return divergence(model, x, masks) / gone


@dataclass(frozen=True)
class Run:
    """One network.

    Attributes:
        curves: Test accuracy by fraction kept, for each order and number of inputs.
        singles: Saliency and divergence of single weights.
        together: Divergence over summed saliency where half of the weights, and a tenth, are kept.
    """

    curves: dict[tuple[str, int], list[float]]
    singles: list[tuple[float, float]]
    together: tuple[float, float]


def run(seed: int, epochs: int, singles: int) -> Run:
    """All orders on one network."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, stratify=labels, random_state=seed)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    generator = torch.Generator().manual_seed(seed)
    model = trained(x, y, generator, epochs)
    theta = weights(model)
    scores = {
        ("random", 0): {n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in theta.items()},
        ("magnitude", 0): {n: p.abs() for n, p in theta.items()},
    }
    order = torch.randperm(len(x), generator=generator)
    for rows, name in product((order[:FEW], order[:MANY]), ESTIMATORS):
        targets = y[rows] if name == "empirical" else None
        diagonal = fishopt.fisher_diagonal(
            model, x[rows], "categorical", estimator=name, targets=targets, generator=generator
        )
        scores[name, len(rows)] = saliency(theta, diagonal)

    def accuracy(masks: dict[str, Tensor]) -> float:
        return float((outputs(model, x_test, masks).argmax(1) == y_test).double().mean())

    curves = {key: [accuracy(kept_of(score, kept)) for kept in KEPT] for key, score in scores.items()}
    seen, best = x[order[:MANY]], scores["exact", MANY]
    pairs = single_weights(model, seen, best, singles, generator)
    return Run(curves, pairs, (together(model, seen, best, 0.5), together(model, seen, best, 0.1)))


def compared(curves: Curves, first: tuple[str, int], second: tuple[str, int], part: slice) -> Check:
    """Whether the first order's accuracy, averaged over some of the fractions kept, is above the second's."""
    a, b = (curves[key][:, part].mean(1) for key in (first, second))
    words = " > ".join(f"{name} ({inputs} inputs)" if inputs else name for name, inputs in (first, second))
    return better(f"{min(KEPT[part]):.0%}-{max(KEPT[part]):.0%}: {words}", a, b)


def checks(curves: Curves, runs: list[Run]) -> list[Check]:
    """The saliency's scale and order, and what comes of pruning many weights at once."""
    predicted, measured = torch.tensor([pair for run in runs for pair in run.singles], dtype=torch.float64).T
    seen = predicted > 1e-12  # some pixels are zero in all images
    ratio = float((measured[seen] / predicted[seen]).median())
    rank = float(spearmanr(measured, predicted).statistic)
    half, tenth = (median(run.together[i] for run in runs) for i in (0, 1))
    whole = float(curves["exact", MANY][:, 0].mean())
    return [
        Check("single weights: median of KL / saliency", 1.0, ratio, 0.05),
        Check("single weights: rank correlation of KL and saliency", 0.95, rank, relation=">="),
        Check("half of the weights pruned: KL / summed saliency", 3.0, half, relation=">="),
        Check("all but a tenth pruned: KL / summed saliency", 10.0, tenth, relation=">="),
        Check("accuracy of the whole network", 0.95, whole, relation=">="),
    ]


def comparisons(curves: Curves) -> list[Check]:
    """Which order is better; it takes all seeds to tell."""
    return [
        compared(curves, ("magnitude", 0), ("random", 0), MOST),
        compared(curves, ("exact", MANY), ("magnitude", 0), MOST),
        compared(curves, ("magnitude", 0), ("exact", MANY), LEAST),
        compared(curves, ("magnitude", 0), ("exact", FEW), MOST),
        *(compared(curves, ("exact", FEW), (name, FEW), MOST) for name in ("I1", "I2", "empirical")),
        compared(curves, ("hutchinson", FEW), ("I1", FEW), MOST),
    ]


def draw(curves: Curves, path: Path) -> None:
    """Accuracy by fraction kept: estimates from few inputs, and from many."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, inputs in zip(figure.subplots(1, 2, sharey=True), (FEW, MANY), strict=True):
        for (name, from_inputs), values in curves.items():
            if from_inputs in (0, inputs):
                curve(axes, name, values)
        axes.set(xscale="log", title=f"Fisher diagonal from {inputs} inputs", xlabel="weights kept")
        axes.set_xticks(KEPT, [f"{kept:.0%}" if kept not in {0.7, 0.4, 0.15, 0.07} else "" for kept in KEPT])
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
    parser.add_argument("--quick", action="store_true", help="2 seeds of 15 epochs, too few to compare orders by")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    seeds, epochs, singles = (2, 15, 20) if options.quick else (20, 40, 50)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are small

    runs = [run(options.seed + i, epochs, singles) for i in tqdm(range(seeds), unit="seed")]
    curves = {key: torch.tensor([one.curves[key] for one in runs]) for key in runs[0].curves}
    show("Pruning by Fisher saliency", checks(curves, runs))
    if not options.quick:
        show("Accuracy by order, over the fractions of weights kept", comparisons(curves))
    draw(curves, options.out / "pruning.png")
    print(f"picture: {(options.out / 'pruning.png').resolve()}")


if __name__ == "__main__":
    main()
