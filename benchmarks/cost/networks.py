"""Networks and random data to measure cost on: what an operation takes does not depend on what the numbers mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import conv3_dense3, mlp


@dataclass(frozen=True)
class Problem:
    """A network, and one batch for it.

    Attributes:
        name: As in tables.
        model: A chain of modules, the only kind that all of the methods compared can take.
        x: Inputs.
        y: Labels.
    """

    name: str
    model: nn.Sequential
    x: Tensor
    y: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """All of the parameters."""
        return tuple(name for name, _ in self.model.named_parameters())

    def affine_names(self, count: int) -> tuple[str, ...]:
        """The parameters of the last ``count`` linear layers."""
        paths = [path for path, module in self.model.named_modules() if isinstance(module, nn.Linear)][-count:]
        return tuple(name for name in self.names if name.rpartition(".")[0] in paths)


def problem(name: str, model: nn.Sequential, shape: Sequence[int], batch: int, device: torch.device) -> Problem:
    """A network on a device, with normal inputs and uniform labels."""
    generator = torch.Generator().manual_seed(0)
    outputs = [module.out_features for module in model if isinstance(module, nn.Linear)][-1]
    x = torch.randn(batch, *shape, generator=generator)
    y = torch.randint(outputs, (batch,), generator=generator)
    return Problem(name, model.to(device), x.to(device), y.to(device))


def problems(device: torch.device, *, quick: bool) -> list[Problem]:
    """The networks that passes are timed on; small ones for a quick look."""
    torch.manual_seed(0)
    widths, batch = ((64, 32, 32, 16, 10), 16) if quick else ((784, 256, 256, 128, 10), 128)
    image = (3, 32, 32)
    return [
        problem("mlp", mlp(widths), widths[:1], batch, device),
        problem("mlp-sigmoid", mlp(widths, nn.Sigmoid), widths[:1], batch, device),
        problem("3c3d", conv3_dense3(), image, 4 if quick else batch, device),
        problem("3c3d-sigmoid", conv3_dense3(nn.Sigmoid), image, 4 if quick else batch, device),
    ]


def square_layers(size: int, depth: int = 4) -> nn.Sequential:
    """``depth`` equal linear layers of about ``size`` parameters in all, left as the memory comes: nothing is trained.

    Initialising 10^8 weights properly would take longer than timing them.
    """
    width = max(1, round(math.sqrt(size / depth)))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, 1 / width)
    return model
