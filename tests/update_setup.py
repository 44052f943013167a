"""What tests of the plain step share: parameters without a network, and estimates that are given."""

import torch
from torch import nn

import fishopt
from benchmarks.cost.inside import without_refreshes
from fishopt.optim.estimate import Estimate, Moment

SHAPES = {"vector": (7,), "matrix": (5, 9), "scalar": (), "empty": (0,), "conv": (4, 6, 3, 3), "large": (300, 1001)}


class Bag(nn.Module):
    """Parameters without a network."""

    def __init__(self, names=SHAPES, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in names:
            value = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(self, x):
        return x


def _given(self, units, wanted, record, training, step):
    """In place of ``Curvature.refresh``: finds the same Fisher diagonal each time."""
    generator = torch.Generator().manual_seed(1)
    parts, wanted = {}, {name for names in units.values() for name in names}
    for name, p in self._model.named_parameters():
        if name not in wanted:
            continue
        new = torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.1
        parts[name] = torch.empty_like(p).copy_(new)
    return Estimate(parts, Moment(4, 1.0, 1.0))


def _optimizer(model, kind=fishopt.FisherAdam, **options):
    """Refreshed, with none due in the steps that follow."""
    optimizer = kind(model, "categorical", refresh_every=10**6, **options)
    without_refreshes(optimizer)
    optimizer.refresh(torch.zeros(1))
    optimizer._is_fresh = False
    return optimizer


def _set_gradients(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(p.dtype)
