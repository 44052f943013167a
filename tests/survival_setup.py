"""What tests of survival share: a model that misbehaves as it is told to, and steps that train it."""

import pytest
import torch
from torch import nn

import fishopt

both = pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
LOSSES = {"ce": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}
AFTER = {"at the first step": 0, "in the middle": 12}
when = pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)


class Model(nn.Module):
    """Does what it is told to between its layers, in training or, as curvature sees it, in eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.in_training = self.in_eval = None

    def forward(self, x):
        h = self.first(x).tanh()
        act = self.in_training if self.training else self.in_eval
        return self.last(h if act is None else act(h))


def _start(kind, loss="ce", steps=0, **options):
    torch.manual_seed(0)
    model = Model()
    optimizer = kind(model, LOSSES[loss], **{"refresh_every": 1, **options})
    for step in range(steps):
        _step(model, optimizer, step, loss)
    return model, optimizer


def _batch(step, loss="ce"):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1) if loss == "ce" else x[:, :3].clone()


def _step(model, optimizer, step, loss="ce", spoil=lambda x, y: None, before=lambda: None):
    x, y = _batch(step, loss)
    spoil(x, y)
    optimizer.zero_grad()
    LOSSES[loss](model(x), y).backward()
    before()
    optimizer.step()


def _steps(model, optimizer, steps):
    for step in steps:
        _step(model, optimizer, step)


def _kept(model, optimizer):
    """Parameters, averages and preconditioners."""
    state = [{k: v for k, v in s.items() if k != "step"} for s in optimizer.state.values()]
    return [p.tolist() for p in model.parameters()], [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for s in state
    ]


def _spoil_eval(value):
    def act(h):
        return h + torch.zeros_like(h).index_fill_(1, torch.tensor([2]), value)

    return act
