"""What tests of diagnostics share: a small network with its data, J by definition, and a step."""

import torch
from torch import nn

LOSS = nn.CrossEntropyLoss()


def _mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def _data(count=24, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=dtype), torch.randint(3, (count,), generator=generator)


def _rows(model, x, y, loss=LOSS, parameters=None):
    """J by definition: a backward for each input."""
    parameters = list(model.parameters()) if parameters is None else parameters
    found = []
    for one, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(loss(model(one[None]), label[None]), parameters)
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


def _step(model, optimizer, x, y, loss=LOSS):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
