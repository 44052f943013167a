"""Several inputs, arguments, outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks.shared import Family, Net, normal, two

ARGUMENTS = Family()
add = ARGUMENTS.add


def _tower() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


add(
    "siamese",
    lambda: Net(lambda m, a, b: m.head((m.tower(a) - m.tower(b)).abs()), tower=_tower(), head=nn.Linear(3, 3)),
    two,
)


def _stacked(join: Callable[[Tensor, Tensor], Tensor], part: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        left, right = part(m.tower(join(a, b)))
        return m.head(left * right)

    return lambda: Net(forward, tower=_tower(), head=nn.Linear(3, 3))


add("siamese_joined", _stacked(lambda a, b: torch.cat([a, b]), lambda z: z.chunk(2)), two)
add(
    "siamese_alternating",
    _stacked(lambda a, b: torch.stack([a, b], 1).flatten(0, 1), lambda z: (z[::2], z[1::2])),
    two,
)
add("siamese_stacked", _stacked(lambda a, b: torch.stack([a, b]), lambda z: z.unbind(0)), two)
add("siamese_beside", _stacked(lambda a, b: torch.stack([a, b], 1), lambda z: z.unbind(1)), two)
add(
    "inputs_of_several_kinds",
    lambda: Net(
        lambda m, x, index, image: m.head(m.a(x) * m.b(index) + m.c(image).flatten(1)),
        a=nn.Linear(4, 3),
        b=nn.Embedding(5, 3),
        c=nn.Conv2d(1, 3, 2),
        head=nn.Linear(3, 3),
    ),
    lambda n: (torch.randn(n, 4), torch.randint(0, 5, (n,)), torch.randn(n, 1, 2, 2)),
)
add(
    "keywords",
    lambda: Net(
        lambda m, x, *, gate, power: m.b(torch.sigmoid(m.a(x)) ** power * gate), a=nn.Linear(4, 3), b=nn.Linear(3, 3)
    ),
    lambda n: (torch.randn(n, 4), {"gate": torch.rand(n, 3), "power": 2}),
)
add(
    "no_tensors",
    lambda: Net(
        lambda m, batch, mode, flag: m.b(torch.tanh(m.a(batch["x"]))) * (2 if flag and mode == "wide" else 1),
        a=nn.Linear(4, 3),
        b=nn.Linear(3, 3),
    ),
    lambda n: ({"x": torch.randn(n, 4), "ids": list("abc")}, "wide", True, {}),
)
add(
    "dict_output",
    lambda: Net(lambda m, x: {"logits": m.a(x), "hidden": x, "loss": None}, a=nn.Linear(4, 3)),
    normal(4),
    readout=lambda output: output["logits"],
)
add(
    "tuple_output",
    lambda: Net(lambda m, x: (m.b(x), m.a(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 2)),
    normal(4),
    {"b": "none", "a": "rule"},
    readout=lambda output: output[1],
)
