"""The plain step of DiagonalNGD against its formula, and what both optimizers' steps have in common."""

import io
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fishopt
from fishopt.optim import buckets
from fishopt.optim.averages import averaged
from fishopt.optim.curvature import Curvature, _all_finite
from fishopt.optim.estimate import Moment
from tests.update_setup import Bag, _given, _optimizer, _set_gradients

BOTH = [fishopt.FisherAdam, fishopt.DiagonalNGD]


@pytest.fixture(autouse=True)
def _estimates_are_given(monkeypatch):
    monkeypatch.setattr(Curvature, "refresh", _given)


# --- DiagonalNGD ---


@pytest.mark.parametrize("radius", [1e30, 1e-4])
def test_ngd_is_its_formula(monkeypatch, radius):
    monkeypatch.setattr(buckets, "PART", 2**17)  # cuts the large one
    model = Bag()
    model.matrix.data = model.matrix.data.double()
    shared = {"momentum": 0.8, "kl_radius": radius}
    groups = [
        {"params": [model.vector, model.matrix, model.empty], "lr": 0.3, "weight_decay": 0.1, **shared},
        {"params": [model.scalar, model.conv, model.large], "lr": 0.1, "maximize": True, **shared},
    ]
    optimizer = _optimizer(model, fishopt.DiagonalNGD, params=groups)
    values = {p: p.detach().double().clone() for p in model.parameters()}
    averages = {p: torch.zeros_like(value) for p, value in values.items()}
    counts = dict.fromkeys(values, 0)
    limited = []
    for step in range(6):
        _set_gradients(model, step)
        if step == 3:
            model.conv.grad = None
        steps, divergence = {}, 0.0
        moving = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for p, group in moving:
            counts[p] += 1
            averages[p].lerp_(p.grad.double() * (-1 if group["maximize"] else 1), 1 - 0.8)
            damped = optimizer.state[p]["preconditioner"].double() ** -2
            steps[p] = group["lr"] * averages[p] / (1 - 0.8 ** counts[p]) / damped
            divergence += float((steps[p].square() * damped).sum()) / 2
        limited.append(divergence > radius)
        for p, group in moving:
            values[p].mul_(1 - group["lr"] * group["weight_decay"])
            values[p].sub_(steps[p] / max(1.0, math.sqrt(divergence / radius)))
        optimizer.step()
    assert set(limited) == {radius < 1}
    for p, value in values.items():
        torch.testing.assert_close(p.detach().double(), value, rtol=2e-5, atol=2e-6)


def test_parts_hold_each_entry_once_and_are_cut_alike(monkeypatch):
    monkeypatch.setattr(buckets, "PART", 2**17)
    sizes = [(300, 1001), (7,), (), (0,), (500, 301), (2**17,), (3,)]
    tensors = [torch.arange(math.prod(size), dtype=torch.float32).view(size) for size in sizes]
    tensors.append(torch.zeros(600, 400).t())  # not contiguous: in one piece
    copies = [x.clone() for x in tensors]
    found = list(buckets.in_parts(tensors, copies))
    assert all(torch.equal(a, b) for part in found for a, b in zip(*part, strict=True))
    assert all(sum(x.numel() for x in part[0]) <= 2**17 for part in found[:-1])
    for part in found:
        for listed in part:
            for x in listed:
                x.add_(1)
    for x, shape in zip(tensors[:-1], sizes, strict=True):
        assert torch.equal(x, torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert (tensors[-1] == 1).all()


# --- both ---


class _NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", BOTH)
def test_nothing_is_read_on_the_host(kind):
    model = Bag()
    optimizer = _optimizer(model, kind, weight_decay=0.1)
    for step in range(3):
        _set_gradients(model, step)
        with _NoSync():
            optimizer.step()


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is not torch.ops.aten.as_strided.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", BOTH)
def test_operations_do_not_grow_with_the_number_of_parameters(kind):
    counts = []
    for layers in (1, 20):
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])
        optimizer = _optimizer(model, kind)
        for step in range(2):
            _set_gradients(model, step)
            with _Count() as count:
                optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]
    assert counts[0] <= 18


@pytest.mark.parametrize("kind", BOTH)
def test_a_state_loaded_in_the_middle_continues_bit_for_bit(kind):
    """Also into an optimizer that has stepped, whose buckets and samples are of other tensors."""
    fast = {"lr": 0.05, "clip": 0.5} if kind is fishopt.FisherAdam else {"lr": 0.1, "kl_radius": 1e-3}
    models = Bag(), Bag()
    optimizers = [_optimizer(model, kind, **fast) for model in models]
    for step in range(4):
        _set_gradients(models[0], step)
        _set_gradients(models[1], 50 + step, scale=3.0)
        for optimizer in optimizers[: 1 if step == 3 else 2]:
            optimizer.step()
    file = io.BytesIO()
    torch.save([models[0].state_dict(), optimizers[0].state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    models[1].load_state_dict(weights)
    optimizers[1].load_state_dict(state)
    for step in range(4, 8):
        for model, optimizer in zip(models, optimizers, strict=True):
            _set_gradients(model, step)
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_that_change_groups_take_the_new_ones_settings(kind):
    """By hand, between two steps, as some schedules of unfreezing do."""
    model = Bag(("vector", "matrix"))
    optimizer = _optimizer(model, kind, params=[{"params": [model.vector], "lr": 0.1}, {"params": [model.matrix]}])
    _set_gradients(model, 0)
    optimizer.step()
    first, second = optimizer.param_groups
    optimizer.param_groups[0] = {**first, "lr": 0.0, "weight_decay": 0.0}
    before = model.vector.detach().clone()
    optimizer.step()
    assert torch.equal(model.vector, before)
    optimizer.param_groups[0]["params"], second["params"], second["lr"] = [model.matrix], [model.vector], 0.1
    still = model.matrix.detach().clone()
    optimizer.step()
    assert torch.equal(model.matrix, still)
    assert not torch.equal(model.vector, before)


def test_ngd_stands_still_where_there_are_no_residuals(monkeypatch):
    """Targets met exactly: no dispersion, no gradient, no step, and no division by zero."""
    model = Bag(("vector",))
    given = Curvature.refresh
    nothing = Moment(4, 1.0, 0.0)
    monkeypatch.setattr(Curvature, "refresh", lambda *args: given(*args)._replace(moment=nothing))
    optimizer = _optimizer(model, fishopt.DiagonalNGD)
    model.vector.grad = torch.zeros_like(model.vector)
    before = model.vector.detach().clone()
    optimizer.step()
    assert torch.equal(model.vector, before)


@pytest.mark.parametrize("refreshes", [1, 2, 5])
def test_preconditioners_by_their_formula(refreshes):
    """The estimate is the same each time, so its average, corrected for its start at zero, is too."""
    fisher = Curvature.refresh(
        Bare(Bag(("vector", "matrix"))), {"all": ("vector", "matrix")}, {}, None, None, 0
    ).diagonal
    mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
    expected = {
        fishopt.FisherAdam: {k: ((f / 4).sqrt() + 0.7 * (mean / 4).sqrt() + 1e-8).square() for k, f in fisher.items()},
        fishopt.DiagonalNGD: {k: (f + 0.7 * mean).rsqrt() for k, f in fisher.items()},
    }
    for kind, preconditioners in expected.items():
        model = Bag(("vector", "matrix"))
        optimizer = _optimizer(model, kind, damping=0.7)
        for _ in range(refreshes - 1):
            optimizer.refresh(torch.zeros(1))
        for name, p in model.named_parameters():
            torch.testing.assert_close(optimizer.state[p]["preconditioner"].detach(), preconditioners[name].detach())


class Bare:
    """All of a Curvature that the estimates given here look at."""

    def __init__(self, model):
        self._model = model


def test_estimates_that_are_not_finite_are_seen():
    fine = torch.tensor([1.0, 2.0])
    assert _all_finite([fine, torch.tensor([3])])
    for value in (math.nan, math.inf, -math.inf, 1e30):  # whose square is infinite
        assert not _all_finite([fine, torch.tensor([0.0, value])])


def test_averages_lie_in_memory_as_their_parameter_does():
    """Whatever the estimate's layout: the fused kernel is for tensors laid out alike."""
    p = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    state = {}
    averaged({"p": torch.ones(4, 6, 3, 3)}, {"p": p}, {"p": state}, {"p": 0.9})
    assert state["exp_avg"].stride() == state["fisher"].stride() == p.stride() != torch.ones(4, 6, 3, 3).stride()
