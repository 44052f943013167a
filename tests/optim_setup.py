"""What tests of the optimizers share: a small problem, and the loop that trains on it."""

import pytest
import torch
from torch import nn

import fishopt

OPTIMIZERS = [fishopt.FisherAdam, fishopt.DiagonalNGD]
both = pytest.mark.parametrize("kind", OPTIMIZERS)


def _problem(seed=0, act=nn.ReLU, n=64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3))
    x = torch.randn(n, 6)
    return model, x, (x @ torch.randn(6, 3)).argmax(1)


def _train(model, optimizer, x, y, steps=20, loss_fn=None, batch=16, start=0):
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    for step in range(start, start + steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(x)
        optimizer.zero_grad()
        loss = loss_fn(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    return loss


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
