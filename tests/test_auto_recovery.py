"""That lr="auto" goes on from where there was nothing to gain, and evaluates the loss that was trained on."""

import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.search import Memory

LOSS = nn.MSELoss()


def _regression():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 0.8 * torch.randn(64, 1)
    generator = torch.Generator().manual_seed(0)
    return model, LOSS, fishopt.DiagonalNGD(model, LOSS, lr="auto", generator=generator), x, y


def _fit(model, loss_fn, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss_fn(model(x), y))


def _least(x, y):
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    return float((design @ torch.linalg.lstsq(design, y.double()).solution - y).square().mean())


def _nothing_to_gain(kind, model, loss_fn, optimizer, x, y):
    """Forty steps or more that cannot make the loss smaller."""
    if kind == "at the minimum":
        _fit(model, loss_fn, optimizer, x, y, 60)
    elif kind == "without a gradient":
        with torch.no_grad():
            exact = model(x)
        _fit(model, loss_fn, optimizer, x, exact, 40)
    else:
        optimizer.param_groups[0]["lr"] = 0.0
        _fit(model, loss_fn, optimizer, x, y, 40)
        optimizer.param_groups[0]["lr"] = 1.0


@pytest.mark.parametrize("kind", ["at the minimum", "without a gradient", "at a rate of zero"])
def test_what_cannot_be_gained_does_not_stop_what_follows(kind):
    model, loss_fn, optimizer, x, y = _regression()
    _nothing_to_gain(kind, model, loss_fn, optimizer, x, y)
    assert optimizer.param_groups[0]["auto"][0] <= 1.0
    other = -3 * y + 1
    assert _fit(model, loss_fn, optimizer, x, other, 15) < 1.001 * _least(x, other)


def test_a_model_that_is_not_finite_leaves_the_average_alone():
    """On a GPU gradients are not looked at in each step."""
    memory = Memory(averaged=3.0, slopes=(-1.0, -0.5), curvature=(2.0, 0.1, 1.0), metric=0.2)
    whole = torch.eye(2, dtype=torch.float64)
    bad = fishopt.optim.quadratic.Quadratic(torch.tensor([math.nan, -1.0]).double(), whole, whole)
    assert memory.after(bad) == (bad, memory)
    assert memory.after(bad._replace(slopes=torch.tensor([-1.0, -1.0]).double()))[1].averaged == 4


def test_an_output_changed_in_place_is_no_output_of_the_model():
    """The loss would be evaluated at what it was before."""
    model, loss_fn, optimizer, x, y = _regression()
    h = model(x)
    h /= 8.0
    loss_fn(h, y).backward()
    with pytest.raises(ValueError, match="no call of a loss module on the model's output was seen"):
        optimizer.step()


@pytest.mark.parametrize("how", ["target", "both"])
def test_the_loss_may_be_called_by_keyword(how):
    model, loss_fn, optimizer, x, y = _regression()
    again, _, other, _, _ = _regression()
    for _ in range(3):
        optimizer.zero_grad()
        h = model(x)
        (loss_fn(h, target=y) if how == "target" else loss_fn(target=y, input=h)).backward()
        optimizer.step()
    _fit(again, loss_fn, other, x, y, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_step_within_autocast_is_in_full_precision():
    model, loss_fn, optimizer, x, y = _regression()
    again, _, other, _, _ = _regression()
    for one, own in ((model, optimizer), (again, other)):
        loss_fn(one(x), y).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=one is model):
            own.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["FisherAdam", "DiagonalNGD", "auto"])
def test_the_default_device_is_not_where_the_model_is(kind):
    """Everything goes where the model and the inputs are; what is made on the default device breaks here."""
    model, loss_fn, optimizer, x, y = _regression()
    if kind != "auto":
        optimizer = getattr(fishopt, kind)(model, loss_fn)
    for _ in range(12):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        with torch.device("meta"):
            optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("size", [1e-3, 1e-1])
def test_a_penalty_outside_the_loss_is_warned_of_at_the_minimum_too(size):
    """There all of the gradient is the penalty's."""
    model, loss_fn, optimizer, x, y = _regression()

    def penalized(h, y):
        return loss_fn(h, y) + size * sum(p.square().sum() for p in model.parameters())

    _fit(model, loss_fn, optimizer, x, y, 60)
    with pytest.warns(RuntimeWarning, match="of the gradient is not of the loss"):
        _fit(model, penalized, optimizer, x, y, 1)
