"""Gradient descent of wide networks on both sides of the rate 2/lambda_max of the Fisher matrix.

The loss is ``(1/2N) sum_n |f(x_n) - t_n|^2`` over the full batch, with targets t from another network of the same
kind, whose parameters are a minimum with F its Hessian. Started a little beside them along F's first eigenvector, the
loss is to change by ``(1 - rate lambda_max)^2`` a step: it falls below a rate of 2/lambda_max, and grows above. An
independent start, with the rate relative to F's largest eigenvalue there, is run too: beyond the bound the loss grows
at first, and then a network of finite width may find a flatter minimum, which a theory of one fixed F does not know.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from checks import Check
from mean_field import Ensemble, Sizes, network
from torch import Tensor, nn
from tqdm import tqdm

import fishopt
from fishopt.spectrum import fisher_gram, spectrum

GAUSSIAN = fishopt.Gaussian(variance=1.0)
RATES = {0.7: "#9ecae1", 0.9: "#2171b5", 1.1: "#fdae61", 1.5: "#d7301f"}
"""Learning rates as multiples of 2/lambda_max, and their colours."""
OFFSET, EARLY, STEPS = 1e-6, 8, 100
"""Distance of the start from the minimum; steps over which the loss's growth is checked; steps in all."""
LINEAR, CONVERGED = 1e-3, 1e-3
"""Tolerance on that growth, as the start is within 3e-4 of the minimum until then; loss left over of convergence."""


@dataclass(frozen=True)
class Descent:
    """Gradient descent's losses at each of `RATES`.

    Attributes:
        near: From beside the minimum.
        far: From an independent network.
        settled: For each rate the largest eigenvalue where the latter ended, as a multiple of 2 over the rate.
    """

    near: dict[float, list[float]]
    far: dict[float, list[float]]
    settled: dict[float, float]


def losses(model: nn.Module, x: Tensor, target: Tensor, rate: float, steps: int) -> list[float]:
    """Full-batch gradient descent, in place: the loss ``(1/2N) sum_n |f(x_n) - t_n|^2`` before each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum() / (2 * len(x))
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def beside(model: nn.Module, x: Tensor) -> tuple[nn.Module, float]:
    """A copy moved by `OFFSET` along the first eigenvector of F, and that eigenvalue.

    With u the first eigenvector of the Gram matrix ``J J^T / N``, that of F is ``J^T u`` over its length.
    """
    values, vectors = torch.linalg.eigh(fisher_gram(model, x, GAUSSIAN))
    parameters = list(model.parameters())
    # Signs and order of the rows are those of the outputs, flattened: S is one for unit variance.
    gradient = torch.autograd.grad((model(x).flatten() * vectors[:, -1]).sum(), parameters)
    length = torch.cat([part.flatten() for part in gradient]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, part in zip(moved.parameters(), gradient, strict=True):
            parameter.add_(part, alpha=OFFSET / float(length))
    return moved, float(values[-1])


def descend(ensemble: Ensemble, sizes: Sizes, generator: torch.Generator) -> Descent:
    """Descent at all rates, from both starts."""
    teacher, x = network(ensemble, sizes, generator)
    learner, _ = network(ensemble, sizes, generator)
    with torch.no_grad():
        target = teacher(x)
    close, largest = beside(teacher, x)
    own = spectrum(learner, x, GAUSSIAN).largest
    near, far, settled = {}, {}, {}
    for multiple in tqdm(RATES, desc=f"{ensemble.name}, descent", unit="rate"):
        near[multiple] = losses(copy.deepcopy(close), x, target, multiple * 2 / largest, STEPS)
        model = copy.deepcopy(learner)
        far[multiple] = losses(model, x, target, multiple * 2 / own, STEPS)
        settled[multiple] = multiple * spectrum(model, x, GAUSSIAN).largest / own
    return Descent(near, far, settled)


def descent_checks(ensemble: Ensemble, found: Descent) -> list[Check]:
    """That the loss changes as the bound has it."""
    checks = []
    for multiple, curve in found.near.items():
        what = f"{ensemble.name}: loss per step at {multiple} x 2/lambda_max"
        growth = (curve[EARLY] / curve[0]) ** (1 / EARLY)
        checks.append(Check(what, (1 - 2 * multiple) ** 2, growth, LINEAR))
        if multiple < 1:
            fall = found.far[multiple][-1] / found.far[multiple][0]
            what = f"{ensemble.name}: loss after {STEPS} steps at {multiple} x, independent start, over the first"
            checks.append(Check(what, CONVERGED, fall, relation="<="))
    return checks


def draw_descent(axis: Any, ensemble: Ensemble, found: Descent) -> None:
    """Losses from both starts."""
    for multiple, colour in RATES.items():
        axis.plot(found.near[multiple], color=colour, linewidth=1.6, label=f"{multiple} x")
        axis.plot(found.far[multiple], color=colour, linewidth=1.0, linestyle=(0, (3, 1)))
    axis.set(yscale="log", ylim=(1e-22, 1e9), xlim=(0, STEPS * 0.6), xlabel="step", ylabel="loss")
    axis.set_title(f"gradient descent, {ensemble.name}, rates in 2/$\\lambda_{{max}}$\n(dashed: independent start)")
    axis.legend(frameon=False, loc="upper center", ncols=4, handlelength=1, columnspacing=1)
