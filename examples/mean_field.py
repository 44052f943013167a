"""Wide random networks, and the mean-field theory of their Fisher matrix.

A fully connected network of L layers, all of width M, inputs too, but for C linear outputs f; inputs x ~ N(0, 1_M),
weights N(0, w / M), biases N(0, b). Let ``q^l = w qhat^(l-1) + b`` be the variance of what layer l's activation phi
takes in, ``p^l = w phat^(l-1) + b`` its covariance between two inputs, and

    qhat^0 = 1, qhat^l = E phi(u)^2;            qtil^L = 1, qtil^l = w qtil^(l+1) E phi'(u)^2
    phat^0 = 0, phat^l = E phi(u) phi(v);       ptil^L = 1, ptil^l = w ptil^(l+1) E phi'(u) phi'(v)

over (u, v) normal of variance q^l and covariance p^l. With ``alpha = L - 1`` (in general the sum over hidden layers of
the products of their two widths over M^2), which makes P = alpha M^2 to leading order,
``kappa1 = sum_l qtil^l qhat^(l-1) / alpha`` and ``kappa2 = sum_l ptil^l phat^(l-1) / alpha``, the P x P matrix of N
inputs ``F = (1/N) sum_n sum_k grad f_k(x_n) grad f_k(x_n)^T`` has for M -> infinity (Karakida, Akaho & Amari,
"Universal statistics of Fisher information in deep neural networks: mean field approach", AISTATS 2019)

    mean eigenvalue  kappa1 C / M
    second moment    alpha C ((N - 1)/N kappa2^2 + kappa1^2/N)
    largest          alpha M ((N - 1)/N kappa2 + kappa1/N)

since its Gram form tends to ``(alpha M / N) K (x) 1_C``, ``K = (kappa1 - kappa2) 1_N + kappa2 11^T``: C eigenvalues
are the largest, all others that are not zero are ``alpha M (kappa1 - kappa2) / N``. Softmax outputs g put the factors
S_n of ``S_n S_n^T = Diag(g_n) - g_n g_n^T`` on both sides of K (x) 1_C (the same authors, "Pathological spectra of the
Fisher information metric and its variants in deep neural networks", Neural Computation, 2021); what
comes of that has no closed form, and its eigenvalues are computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import roots_hermitenorm
from torch import Tensor, nn

import fishopt

Moments = Callable[[float, float], tuple[float, float]]
"""``E phi(u) phi(v)`` and ``E phi'(u) phi'(v)``, from the variance and the covariance of u and v."""

STATISTICS = ("mean eigenvalue", "second moment", "largest eigenvalue")
NODES = 400
"""Of the quadrature for tanh: 9 digits at the variances met here."""


def quadrature(phi: Callable[[Any], Any], derivative: Callable[[Any], Any], nodes: int) -> Moments:
    """Moments by Gauss-Hermite quadrature over x and y: ``u = sqrt(q) x``, ``v = sqrt(q) (r x + sqrt(1 - r^2) y)``."""
    x, weights = roots_hermitenorm(nodes)
    weights = weights / weights.sum()

    def moments(variance: float, covariance: float) -> tuple[float, float]:
        r, scale = covariance / variance, math.sqrt(variance)
        u, v = scale * x[:, None], scale * (r * x[:, None] + math.sqrt(max(1 - r * r, 0.0)) * x)
        first, second = (float(weights @ (g(u) * g(v)) @ weights) for g in (phi, derivative))
        return first, second

    return moments


def arc_cosine(variance: float, covariance: float) -> tuple[float, float]:
    """Moments of the ReLU: half the arc-cosine kernels of degree one and zero (Cho & Saul, 2009)."""
    cosine = min(covariance / variance, 1.0)
    angle = math.acos(cosine)
    first = variance * (math.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
    return first, (math.pi - angle) / (2 * math.pi)


@dataclass(frozen=True)
class Ensemble:
    """Random networks of one kind: the activation, as module and as numpy functions, and the variances w and b."""

    name: str
    module: type[nn.Module]
    phi: Callable[[Any], Any]
    derivative: Callable[[Any], Any]
    moments: Moments
    weight_variance: float
    bias_variance: float


def _tanh_slope(u: Any) -> Any:
    return 1 / np.cosh(u) ** 2


def _relu(u: Any) -> Any:
    return np.maximum(u, 0.0)


def _step(u: Any) -> Any:
    return np.where(u > 0, 1.0, 0.0)


TANH = Ensemble("tanh", nn.Tanh, np.tanh, _tanh_slope, quadrature(np.tanh, _tanh_slope, NODES), 3.0, 0.64)
RELU = Ensemble("ReLU", nn.ReLU, _relu, _step, arc_cosine, 2.0, 0.1)


@dataclass(frozen=True)
class Sizes:
    """L layers of M units, the last of C; N inputs."""

    depth: int = 3
    width: int = 600
    inputs: int = 20
    outputs: int = 2

    @property
    def scale(self) -> float:
        """``alpha M``, the scale of the large eigenvalues."""
        return float((self.depth - 1) * self.width)


@dataclass(frozen=True)
class Order:
    """Order parameters: kappa1 and kappa2; q^L and p^L, the outputs' variance and covariance between inputs."""

    kappa1: float
    kappa2: float
    variance: float
    covariance: float


@functools.cache
def order_parameters(ensemble: Ensemble, depth: int, moments: Moments | None = None) -> Order:
    """The recursions of the module's docstring, with the ensemble's own moments unless others are given.

    Raises:
        ValueError: If ``depth`` has no hidden layer.
    """
    if depth < 2:
        raise ValueError(f"depth={depth!r}: pass 2 or more; without a hidden layer alpha = depth - 1 is zero")
    moments = moments or ensemble.moments
    w, b = ensemble.weight_variance, ensemble.bias_variance
    forward, slopes = [(1.0, 0.0)], []
    for _ in range(depth - 1):
        q, p = (w * moment + b for moment in forward[-1])
        (qhat, slope), (phat, cross) = moments(q, q), moments(q, p)
        forward.append((qhat, phat))
        slopes.append((slope, cross))
    backward = [(1.0, 1.0)]
    for slope, cross in reversed(slopes):
        backward.insert(0, (w * backward[0][0] * slope, w * backward[0][1] * cross))
    kappa = (np.array(forward) * np.array(backward)).sum(0) / (depth - 1)
    return Order(*kappa.tolist(), *(w * moment + b for moment in forward[-1]))


def statistics(order: Order, sizes: Sizes) -> Any:
    """`STATISTICS` of linear outputs for M -> infinity: ``[3]``."""
    others, own = (sizes.inputs - 1) / sizes.inputs, 1 / sizes.inputs
    second = (sizes.depth - 1) * sizes.outputs * (others * order.kappa2**2 + own * order.kappa1**2)
    largest = sizes.scale * (others * order.kappa2 + own * order.kappa1)
    return np.array([order.kappa1 * sizes.outputs / sizes.width, second, largest])


def softmax_eigenvalues(order: Order, sizes: Sizes, outputs: Tensor) -> Tensor:
    """Eigenvalues with softmax outputs for M -> infinity, descending: ``[N C]``, from outputs f, ``[N, C]``."""
    factor = fishopt.Categorical().factor(outputs)  # [C, N, C], columns first
    kernel = (order.kappa1 - order.kappa2) * torch.eye(len(outputs), dtype=outputs.dtype) + order.kappa2
    gram = torch.einsum("kna,nm,lma->nkml", factor, kernel, factor).reshape(outputs.numel(), -1)
    return torch.linalg.eigvalsh(gram).flip(0) * sizes.scale / len(outputs)


def limiting_outputs(order: Order, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Outputs of an infinitely wide network, ``[N, C]``: normal, of variance q^L, covariance p^L between inputs."""
    shared = torch.randn(1, sizes.outputs, generator=generator, dtype=torch.float64)
    own = torch.randn(sizes.inputs, sizes.outputs, generator=generator, dtype=torch.float64)
    return math.sqrt(order.covariance) * shared + math.sqrt(order.variance - order.covariance) * own


def network(ensemble: Ensemble, sizes: Sizes, generator: torch.Generator) -> tuple[nn.Sequential, Tensor]:
    """A random network and its inputs, ``[N, M]``."""
    layers: list[nn.Module] = []
    for layer in range(1, sizes.depth + 1):
        last = layer == sizes.depth
        linear = nn.Linear(sizes.width, sizes.outputs if last else sizes.width, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.normal_(0, math.sqrt(ensemble.weight_variance / sizes.width), generator=generator)
            linear.bias.normal_(0, math.sqrt(ensemble.bias_variance), generator=generator)
        layers += [linear] if last else [linear, ensemble.module()]
    return nn.Sequential(*layers), torch.randn(sizes.inputs, sizes.width, generator=generator, dtype=torch.float64)
