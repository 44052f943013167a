"""What tests in other people's libraries share: a small network with its data, and the plain loop that they run."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishopt

EPOCHS = 6
FAST = {fishopt.FisherAdam: {"lr": 3e-2}, fishopt.DiagonalNGD: {"lr": 5e-2, "kl_radius": 1e-3}}
both = pytest.mark.parametrize("kind", FAST)
LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3))


def batches(family="ce", size=16):
    source = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=source)
    scores = x @ torch.randn(6, 3, generator=source)
    return DataLoader(TensorDataset(x, scores.argmax(1) if family == "ce" else scores), batch_size=size)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mean_loss(model, family="ce"):
    with torch.no_grad():
        losses = [LOSSES[family]()(model(x), y) for x, y in batches(family)]
    return float(torch.stack(losses).mean())


@functools.cache
def plain(kind, family="ce", epochs=EPOCHS, schedule=None, clip=None, accumulate=1):
    """The loop that the libraries run."""
    model, loss_fn = network(), LOSSES[family]()
    optimizer = kind(model, loss_fn, **FAST[kind])
    scheduler = schedule(optimizer) if schedule else None
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches(family)):
            (loss_fn(model(x), y) / accumulate).backward()
            if (i + 1) % accumulate:
                continue
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
    assert mean_loss(model, family) < 0.8 * mean_loss(network(), family)
    return weights(model)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * optimizer.defaults["lr"], total_steps=4 * EPOCHS + 1)
