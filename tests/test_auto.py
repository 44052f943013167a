"""What a step of lr="auto" keeps to: where it ends, that the loss never rises, and what its size depends on."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.objective import Objective
from fishopt.optim.quadratic import Quadratic
from fishopt.optim.search import Memory
from tests.auto_setup import LOSSES, _backward, _network, _problem, _start, _trained


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_on_a_linear_model_a_step_ends_in_the_minimum_of_line_and_plane(decay):
    """Where the loss has no slope along the directions of the step."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 2).double(), nn.MSELoss()
    optimizer = _start(model, loss_fn, weight_decay=decay)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    directions = []
    for _ in range(3):
        optimizer.param_groups[0]["auto"] = (1e-15, *optimizer.param_groups[0]["auto"][1:])
        before = [p.detach().clone() for p in model.parameters()]
        _backward(model, optimizer, loss_fn, x, y)
        optimizer.step()
        step = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        _backward(model, optimizer, loss_fn, x, y)
        gradient = [p.grad + decay * p.detach() for p in model.parameters()]
        directions.append(step)
        size = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        for d in directions[-2:]:
            length = math.sqrt(sum(float(one.square().sum()) for one in d))
            slope = sum(float((a * b).sum()) for a, b in zip(gradient, d, strict=True))
            assert abs(slope) < 1e-8 * size * length
        assert length > 1e-3


def test_a_loss_that_rises_is_undone(monkeypatch):
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    _backward(model, optimizer, loss_fn, x, y)
    before = copy.deepcopy(list(model.parameters()))
    monkeypatch.setattr(Objective, "value", lambda self: math.inf)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["auto"][0] > 1e3
    monkeypatch.undo()
    _backward(model, optimizer, loss_fn, x, y)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_never_rises(kind):
    """On the batch that a step was made on; with nothing tuned it falls far."""
    model, optimizer, loss_fn, x, y = _problem(kind, 16)
    losses = []
    for _ in range(30):
        losses.append(_backward(model, optimizer, loss_fn, x, y))
        optimizer.step()
    assert all(b <= a for a, b in pairwise(losses))
    assert len(set(losses)) == 30


def test_micro_batches_are_one_batch():
    ends = []
    for parts in (1, 3):
        model, loss_fn = _network(), nn.CrossEntropyLoss()
        optimizer = _start(model, loss_fn, estimator="exact", refresh_inputs=12)
        x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
        for _ in range(3):
            optimizer.zero_grad()
            for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_fn(model(some), labels) / parts).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_penalty_is_noticed_and_counts_with_a_closure():
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y) + 0.3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    closure()
    with pytest.warns(RuntimeWarning, match="pass a closure"):
        optimizer.step()
    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
    assert all(b <= a for a, b in pairwise(losses))
    size = max(float(p.grad.abs().max()) for p in model.parameters())
    assert size < 0.02


class Residual(nn.Module):
    """Of u'' = -sin(x)."""

    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    @torch.enable_grad()
    def forward(self, x):
        x = x.detach().requires_grad_()
        first = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), x, create_graph=True)[0] + torch.sin(x)


class ForwardResidual(Residual):
    """By forward mode, which does not nest."""

    def forward(self, x):
        second = torch.func.vmap(torch.func.hessian(lambda one: self.u(one[None])[0, 0]))
        return second(x)[:, :, 0] + torch.sin(x)


@pytest.mark.parametrize("kind", [Residual, ForwardResidual])
@pytest.mark.filterwarnings("ignore:the curvature of")
def test_networks_that_differentiate_themselves(kind):
    torch.manual_seed(0)
    model, loss_fn = kind(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    x = torch.linspace(0, 3, 12, dtype=torch.float64)[:, None]
    losses = []
    for _ in range(12):
        losses.append(_backward(model, optimizer, loss_fn, x, torch.zeros_like(x)))
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_a_scheduler_multiplies_the_step():
    def step(factor):
        model, loss_fn = _network(), nn.MSELoss()
        optimizer = _start(model, loss_fn)
        optimizer.param_groups[0]["lr"] *= factor
        before = [p.detach().clone() for p in model.parameters()]
        return [b - a for a, b in zip(before, _trained(model, optimizer, loss_fn, [0]), strict=True)]

    for whole, half in zip(step(1.0), step(0.5), strict=True):
        torch.testing.assert_close(half, whole / 2)


def test_groups_have_their_shares_of_a_step():
    """One that is frozen by its learning rate stays, and the others' step is the one without it."""
    steps = []
    for is_frozen in (True, False):
        model, loss_fn = _network(), nn.MSELoss()
        groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
        for p in model[0].parameters():
            p.requires_grad_(is_frozen)
        optimizer = _start(model, loss_fn, params=groups, estimator="exact")
        before = [p.detach().clone() for p in model.parameters()]
        after = _trained(model, optimizer, loss_fn, range(1))
        steps.append([b - a for a, b in zip(before, after, strict=True)])
    assert not any(step.any() for step in steps[0][:2])
    assert all(step.any() for step in steps[0][2:])


def test_a_closure_tells_the_loss():
    family = fishopt.Categorical()
    model = _network()
    optimizer = _start(model, family)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_models_are_averaged_where_batches_differ(monkeypatch):
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    used, averages = [], []
    minimum, after = Quadratic.minimum, Memory.after
    monkeypatch.setattr(Quadratic, "minimum", lambda self, *rest: (used.append(self), minimum(self, *rest))[1])
    monkeypatch.setattr(Memory, "after", lambda self, *rest: (averages.append(after(self, *rest)), averages[-1])[1])
    _trained(model, optimizer, loss_fn, [0, 1, 2, 2])
    assert [a is b for a, (b, _) in zip(used, averages, strict=True)] == [True, True, True, False]
    assert [memory.averaged for _, memory in averages] == [0, 1, 2, 3]


def test_damping_is_relative_to_the_present_curvature():
    """Not to its peak: the size of a step is found, so it cannot grow without bound where F goes to zero."""
    model, loss_fn = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    optimizer = _start(model, loss_fn, decay=0.0, estimator="exact", refresh_inputs=6)
    x = torch.randn(6, 4).double()
    peaks = []
    for size in (1.0, 1e-2):
        optimizer.refresh(size * x)
        peaks.append(optimizer.state[model.weight]["peak"].item())
    assert peaks[1] < peaks[0]
