"""The checks of torch's own optimizer suite: which way steps go, when there is none, and a loop over parameters.

All of torch's checks are listed in test_torch_contract.py.
"""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import fishopt
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Estimate, Moment
from tests.torch_contract_setup import Owner, X, _build, _estimate, _linear, _same, _train, _weights, configured, each

# --- direction ---


@configured
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction(info, config, contiguous):
    for constructors in info.scheduler_inputs if contiguous else [[]]:
        model, optimizer = _build(info, config, _linear(contiguous))
        schedulers = [make(optimizer) for make in constructors]
        losses = []
        for _ in range(8):
            losses.append(_train(model, optimizer, 1))
            for scheduler in schedulers:
                scheduler.step(losses[-1]) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        assert (losses[-1] > losses[0]) == config.kwargs.get("maximize", False)


@each
def test_groups_with_a_scheduler_go_in_the_right_direction(info):
    for constructors in info.scheduler_inputs:
        model = _linear()
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-2}]
        _, optimizer = _build(info, model=model, params=groups, lr=1e-3)
        schedulers = [make(optimizer) for make in constructors]
        start, rates = _train(model, optimizer, 1), [group["lr"] for group in optimizer.param_groups]
        for _ in range(8):
            loss = _train(model, optimizer, 1)
            for scheduler in schedulers:
                scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        assert loss < start
        assert rates[1] == 10 * rates[0]


@each
def test_groups_have_their_own_lr(info):
    model = _linear()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.0}]
    _, optimizer = _build(info, model=model, params=groups, lr=1e-2)
    weight, bias = _weights(model)
    _train(model, optimizer)
    assert not torch.equal(weight, model.weight)
    assert torch.equal(bias, model.bias)


@each
def test_groups_have_their_own_weight_decay(info):
    """Decoupled: with zero gradients, the decay is all there is."""
    model = _linear()
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.0}]
    _, optimizer = _build(info, model=model, params=groups, lr=0.1)
    _estimate(model, optimizer)
    weight, bias = _weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * 0.95, rtol=1e-6, atol=0)
    assert torch.equal(bias, model.bias)


@each
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("decayed", [False, True])
def test_a_tensor_lr_is_a_number(info, shape, decayed):
    """A number that float32 holds, so that nothing is rounded; stepped by a scheduler as well."""
    ends = []
    for lr in (2.0**-7, torch.full(shape, 2.0**-7)):
        model, optimizer = _build(info, lr=lr, weight_decay=0.1)
        for _ in range(5):
            _train(model, optimizer, 1)
            if decayed:
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
        ends.append(_weights(model))
    assert _same(*ends)


@configured
def test_maximize_is_minimizing_the_negated_loss(info, config):
    """Bit for bit, as the estimates are the same: MSE's residuals come in squares."""
    ends = []
    for maximize in (False, True):
        model, optimizer = _build(info, config, maximize=maximize)
        _train(model, optimizer, 5, sign=-1.0 if maximize else 1.0)
        ends.append(_weights(model))
    assert _same(*ends)


# --- nothing to do ---


@configured
def test_no_gradients_no_step(info, config):
    """Not even a decay; a frozen parameter's is None as well."""
    model, optimizer = _build(info, config)
    _estimate(model, optimizer)
    before = _weights(model)
    for p in model.parameters():
        p.grad = None
    optimizer.step()
    assert _same(before, model.parameters())
    model.bias.requires_grad_(False)
    _train(model, optimizer)
    assert torch.equal(before[1], model.bias)
    assert not torch.equal(before[0], model.weight)


@configured
def test_zero_gradients_leave_all_but_the_decay(info, config):
    model, optimizer = _build(info, config)
    _estimate(model, optimizer)
    group = optimizer.param_groups[0]
    kept = 1 - float(group["lr"]) * group["weight_decay"]
    before = [kept * p for p in _weights(model)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(_weights(model), before, rtol=1e-6, atol=0)


# --- lists of tensors against a loop over parameters, by the docstrings' formulas ---


@pytest.fixture
def _estimates_are_given(monkeypatch):
    def refresh(self, units, wanted, record, training, step):
        return Estimate({name: _fisher(name, p, step) for name, p in self._model.named_parameters()}, MOMENT)

    monkeypatch.setattr(Curvature, "refresh", refresh)


MOMENT = Moment(4, 1.0, 1.0)


def _fisher(name, p, step):
    generator = torch.Generator().manual_seed(100 * step + sum(map(ord, name)))
    return torch.rand(p.shape, generator=generator, dtype=torch.float64).to(torch.promote_types(p.dtype, torch.float32))


class Loop:
    """One parameter at a time, in float64, or rounded to a parameter's own dtype after each step."""

    def __init__(self, optimizer, names):
        self.optimizer, self.names, self.t, self.peak = optimizer, names, 0, 0.0
        self.m = {p: torch.zeros(p.shape, dtype=torch.float64) for p in names}
        self.f = {p: torch.zeros_like(m) for p, m in self.m.items()}
        self.values = {p: p.detach().double() for p in names}
        self.z, self.x = dict(self.values), dict(self.values)

    def step(self, decay):
        self.t += 1
        for p, name in self.names.items():
            self.f[p].lerp_(_fisher(name, p, self.t - 1).double(), 1 - decay)
        fisher = {p: f / (1 - decay**self.t) for p, f in self.f.items()}
        mean = float(sum(f.sum() for f in fisher.values()) / sum(max(f.numel(), 1) for f in fisher.values()))
        self.peak = max(self.peak, mean)
        groups = [(p, group) for group in self.optimizer.param_groups for p in group["params"]]
        is_adam = isinstance(self.optimizer, fishopt.FisherAdam)
        steps = (self.adam if is_adam else self.ngd)(groups, fisher, mean)
        for (p, group), step in zip(groups, steps, strict=True):
            moved = self.values[p] * float(group["lr"]) * group["weight_decay"] + step
            value = self.between(p, group, moved) if group.get("schedule_free") else self.values[p] - moved
            self.values[p] = value.to(p.dtype).double()

    def between(self, p, group, moved):
        self.z[p] = self.z[p] - moved
        self.x[p] = self.x[p] + (self.z[p] - self.x[p]) / self.t
        y = self.z[p].lerp(self.x[p], group["betas"][0])
        for kept in (self.z, self.x):  # what y loses in rounding they lose with it
            kept[p] = kept[p] + (y.to(p.dtype).double() - y)
        return y

    def average(self, p, group, beta):
        beta = 0.0 if group.get("schedule_free") else beta
        self.m[p].lerp_(p.grad.double() * (-1 if group["maximize"] else 1), 1 - beta)
        return self.m[p] / (1 - beta**self.t)

    def adam(self, groups, fisher, mean):
        for p, group in groups:
            rms = math.sqrt(mean / MOMENT.batch_size)
            denominator = (fisher[p] / MOMENT.batch_size).sqrt() + group["damping"] * rms + group["eps"]
            update = self.average(p, group, group["betas"][0]) / denominator
            if update.numel():
                update /= max(1.0, float(update.square().mean().sqrt()) / group["clip"])
            yield group["lr"] * update

    def ngd(self, groups, fisher, mean):
        damped = {p: fisher[p] + group["damping"] * self.peak for p, group in groups}
        steps = [group["lr"] * self.average(p, group, group["momentum"]) / damped[p] for p, group in groups]
        divergence = sum(float((d.square() * damped[p]).sum()) for d, (p, _) in zip(steps, groups, strict=True)) / 2
        scale = min(1.0, math.sqrt(groups[0][1]["kl_radius"] / max(divergence, 1e-300)))
        return [scale * d for d in steps]


def _odd_parameters(dtypes):
    """Of every size and layout."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (7,), (), (0,), (2, 3, 4, 4), (5, 6)]
    for dtype in dtypes:
        for shape in shapes:
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if len(shape) == 4:
                value = value.to(memory_format=torch.channels_last)
            p = nn.Parameter(value)
            if shape == (5, 6):
                p.data = torch.stack([value] * 2, dim=-1)[..., 0]
            yield p


@configured
@pytest.mark.parametrize("dtypes", ["float64", "float32", "mixed"])
@pytest.mark.usefixtures("_estimates_are_given")
def test_agrees_with_a_loop_over_parameters(info, config, dtypes):
    kinds = [torch.float32, torch.float64, torch.bfloat16] if dtypes == "mixed" else [getattr(torch, dtypes)]
    params = list(_odd_parameters(kinds))
    model = Owner(params)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.01, "weight_decay": 0.2, "maximize": True}]
    options = {"refresh_every": 1, "estimator": "I1", "lr": 0.05}
    if info.optim_cls is fishopt.DiagonalNGD:
        options["kl_radius"] = config.kwargs.get("kl_radius", 1e-2)
    _, optimizer = _build(info, config, model, **{"params": groups, **options})
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        model(X)
        loop.step(optimizer._decay(optimizer.param_groups[0]))
        optimizer.step()
    for p in params:
        # Beside others in float32, float64 is scaled by what these add to the mean and to the divergence.
        rtol, atol = (1e-10, 1e-12) if dtypes == "float64" else (2e-5, 1e-6)
        if p.dtype == torch.bfloat16:
            rtol, atol = 2.0**-7, 1e-3  # a value between two may be rounded to the other one
        torch.testing.assert_close(p.detach().double(), loop.values[p], rtol=rtol, atol=atol)


@each
def test_another_default_dtype(info):
    """A model in float32 is none the wiser; one built under it trains in float64."""
    ends = []
    for dtype in (torch.float32, torch.float64):
        model, optimizer = _build(info)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            _train(model, optimizer, 5)
            wide = Owner([nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(2.0))])
            start = _train(wide, other := _build(info, model=wide)[1], 1)
            assert _train(wide, other, 5) < start
            assert other.state[wide.all[0]]["fisher"].dtype == dtype
        finally:
            torch.set_default_dtype(before)
        ends.append(_weights(model))
    assert _same(*ends)
