"""Schedule-free averaging: its formulas, by torch's kernel and without it."""

import functools
import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim import averaging, buckets
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Estimate, Moment
from fishopt.optim.fused import has_nesterov
from tests.schedule_free_setup import _evaluate, _offset, _start, _train

SHAPES = {"vector": (7,), "matrix": (5, 9), "scalar": (), "empty": (0,), "conv": (4, 6, 3, 3), "large": (300, 1001)}


class Bag(nn.Module):
    """Parameters without a network."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if name == "conv":
                value = value.to(memory_format=torch.channels_last)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return x


@pytest.fixture
def _estimates_are_given(monkeypatch):
    def refresh(self, units, wanted, record, training, step):
        generator = torch.Generator().manual_seed(step)
        found = {
            name: torch.empty_like(p).copy_(torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.1)
            for name, p in self._model.named_parameters()
        }
        return Estimate(found, Moment(4, 1.0, 1.0))

    monkeypatch.setattr(Curvature, "refresh", refresh)


def _sampled(x, order):
    """As documented for ``clip``: of every so many blocks of 64 entries, in the order of memory, the first."""
    every = max((min(x.numel() // 2**13, 62) - 1) | 1, 1)
    x = torch.empty_like(order, dtype=x.dtype).copy_(x)
    return x if every == 1 else x.flatten()[: x.numel() // 64 * 64].view(-1, 64)[::every]


class Reference:
    """The paper's three sequences, in float64, one parameter at a time."""

    def __init__(self, model):
        self.x = {p: p.detach().double().clone() for p in model.parameters()}
        self.y, self.z = dict(self.x), dict(self.x)
        self.weights = {p: [] for p in self.x}

    def step(self, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group, optimizer.state[p]["preconditioner"])

    def move(self, p, group, factor):
        lr, beta = float(group["lr"]), group["betas"][0]
        lr *= min(1.0, (len(self.weights[p]) + 1) / max(1, group["warmup"]))
        direction = p.grad.double() * (-1 if group["maximize"] else 1) * factor.double()
        if p.numel():
            direction /= max(1.0, float(_sampled(direction, factor).square().mean().sqrt()) / group["clip"])
        self.z[p] = self.z[p] - lr * (direction + group["weight_decay"] * self.y[p])
        largest = max([lr, *(rate for rate, _ in self.weights[p])])
        self.weights[p].append((lr, largest**2))
        total = sum(weight for _, weight in self.weights[p])
        share = largest**2 / total if total else 0.0
        self.x[p] = (1 - share) * self.x[p] + share * self.z[p]
        self.y[p] = (1 - beta) * self.z[p] + beta * self.x[p]

    def check(self, optimizer, rtol, atol):
        betas = {p: group["betas"][0] for group in optimizer.param_groups for p in group["params"]}
        close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol)
        for p, beta in betas.items():
            close(p.detach().double(), self.y[p])
            close(p.detach().double() + beta * _offset(optimizer.state[p]), self.z[p])
        optimizer.eval()
        for p in betas:
            close(p.detach().double(), self.x[p])
        optimizer.train()


def _warmup(step):
    return 0.05 * min(step, 4) / 4


def _decay(step):
    return 0.05 / (1 + step)


OPTIONS = {
    "defaults": {},
    "warmup": {"warmup": 10},
    "no decay": {"weight_decay": 0.0},
    "clipped": {"clip": 0.1},
    "not clipped": {"clip": math.inf},
    "all at z": {"betas": (0.0, 0.9)},
    "near x": {"betas": (0.98, 0.9)},
    "maximize": {"maximize": True, "weight_decay": 0.2},
    "warmup from zero": {"rate": _warmup},
    "decaying lr": {"rate": _decay},
    "tensor lr": {"lr": torch.tensor(0.05)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.usefixtures("_estimates_are_given")
def test_it_is_its_formulas(monkeypatch, what, dtype):
    monkeypatch.setattr(buckets, "PART", 2**16)  # the large one goes in five parts
    options = dict(OPTIONS[what])
    rate = options.pop("rate", None)
    model, optimizer = _start(Bag(dtype), refresh_every=3, **{"lr": 0.05, "weight_decay": 0.1, "warmup": 0, **options})
    reference = Reference(model)
    for step in range(14):
        generator = torch.Generator().manual_seed(100 + step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
    reference.check(optimizer, *((1e-11, 1e-12) if dtype == torch.float64 else (2e-5, 4e-6)))


@pytest.mark.parametrize("without", [(), (0, 1, 2, 3, 4), (5, 6, 10), tuple(range(20))])
@pytest.mark.usefixtures("_estimates_are_given")
def test_the_kernel_and_the_formula_take_over_from_each_other(monkeypatch, without):
    calls, kernel = [], torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **kwargs: (calls.append(1), kernel(*args, **kwargs)))
    model, optimizer = _start(Bag(torch.float32), lr=0.05, weight_decay=0.1, clip=0.5, warmup=5)
    reference = Reference(model)
    for step in range(20):
        monkeypatch.setattr(averaging, "has_nesterov", lambda device, step=step: step not in without)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
    reference.check(optimizer, 2e-5, 4e-6)
    with_kernel = {*range(1, 20)} - {*without}  # the first step starts the average, by the formula
    assert bool(calls) == bool(with_kernel)
    assert len(calls) >= len(with_kernel)


@pytest.mark.usefixtures("_estimates_are_given")
def test_a_parameter_that_lies_otherwise_in_memory_for_a_while():
    """It takes the formula then, and has another stretch than the others when it is back among them."""
    model, optimizer = _start(Bag(torch.float32), lr=0.05)
    reference = Reference(model)
    for step in range(12):
        lies = model.matrix.detach().t().contiguous().t() if 4 <= step < 8 else model.matrix.detach().contiguous()
        model.matrix.data = lies
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
    assert optimizer.state[model.matrix]["stretch"] != optimizer.state[model.vector]["stretch"]
    reference.check(optimizer, 2e-5, 4e-6)


def test_a_kernel_that_does_something_else_is_not_used(monkeypatch):
    has_nesterov.cache_clear()
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **kwargs: None)
    assert not has_nesterov("cpu")
    has_nesterov.cache_clear()
    monkeypatch.delattr(torch, "_fused_sgd_")
    assert not has_nesterov("cpu")
    has_nesterov.cache_clear()
    monkeypatch.undo()
    assert has_nesterov("cpu")


def _groups(model):
    return [
        {"params": [model.vector, model.matrix], "lr": 0.1, "betas": (0.5, 0.9), "schedule_free": True},
        {"params": [model.conv], "maximize": True, "clip": 0.2, "schedule_free": True},
        {"params": [model.large, model.scalar, model.empty]},
    ]


@pytest.mark.usefixtures("_estimates_are_given")
def test_groups_and_parameters_that_join_late():
    """Each has its own options and, from its first step on, its own sum of weights."""
    model, other = Bag(), Bag()
    _, optimizer = _start(model, params=_groups(model), schedule_free=False, warmup=0)
    _, plain = _start(other, params=[{**group, "schedule_free": False} for group in _groups(other)], warmup=0)
    reference = Reference(model)
    for step in range(9):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        if step < 4:
            model.matrix.grad = None
        elif step < 8:  # as many steps in the end, of other weights
            model.vector.grad = None
            optimizer.param_groups[0]["lr"] = 0.2
        for one in (optimizer, plain):
            one.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
        plain.step()
    optimizer.param_groups.pop()
    reference.check(optimizer, 1e-11, 1e-12)
    assert [optimizer.state[p]["averaged"] for p in (model.vector, model.matrix, model.conv)] == [2, 5, 9]
    assert torch.equal(model.large, other.large)
    assert torch.equal(model.scalar, other.scalar)


@pytest.mark.parametrize(
    ("options", "lr"),
    [({}, 1e-3), ({"schedule_free": True}, 6e-3), ({"schedule_free": True, "lr": 1e-3}, 1e-3), ({"lr": 6e-3}, 6e-3)],
)
def test_the_learning_rate_by_itself(options, lr):
    optimizer = fishopt.FisherAdam(nn.Linear(2, 2), nn.CrossEntropyLoss(), **options)
    assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"] == lr


def test_bad_options_are_refused():
    with pytest.raises(TypeError, match="schedule_free=1"):
        _start(schedule_free=1)


def test_betas_that_change_leave_average_and_iterate_where_they_are():
    """As OneCycleLR changes them by itself; gradients are then taken elsewhere between the same two."""
    model, optimizer = _start(lr=0.05)
    _train(model, optimizer, 20)
    optimizer.eval()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["betas"] = (0.5, 0.95)
    optimizer.train()
    optimizer.eval()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.train()
    ends = [old.double() + _offset(optimizer.state[p]) for p, old in zip(model.parameters(), before, strict=True)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.step()  # nothing but the change: the last iterate stays, and has its share in the average once more
    share = 1 / next(iter(optimizer.state.values()))["averaged"]
    averages = [(1 - share) * old.double() + share * z for old, z in zip(before, ends, strict=True)]
    for p, x, z in zip(model.parameters(), averages, ends, strict=True):
        torch.testing.assert_close(p.detach().double(), (x + z) / 2, rtol=0, atol=1e-6)
    optimizer.eval()
    for p, x in zip(model.parameters(), averages, strict=True):
        torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_evaluation_leaves_training_alone_whatever_a_scheduler_does(scheduler):
    ends = []
    for evaluates in (False, True):
        model, optimizer = _start(lr=0.02)
        how = {"total_steps": 30} if scheduler == "OneCycleLR" else {"base_lr": 0.01, "step_size_up": 5}
        schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, max_lr=0.03, **how)
        for step in range(30):
            _train(model, optimizer, 1, start=step)
            if evaluates:
                _evaluate(model)
                model.train()
            schedule.step()
        optimizer.eval()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_averaging_that_is_put_into_a_group_by_hand_is_seen_by_evaluation():
    model, optimizer = _start(schedule_free=False)
    optimizer.param_groups[0]["schedule_free"] = True
    _train(model, optimizer, 20)
    trained = [p.detach().clone() for p in model.parameters()]
    _evaluate(model)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), trained, strict=True))
