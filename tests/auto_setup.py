"""What tests of lr="auto" share: losses with labels, a network, and the loop that trains it."""

import torch
from torch import nn

import fishopt

LOSSES = {
    "squared": (nn.MSELoss(), lambda h: torch.randn_like(h)),
    "squared, sum": (nn.MSELoss(reduction="sum"), lambda h: torch.randn_like(h)),
    "classes": (nn.CrossEntropyLoss(), lambda h: torch.randint(0, h.shape[1], (len(h),))),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), lambda h: torch.randint(0, 3, (len(h),))),
    "yes or no": (nn.BCEWithLogitsLoss(), lambda h: torch.rand_like(h).round()),
    "counts": (nn.PoissonNLLLoss(), lambda h: torch.poisson(torch.rand_like(h) * 3)),
}


def _network(width=3, *layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *layers, nn.Linear(5, width)).double()


def _start(model, loss_fn, **options):
    return fishopt.DiagonalNGD(model, loss_fn, lr="auto", generator=torch.Generator().manual_seed(0), **options)


def _problem(kind, count):
    """A network, its optimizer, and a batch of so many inputs with labels for a loss."""
    loss_fn, labels = LOSSES[kind]
    model = _network()
    optimizer = _start(model, loss_fn)
    x = torch.randn(count, 4, dtype=torch.float64)
    return model, optimizer, loss_fn, x, labels(model(x).detach())


def _backward(model, optimizer, loss_fn, x, y):
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    return float(loss.detach())


def _random_directions(model, count=2):
    return [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(count)]


def _trained(model, optimizer, loss_fn, steps):
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
        _backward(model, optimizer, loss_fn, x, x[:, :3].sin())
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
