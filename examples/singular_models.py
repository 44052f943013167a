"""The two singular models of `singularities.py`: population loss, Fisher matrix, coordinates, and checks of them.

A network of two erf units and a mixture of two normal densities, each with its truth; formulas are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from checks import Check
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jacfwd, jacrev, vmap
from torch.nn.functional import logsigmoid

import fishopt

DIMENSION = 2
"""Of the network's inputs."""
TRUE_NETWORK = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
"""w_1, w_2, J_1, J_2."""
TRUE_MIXTURE = torch.tensor([math.log(0.4 / 0.6), -0.6, 0.6], dtype=torch.float64)
"""logit v, mu_1, mu_2."""
GRID = torch.linspace(-10.0, 10.0, 201, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, its truth, and starts near one of its singular sets. P parameters, U of them the difference u.

    Attributes:
        name: Of the singular set.
        truth: theta ``[P]``.
        loss: theta ``[P]`` -> population loss over its least value (nats).
        metric: theta ``[P]`` -> Fisher information matrix ``[P, P]``.
        centred: Centred coordinates ``[P]``, the last U of them u -> theta ``[P]``.
        guess: Centred coordinates ``[P - U]`` without u, near the best ones.
        start: The best ones, generator, number of starts R, distance -> centred coordinates ``[R, P]``.
        plane: theta ``[P]`` -> v and ``|u|``: ``[2]``.
        zeros: Eigenvalues of F that vanish on the singular set.
        power: Of the distance, by which the smallest of them does.
        saddle: Whether the plateau is a strict saddle of the loss at all starts.
    """

    name: str
    truth: Tensor
    loss: Callable[[Tensor], Tensor]
    metric: Callable[[Tensor], Tensor]
    centred: Callable[[Tensor], Tensor]
    guess: Tensor
    start: Callable[[Tensor, torch.Generator, int, float], Tensor]
    plane: Callable[[Tensor], Tensor]
    zeros: int
    power: int
    saddle: bool


def kernel(theta: Tensor, other: Tensor) -> Tensor:
    """``E[f(x; theta) f(x; other)]`` of two networks, x ~ N(0, I)."""
    (w, j), (v, k) = ((t[:2], t[2:].reshape(2, DIMENSION)) for t in (theta, other))
    norms = (1 + j.square().sum(1))[:, None] * (1 + k.square().sum(1))
    return w @ (2 / math.pi * torch.asin(j @ k.T / norms.sqrt())) @ v


def network_loss(theta: Tensor) -> Tensor:
    """Half the mean squared error; KL to the truth, for unit noise."""
    return (kernel(theta, theta) - 2 * kernel(theta, TRUE_NETWORK) + kernel(TRUE_NETWORK, TRUE_NETWORK)) / 2


def network_metric(theta: Tensor) -> Tensor:
    """The exact Fisher matrix of the network."""
    return jacfwd(jacrev(kernel, 0), 1)(theta, theta)


def network_centred(point: Tensor) -> Tensor:
    """From ``(w, 2v - 1, J, u)``."""
    w, z, j, u = point[0], point[1], point[2 : 2 + DIMENSION], point[2 + DIMENSION :]
    return torch.cat([torch.stack([w * (1 + z) / 2, w * (1 - z) / 2]), j + (1 - z) / 2 * u, j - (1 + z) / 2 * u])


def network_plane(theta: Tensor) -> Tensor:
    return torch.stack([theta[0] / (theta[0] + theta[1]), (theta[2 : 2 + DIMENSION] - theta[2 + DIMENSION :]).norm()])


def uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)


def normal(generator: torch.Generator, count: int, size: int) -> Tensor:
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def equal_units(best: Tensor, generator: torch.Generator, count: int, distance: float) -> Tensor:
    """``|u|`` is the distance, its direction random, and v uniform in (1/4, 3/4)."""
    z, u = uniform(generator, count, -0.5, 0.5), normal(generator, count, DIMENSION)
    rows = best.repeat(count, 1)
    return torch.cat([rows[:, :1], z, rows[:, 2:], distance * u / u.norm(dim=1, keepdim=True)], 1)


def zero_weight(best: Tensor, generator: torch.Generator, count: int, distance: float) -> Tensor:
    """``|w_2|`` is the distance, its sign random, and u random of order one."""
    rows, sign = best.repeat(count, 1), uniform(generator, count, -1, 1).sign()
    z = 1 - 2 * distance * sign / rows[:, :1]
    return torch.cat([rows[:, :1], z, rows[:, 2:], normal(generator, count, DIMENSION)], 1)


def log_density(theta: Tensor) -> Tensor:
    """Of the mixture, on the grid."""
    weights = torch.stack([logsigmoid(theta[0]), logsigmoid(-theta[0])])
    return torch.logsumexp(weights - (GRID[:, None] - theta[1:]).square() / 2, 1) - math.log(2 * math.pi) / 2


def mixture_loss(theta: Tensor) -> Tensor:
    """``KL(truth || p)``."""
    true = log_density(TRUE_MIXTURE)
    return (true.exp() * (true - log_density(theta))).sum() * (GRID[1] - GRID[0])


def mixture_metric(theta: Tensor) -> Tensor:
    """The integral of p times the scores' outer product."""
    score, mass = jacfwd(log_density)(theta), log_density(theta).exp() * (GRID[1] - GRID[0])
    return (score * mass[:, None]).T @ score


def mixture_centred(point: Tensor) -> Tensor:
    """From ``(logit v, mean, u)``, ``u = mu_1 - mu_2``."""
    v = point[0].sigmoid()
    return torch.stack([point[0], point[1] + (1 - v) * point[2], point[1] - v * point[2]])


def mixture_plane(theta: Tensor) -> Tensor:
    return torch.stack([theta[0].sigmoid(), (theta[1] - theta[2]).abs()])


def equal_means(best: Tensor, generator: torch.Generator, count: int, distance: float) -> Tensor:
    """``|u|`` is the distance, its sign random, and v uniform in (1/4, 3/4)."""
    sign, v = uniform(generator, count, -1, 1).sign(), uniform(generator, count, 0.25, 0.75)
    return torch.cat([v.logit(), best[1].expand(count, 1), distance * sign], 1)


def nodes(order: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes and weights of N(0, 1)."""
    x, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(order))
    return x, weight / math.sqrt(2 * math.pi)


def network_by_quadrature(theta: Tensor) -> Tensor:
    """The network's Fisher matrix from its gradients at Gauss-Hermite nodes."""

    def output(theta: Tensor, x: Tensor) -> Tensor:
        return theta[:2] @ torch.erf(theta[2:].reshape(2, DIMENSION) @ x / math.sqrt(2))

    x, weight = nodes(80)
    inputs, mass = torch.cartesian_prod(*[x] * DIMENSION), torch.cartesian_prod(*[weight] * DIMENSION).prod(1)
    gradients = vmap(grad(output), (None, 0))(theta, inputs)
    return (gradients * mass[:, None]).T @ gradients


def mixture_by_quadrature(theta: Tensor) -> Tensor:
    """The mixture's Fisher matrix from its scores, in closed form, at the Gauss-Hermite nodes of each component."""
    x, weight = nodes(80)
    v = theta[0].sigmoid()
    y, mass = torch.cat([x + theta[1], x + theta[2]]), torch.cat([v * weight, (1 - v) * weight])
    # The posterior probability of the first component.
    first = (theta[0] + (y - theta[2]).square() / 2 - (y - theta[1]).square() / 2).sigmoid()
    scores = torch.stack([first - v, first * (y - theta[1]), (1 - first) * (y - theta[2])], 1)
    return (scores * mass[:, None]).T @ scores


EQUAL = Problem(
    "equal units",
    TRUE_NETWORK,
    network_loss,
    network_metric,
    network_centred,
    torch.tensor([2.0, 0.0, 0.5, 0.5], dtype=torch.float64),
    equal_units,
    network_plane,
    zeros=DIMENSION + 1,
    power=6,
    saddle=True,
)
ZERO = replace(EQUAL, name="zero output weight", start=zero_weight, zeros=DIMENSION, power=2, saddle=False)
MIXTURE = Problem(
    "equal means",
    TRUE_MIXTURE,
    mixture_loss,
    mixture_metric,
    mixture_centred,
    torch.zeros(2, dtype=torch.float64),
    equal_means,
    mixture_plane,
    zeros=2,
    power=6,
    saddle=True,
)
PROBLEMS = (EQUAL, ZERO, MIXTURE)


@cache
def plateau(problem: Problem) -> tuple[Tensor, float]:
    """Where the loss is least with ``u = 0``, a network of one unit or one normal density, and that loss.

    Returns:
        Centred coordinates without u ``[P - U]``, v being arbitrary, and the plateau's height (nats).
    """

    def loss(free: Tensor) -> Tensor:
        return problem.loss(problem.centred(torch.cat([free, free.new_zeros(len(problem.truth) - len(free))])))

    def both(free: np.ndarray) -> tuple[float, np.ndarray]:
        gradient, value = grad_and_value(loss)(torch.from_numpy(free))
        return value.item(), gradient.numpy()

    found = minimize(both, problem.guess.numpy(), jac=True, tol=1e-10)
    return torch.from_numpy(found.x), float(found.fun)


def starts(problem: Problem, seed: int, count: int, distance: float) -> Tensor:
    """Centred coordinates ``[R, P]`` near the plateau; the same seed gives the same ones but for the distance."""
    return problem.start(plateau(problem)[0], torch.Generator().manual_seed(seed), count, distance)


def eigenvalues(problem: Problem, seed: int, distances: Tensor) -> Tensor:
    """Of F at the first start, moved to each distance, ascending: ``[len(distances), P]``."""
    points = torch.cat([starts(problem, seed, 1, float(distance)) for distance in distances])
    return torch.linalg.eigvalsh(vmap(problem.metric)(vmap(problem.centred)(points)))


class Erf(nn.Module):
    """``erf(a / sqrt 2)``."""

    def forward(self, a: Tensor) -> Tensor:
        return torch.erf(a / math.sqrt(2))


def diagonal_scores(theta: Tensor, seed: int, chunks: int) -> Tensor:
    """How far fishopt's exact diagonal, from ``chunks`` of 1,000 inputs, is from K's, in standard errors: ``[P]``."""
    hidden, output = nn.Linear(DIMENSION, 2, bias=False).double(), nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        hidden.weight.copy_(theta[2:].reshape(2, DIMENSION))
        output.weight.copy_(theta[None, :2])
    model = nn.Sequential(hidden, Erf(), output)
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(chunks):
        x = torch.randn(1000, DIMENSION, generator=generator, dtype=torch.float64)
        diagonal = fishopt.fisher_diagonal(model, x, fishopt.Gaussian(variance=1.0), estimator="exact")
        found.append(torch.cat([diagonal["2.weight"].flatten(), diagonal["0.weight"].flatten()]))
    sample = torch.stack(found)
    return (sample.mean(0) - EQUAL.metric(theta).diagonal()) / (sample.std(0) / chunks**0.5)


def largest(a: Tensor) -> float:
    return float(a.abs().max())


def model_checks(seed: int, chunks: int) -> list[Check]:
    """That both Fisher matrices are right, and how they degenerate."""
    network, mixture = (p.centred(starts(p, seed, 1, 0.5)[0]) for p in (EQUAL, MIXTURE))
    pairs = (
        ("network: F from K", EQUAL.metric, network_by_quadrature, network),
        ("mixture: F from the grid", MIXTURE.metric, mixture_by_quadrature, mixture),
    )
    found = [
        Check(f"{what}, and by Gauss-Hermite: largest difference", 1e-10, largest(one(at) - other(at)), 0, "<=")
        for what, one, other, at in pairs
    ]
    worst = largest(diagonal_scores(network, seed, chunks))
    found.append(Check(f"fishopt's exact diagonal, {chunks},000 inputs: worst of 6, std errors", 4.5, worst, 0, "<="))
    for problem in PROBLEMS:
        zeros = int((eigenvalues(problem, seed, torch.zeros(1))[0].abs() < 1e-12).sum())
        name, power = problem.name, problem.power
        found += [
            Check(f"{name}: zero eigenvalues", problem.zeros, zeros),
            Check(f"{name}: power of the distance, smallest eigenvalue", power, slope(problem, seed, power, 0), 0.01),
        ]
        if power > 2:
            found.append(Check(f"{name}: power of the distance, the next one", 2, slope(problem, seed, 2, 1), 0.01))
    return [*found, determinant(seed)]


def slope(problem: Problem, seed: int, power: int, which: int) -> float:
    """The power by which an eigenvalue of F falls, at a distance where it is near 1e-10: well over rounding."""
    near = 1e-10 ** (1 / power)
    values = eigenvalues(problem, seed, torch.tensor([near, 2 * near], dtype=torch.float64))[:, which]
    return float((values[1] / values[0]).log2())


def determinant(seed: int) -> Check:
    """``det F`` of the mixture against ``c^4 u^8 / 12``."""
    point = starts(MIXTURE, seed, 1, 0.04)[0]
    v = float(point[0].sigmoid())
    expected = (v * (1 - v)) ** 4 * float(point[2]) ** 8 / 12
    return Check("equal means, |u| = 0.04: det F", expected, float(MIXTURE.metric(MIXTURE.centred(point)).det()), 0.01)
