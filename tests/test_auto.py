"""lr="auto": the quadratic model against a dense Gauss-Newton matrix, and what a step keeps to."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

import fishopt
from fishopt.optim.objective import Objective
from fishopt.optim.quadratic import Quadratic
from fishopt.optim.replica import Replica

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


def _backward(model, optimizer, loss_fn, x, y):
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    return float(loss.detach())


def _dense(model, x, loss):
    """The loss, its gradient and its Gauss-Newton matrix as one vector's functions."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)).reshape(-1))(params)
    j = torch.cat([jacobian[name].flatten(1) for name in params], 1)
    h = model(x).detach()
    second = hessian(lambda flat: loss(flat.reshape(h.shape)))(h.reshape(-1))
    first = jacrev(lambda flat: loss(flat.reshape(h.shape)))(h.reshape(-1))
    return float(loss(h)), first @ j, j.T @ second @ j


def _random_directions(model, count=2):
    return [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(count)]


def _vector(direction):
    return torch.cat([d.reshape(-1) for d in direction.values()])


@pytest.mark.parametrize("kind", LOSSES)
def test_the_model_is_the_dense_gauss_newton_one(kind):
    loss_fn, labels = LOSSES[kind]
    model = _network()
    optimizer = _start(model, loss_fn)
    x = torch.randn(6, 4, dtype=torch.float64)
    y = labels(model(x).detach())
    (3 * loss_fn(model(x), y)).backward()
    directions = _random_directions(model)
    value, slopes, curvature = Objective(optimizer._recorder.records, Replica(model, None)).along(directions)
    loss, gradient, matrix = _dense(model, x, lambda h: 3 * loss_fn(h, y))
    d = torch.stack([_vector(one) for one in directions])
    assert value == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(slopes, d @ gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(curvature, d @ matrix @ d.T, rtol=1e-10, atol=1e-12)
