"""The registry of test cases: small networks x likelihoods x data, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import fishopt


class Residual(nn.Module):
    """A custom forward: functional activation, residual addition, a scale by a bare parameter."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, outputs, bias=False)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.gain * functional.relu(self.inner(x)))


class Tied(nn.Module):
    """One weight used twice, so the output is quadratic in it."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x)))


class TwoInputs(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(2, 3)
        self.head = nn.Linear(3, outputs)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(a)) * self.right(b))


def _normalised(outputs: int) -> nn.Module:
    norm = nn.BatchNorm1d(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, outputs))


def _repeated_activation(outputs: int) -> nn.Module:
    act = nn.Sigmoid()
    return nn.Sequential(nn.Linear(4, 3), act, nn.Linear(3, 3), act, nn.Linear(3, outputs))


def _image(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda t: nn.Linear(4, t),
    "sigmoid": lambda t: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, t)),
    "relu": lambda t: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.LeakyReLU(), nn.Linear(3, t)),
    "elu": lambda t: nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Linear(3, t, bias=False)),
    "softplus": lambda t: nn.Sequential(nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, t)),
    "smooth_end": lambda t: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, t), nn.Tanh()),
    "conv_relu": lambda t: _image(
        nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, t)
    ),
    "conv_sigmoid": lambda t: nn.Sequential(
        nn.Conv2d(1, 2, 2, stride=2, bias=False), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, t)
    ),
    "conv_groups": lambda t: _image(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(2, t)),
    "residual": Residual,
    "tied": Tied,
    "two_inputs": TwoInputs,
    "batch_norm": _normalised,
    "layer_norm": lambda t: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, t)),
    "repeated": _repeated_activation,
}

LIKELIHOODS: dict[str, Callable[[], fishopt.Likelihood]] = {
    "categorical": fishopt.Categorical,
    "bernoulli": fishopt.Bernoulli,
    "gaussian": lambda: fishopt.Gaussian(variance=0.7),
    "poisson": fishopt.Poisson,
}


@dataclass(frozen=True)
class Case:
    """One problem: a network, a few inputs, a likelihood."""

    network: str
    family: str
    outputs: int = 3
    inputs: int = 3
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.network}-{self.family}"

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...], fishopt.Likelihood]:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = NETWORKS[self.network](self.outputs).double()
            for p in model.parameters():
                p.data += 0.3 * torch.randn_like(p)
            shape = (self.inputs, 1, 4, 4) if self.network == "conv_sigmoid" else (self.inputs, 4)
            inputs = (torch.randn(shape, dtype=torch.float64),)
            if self.network == "two_inputs":
                inputs += (torch.randn(self.inputs, 2, dtype=torch.float64),)
        return model, inputs, LIKELIHOODS[self.family]()


CASES = (
    [Case(network, "categorical") for network in NETWORKS]
    + [
        Case(network, family)
        for network in ("sigmoid", "relu", "conv_relu", "softplus", "two_inputs")
        for family in ("bernoulli", "gaussian", "poisson")
    ]
    + [Case("sigmoid", family, outputs=1) for family in ("bernoulli", "gaussian", "poisson")]
)
