"""What tests of training loops share: a small run, whose plain loop the others are held against."""

import pytest
import torch
from torch import nn

import fishopt

FAST = {fishopt.FisherAdam: {"lr": 1e-2}, fishopt.DiagonalNGD: {"lr": 3e-2, "kl_radius": 1e-4}}
both = pytest.mark.parametrize("kind", FAST)
LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss}
N, BATCH = 64, 16


class Run:
    """A small network, its data and its optimizer; `step` is the plain loop's."""

    def __init__(self, kind, family="ce", act=nn.Tanh, dtype=torch.float32, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3)).to(dtype)
        self.x = torch.randn(N, 6, dtype=dtype)
        scores = self.x @ torch.randn(6, 3, dtype=dtype)
        self.y = scores.argmax(1) if family == "ce" else scores
        self.loss_fn = LOSSES[family]()
        self.optimizer = kind(self.model, self.loss_fn, **FAST[kind], **options)
        self.first = self.loss()

    def batch(self, step):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % N
        return self.x[rows], self.y[rows]

    def backward(self, step, model=None):
        x, y = self.batch(step)
        loss = self.loss_fn((model or self.model)(x), y)
        loss.backward()
        return loss

    def steps(self, count=40, start=0):
        for step in range(start, start + count):
            self.optimizer.zero_grad()
            self.backward(step)
            self.optimizer.step()
        return self

    @torch.no_grad()
    def loss(self):
        return float(self.loss_fn(self.model(self.x), self.y))

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def trains(self, below=0.7):
        return self.loss() < below * self.first


def assert_same(run, other):
    assert torch.equal(run.weights(), other.weights())
