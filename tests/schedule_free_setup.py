"""What tests of schedule-free averaging share: a small network that is trained and evaluated."""

import io

import torch
from torch import nn

import fishopt

LOSS = nn.CrossEntropyLoss()
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.ones(6, 3).tril()).argmax(1)


def _network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def _start(model=None, **options):
    model = model or _network()
    options = {"schedule_free": True, "lr": 0.02, "generator": torch.Generator().manual_seed(7), **options}
    return model, fishopt.FisherAdam(model, LOSS, **options)


def _backward(model, optimizer, step):
    rows = torch.arange(step * 16, (step + 1) * 16) % 64
    optimizer.zero_grad()
    loss = LOSS(model(X[rows].to(next(model.parameters()).dtype)).float(), Y[rows])
    loss.backward()
    return loss


def _train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        _backward(model, optimizer, step)
        optimizer.step()


def _evaluate(model):
    was = model.training
    model.eval()
    with torch.no_grad():
        out = model(X.to(next(model.parameters()).dtype))
    model.train(was)
    return out


def _values(model):
    return [p.detach().clone() for p in model.parameters()]


def _same(one, other):
    return all(map(torch.equal, one, other))


def _through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _offset(state):
    """z - x"""
    return -state["exp_avg"].double() / state.get("stretch", 1.0)
