"""A run goes on through bad numbers, in gradients and in a refresh; or stops with the cause."""

import math
import re

import pytest
import torch
from torch import nn

from fishopt.optim.failures import MAX_FAILURES
from fishopt.optim.gradients import MAX_SKIPPED
from tests.survival_setup import LOSSES, _batch, _kept, _spoil_eval, _start, _step, _steps, both, when


def _fill(value, *places):
    def spoil(x, y):
        for tensor in [(x, y)[place] for place in places]:
            tensor[3, ...] = value

    return spoil


# --- gradients ---


def _in_a_gradient(value):
    def spoil(model):
        model.last.weight.grad[1, 1] = value

    return spoil


BAD_BATCHES = {
    "inputs": (_fill(math.nan, 0), None),
    "infinite inputs": (_fill(math.inf, 0), None),
    "targets": (_fill(math.nan, 1), None),
    "infinite targets": (_fill(-math.inf, 1), None),
    "one gradient": (lambda x, y: None, _in_a_gradient(math.nan)),
    "one infinite gradient": (lambda x, y: None, _in_a_gradient(-math.inf)),
}


@both
@when
@pytest.mark.parametrize("what", BAD_BATCHES)
def test_a_step_with_bad_gradients_is_skipped(kind, after, what):
    """Nothing is spoilt by it: the run is the one without this batch."""
    spoil, in_gradients = BAD_BATCHES[what]
    model, optimizer = _start(kind, "mse", after)
    before = _kept(model, optimizer)
    with pytest.warns(RuntimeWarning, match=r"gradient of '.*NaN or infinite. The step is skipped") as caught:
        _step(model, optimizer, 99, "mse", spoil, lambda: in_gradients and in_gradients(model))
    assert len(caught) == 1
    assert _kept(model, optimizer) == before
    _step(model, optimizer, 99, "mse", spoil, lambda: in_gradients and in_gradients(model))
    report = optimizer.report()
    assert (report.steps, report.skipped, report.failures) == (after, 2, 0)
    assert "skipped for their gradients: 2" in str(report)
    other, without = _start(kind, "mse", after)
    for step in range(after, after + 15):
        _step(model, optimizer, step, "mse")
        _step(other, without, step, "mse")
    assert _kept(model, optimizer) == _kept(other, without)


@both
@when
def test_many_such_steps_in_a_row_stop_training(kind, after):
    model, optimizer = _start(kind, steps=after)
    bad = _in_a_gradient(math.nan)
    with pytest.warns(RuntimeWarning, match=re.escape("'last.weight' is NaN")):
        _step(model, optimizer, 0, before=lambda: bad(model))
    for _ in range(MAX_SKIPPED - 2):
        _step(model, optimizer, 0, before=lambda: bad(model))
    _step(model, optimizer, 0)
    for _ in range(MAX_SKIPPED - 1):
        _step(model, optimizer, 0, before=lambda: bad(model))
    before = _kept(model, optimizer)
    with pytest.raises(RuntimeError, match=r"10 steps in a row were skipped.*'last.weight'.*Lower lr"):
        _step(model, optimizer, 0, before=lambda: bad(model))
    assert _kept(model, optimizer) == before
    _step(model, optimizer, 0)  # whoever catches it may go on


@both
def test_finite_gradients_whose_sum_is_not_are_taken(kind):
    model, optimizer = _start(kind)
    _step(model, optimizer, 0, before=lambda: model.first.weight.grad.fill_(1e38))
    assert optimizer.report().skipped == 0
    assert optimizer.report().steps == 1


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_any_dtype_are_looked_at(kind, dtype):
    """Also next to others, and where the norm of finite ones does not fit into their dtype."""
    model, optimizer = _start(kind)
    model.last.to(dtype)
    model.in_training = model.in_eval = Cast(dtype)
    for bad in (False, True):
        model(_batch(0)[0]).float().square().sum().backward()
        model.last.weight.grad.fill_(3e4)
        model.first.weight.grad[0, 0] = math.nan if bad else 0.0
        if bad:
            with pytest.warns(RuntimeWarning, match="'first.weight' is NaN"):
                optimizer.step()
        else:
            optimizer.step()
    assert (optimizer.report().steps, optimizer.report().skipped) == (1, 1)


class Cast(nn.Module):
    """To half precision in training; curvature's copy of the layer is in float32."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, h):
        return h.to(self.dtype) if self.training else h


@both
def test_skipped_steps_are_in_checkpoints_and_copies(kind):
    model, optimizer = _start(kind)
    with pytest.warns(RuntimeWarning, match="skipped"):
        _step(model, optimizer, 0, before=lambda: _in_a_gradient(math.nan)(model))
    _, other = _start(kind)
    other.load_state_dict(optimizer.state_dict())
    assert other.report().skipped == 1


@both
@when
def test_a_scaler_looks_by_itself(kind, after):
    """Overflows are its daily business: neither warned of nor counted."""
    model, optimizer = _start(kind, steps=after)
    before = _kept(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(MAX_SKIPPED + 1):
        x, y = _batch(0)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        model.last.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.report().skipped == 0
    assert _kept(model, optimizer) == before


# --- numbers in a refresh ---


def _spoilt_estimate(monkeypatch):
    from fishopt.optim import curvature

    def spoilt(*args, **options):
        found = estimate(*args, **options)
        found["first.weight"][0, 0] = math.nan
        return found

    estimate = curvature.estimate
    monkeypatch.setattr(curvature, "estimate", spoilt)


REFRESHES = {
    "activations": lambda model, patch: setattr(model, "in_eval", _spoil_eval(math.nan)),
    "infinite activations": lambda model, patch: setattr(model, "in_eval", _spoil_eval(math.inf)),
    "the estimate": lambda model, patch: _spoilt_estimate(patch),
}


@both
@pytest.mark.parametrize("what", REFRESHES)
def test_a_refresh_with_bad_numbers_in_the_middle(kind, what, monkeypatch):
    """The step is made with the last good estimate."""
    model, optimizer = _start(kind, steps=12)
    preconditioners = [optimizer.state[p]["preconditioner"].clone() for p in model.parameters()]
    before, refreshes = [p.detach().clone() for p in model.parameters()], optimizer.report().rows[0].refreshes
    with monkeypatch.context() as patch:
        REFRESHES[what](model, patch)
        with pytest.warns(RuntimeWarning, match=r"NaN or infinite.*The last good estimate stays in use") as caught:
            _steps(model, optimizer, range(12, 15))
    assert len(caught) == 1
    for p, old, kept in zip(model.parameters(), before, preconditioners, strict=True):
        assert torch.equal(optimizer.state[p]["preconditioner"], kept)
        assert torch.isfinite(p).all()
        assert not torch.equal(p, old)
    report = optimizer.report()
    assert (report.steps, report.failures, report.rows[0].refreshes) == (15, 3, refreshes)
    model.in_eval = None
    _step(model, optimizer, 15)
    assert optimizer.report().rows[0].refreshes == refreshes + 1
    assert optimizer._curvature.failures.in_a_row == 0


@both
@pytest.mark.parametrize("what", REFRESHES)
def test_a_refresh_with_bad_numbers_at_the_first_step(kind, what, monkeypatch):
    """Parameters wait for an estimate; each step looks for one, and when there is one the run is as any other."""
    model, optimizer = _start(kind, refresh_every=1000)
    before = [p.detach().clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        REFRESHES[what](model, patch)
        with pytest.warns(RuntimeWarning, match="There is none yet: parameters stay as they are until") as caught:
            _steps(model, optimizer, range(3))
    assert len(caught) == 1
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.report().failures == 3
    model.in_eval = None
    _steps(model, optimizer, range(3, 6))
    assert not any(map(torch.equal, before, model.parameters()))
    assert [optimizer.state[p]["step"] for p in model.parameters()] == [3] * 4


@both
@when
@pytest.mark.parametrize("what", REFRESHES)
def test_bad_numbers_refresh_after_refresh_stop_training(kind, after, what, monkeypatch):
    """So nothing is left untrained for more than ten steps."""
    model, optimizer = _start(kind, steps=after)
    REFRESHES[what](model, monkeypatch)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        _step(model, optimizer, after)
    _steps(model, optimizer, range(after + 1, after + MAX_FAILURES - 1))
    before = _kept(model, optimizer)
    with pytest.raises(RuntimeError, match=r"10 curvature refreshes in a row.*NaN or infinite.*Lower lr"):
        _step(model, optimizer, 99)
    assert _kept(model, optimizer) == before


@both
def test_a_layer_that_is_added_while_refreshes_fail_waits(kind):
    """The others are trained meanwhile, and every step looks for an estimate."""
    model, optimizer = _start(kind, refresh_every=1000)
    optimizer = kind(model, LOSSES["ce"], params=model.first.parameters(), refresh_every=1000)
    _steps(model, optimizer, range(12))
    optimizer.add_param_group({"params": model.last.parameters()})
    old = [p.detach().clone() for p in model.parameters()]
    model.in_eval = _spoil_eval(math.nan)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        _step(model, optimizer, 12)
    _step(model, optimizer, 13)
    assert [torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True)] == [False, False, True, True]
    assert optimizer.report().failures == 2
    model.in_eval = None
    _step(model, optimizer, 14)
    assert not torch.equal(model.last.weight, old[2])
