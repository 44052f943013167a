"""Weights that are computed: parametrizations, adapters of small rank, standardisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from tests.networks.shared import Family, normal, parameter, pooled

WEIGHTS = Family()
add = WEIGHTS.add


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Product(nn.Module):
    """Two parameters in one."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randn(len(w), 2), torch.randn(2, w.shape[1])


def _parametrized(layer: nn.Module, with_: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", with_)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


for _name, _build in {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)),
    "weight_norm_conv": lambda: pooled(parametrizations.weight_norm(nn.Conv2d(1, 2, 2)), nn.Tanh(), channels=2),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()),
    "symmetric": lambda: _parametrized(nn.Linear(4, 4), Symmetric()),
    "two_in_one": lambda: _parametrized(nn.Linear(4, 4), Product()),
}.items():
    add(_name, _build, normal(1, 3, 3) if "conv" in _name else normal(4))


class LoRA(nn.Linear):
    """A subclass, frozen but for a product of small rank, which starts from zero."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.a, self.b = parameter(2, inputs), parameter(outputs, 2)
        if zero:
            nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * (x @ self.a.T) @ self.b.T


class Merged(LoRA):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight + self.b @ self.a, self.bias)


class Standardized(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Scaled(nn.Linear):
    """Divided by a scale that is held constant, as where weights are quantised."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.weight.abs().amax(1, keepdim=True)
        return functional.linear(x, self.weight / scale, self.bias)


for _zero in (False, True):
    for _layer in (LoRA, Merged):
        add(
            f"{_layer.__name__.lower()}{'_zero' if _zero else ''}",
            lambda layer=_layer, zero=_zero: nn.Sequential(layer(4, 4, zero=zero), nn.Tanh(), layer(4, 3, zero=zero)),
            normal(4),
        )
add("standardized", lambda: pooled(Standardized(2, 3, 2), nn.ReLU(), channels=3), normal(2, 4, 4))
add("scaled", lambda: nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 3)), normal(4))
