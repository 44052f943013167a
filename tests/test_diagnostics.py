"""Watching leaves no trace in what is trained: nothing is changed, failures are survived, and all ends with it."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import fishopt
from fishopt.diagnostics import TrainingMonitor, measures
from fishopt.diagnostics.measures import Measurement
from tests.diagnostics_setup import LOSS, _data, _mlp, _rows, _step

# --- nothing is changed ---


class _Noisy(nn.Module):
    """Draws from torch's generator in eval mode too."""

    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


def _random_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), _Noisy(), nn.Linear(8, 3)
    ).double()


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "FisherAdam": lambda model: fishopt.FisherAdam(model, LOSS),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:the curvature of")
def test_training_is_the_same_to_the_bit(name):
    found = []
    for is_watched in (False, True):
        model, (x, y) = _random_net(), _data()
        optimizer = OPTIMIZERS[name](model)
        watched = TrainingMonitor(model, LOSS, optimizer, every=2) if is_watched else None

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        for _ in range(5):
            if name == "LBFGS":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append([*model.state_dict().values(), torch.get_rng_state(), *(p.grad for p in model.parameters())])
        if watched is not None:
            assert len(watched.history) == 3
            assert watched.failures == 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_closures_are_measured_where_the_step_starts():
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    before = float(_rows(model, x, y).norm())

    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure=closure), LOSS(_mlp()(x), y))
    assert [one.jacobian_norm for one in watched.history] == [pytest.approx(before, rel=1e-10)]
    assert watched.history[0].batch_size == 24


def test_failures_are_warned_of_once_and_training_goes_on():
    class Fragile(nn.Module):
        def forward(self, x):
            if not self.training and self.fails:
                raise RuntimeError("not in eval mode")
            return x

    model, (x, y) = _mlp(), _data()
    fragile = model.append(Fragile())[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    fragile.fails = True
    with pytest.warns(RuntimeWarning, match="measurement of TrainingMonitor failed: .*not in eval mode"):
        _step(model, optimizer, x, y)
    for _ in range(2):
        _step(model, optimizer, x, y)  # a warning would be an error
    assert watched.failures == watched.steps == 3
    assert watched.history == []
    assert watched.length == 0
    assert math.isnan(watched.condition)
    fragile.fails = False
    _step(model, optimizer, x, y)
    assert len(watched.history) == 1
    assert watched.length > 0


def test_a_step_without_a_backward_is_a_failure():
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    with pytest.warns(RuntimeWarning, match="before any backward"):
        optimizer.step()
    assert watched.failures == 1


def test_warnings_are_errors_here():
    """Or the tests above that count warnings could not fail."""
    with pytest.raises(UserWarning, match="seen"):
        warnings.warn("seen", UserWarning, stacklevel=1)
    assert measures.Measurement is Measurement


# --- coming and going ---


def test_detaching_leaves_nothing_behind():
    model, (x, y) = _mlp(), _data()
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    with TrainingMonitor(model, loss, optimizer, every=1) as watched:
        _step(model, optimizer, x, y, loss)
    watched.detach()
    watched.detach()
    _step(model, optimizer, x, y, loss)
    assert watched.steps == len(watched.history) == 1
    for owner in (model, loss):
        assert not owner._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_copy_of_the_model_is_not_watched():
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    other = copy.deepcopy(model)
    LOSS(other(x), y).backward()
    _step(model, optimizer, x[:7], y[:7])
    assert watched.history[0].batch_size == 7


class _Wrong(nn.Module):
    def forward(self, x, y):
        return x.sum()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model=3"),
        ({"loss_fn": _Wrong()}, ValueError, "_Wrong"),
        ({"optimizer": "sgd"}, TypeError, "optimizer='sgd'"),
        ({"model": nn.Linear(5, 3)}, ValueError, "group 0 holds a parameter that is not model's"),
        ({"every": 0}, ValueError, "every=0"),
        ({"every": 2.5}, ValueError, "every=2.5"),
        ({"normalize": 1}, TypeError, "normalize=1"),
        ({"generator": 3}, TypeError, "generator=3"),
    ],
)
def test_refusals(change, error, message):
    model = _mlp()
    arguments = {"model": model, "loss_fn": LOSS, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)} | change
    with pytest.raises(error, match=message):
        TrainingMonitor(**arguments)
    assert not model._forward_hooks


def test_a_group_without_a_learning_rate_is_refused():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": None})

    model = _mlp()
    with pytest.raises(ValueError, match="group 0 has lr=None"):
        TrainingMonitor(model, LOSS, Own(model.parameters()))
