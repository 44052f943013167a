"""Forwards that are not the same each time, or for each input on its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.networks.shared import Family, Net, normal

CHANGING = Family()
add = CHANGING.add


class Counting(nn.Module):
    """Changes a buffer, by its input, in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.b(torch.tanh(self.a(x)))


add("counting", Counting, normal(4))
add(
    "coupled",
    lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x) - m.a(x).mean(0))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
    normal(4),
    {"a": "pooled", "b": "rule"},
)
add("written_in", lambda: Net(lambda m, x: m.a(x.view(4, 4)), a=nn.Linear(4, 3)), normal(4), "pooled")


class SlopeNet(nn.Module):
    """What differentiates itself by its inputs, as physics-informed networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.b(torch.tanh(self.a(x))).sum(), x, create_graph=True)[0]


add("slopes", SlopeNet, normal(3), {"a.weight": "rows", "a.bias": "rule", "b": "rows"})
