"""What the batch of a watched step is: of all forwards, those that its gradient is from, and what of them counts."""

import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.diagnostics import TrainingMonitor, monitor
from tests.diagnostics_setup import LOSS, _data, _mlp, _rows, _step


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("place", ["first", "before backward", "last"])
def test_the_batch_under_orders_of_zero_grad(place, to_none):
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    for size in (4, 9, 7):
        if place == "first":
            optimizer.zero_grad(to_none)
        loss = LOSS(model(x[:size]), y[:size])
        if place == "before backward":
            optimizer.zero_grad(to_none)
        loss.backward()
        optimizer.step()
        if place == "last":
            optimizer.zero_grad(to_none)
    assert [one.batch_size for one in watched.history] == [4, 9, 7]


def test_what_was_thrown_away_does_not_count():
    """As in a GAN, where the generator's loss goes backward through the discriminator."""
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    LOSS(model(x[:6]), y[:6]).backward()
    with torch.no_grad():
        model(x)
    model(x)  # no backward
    _step(model, optimizer, x[6:10], y[6:10])
    assert watched.history[0].batch_size == 4
    assert watched.history[0].jacobian_norm == pytest.approx(float(_rows(_mlp(), x[6:10], y[6:10]).norm()), rel=1e-10)


def test_batches_of_steps_that_are_not_measured():
    """In micro-batches, with what was thrown away, twice backward, and by keyword."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _mlp()

        def forward(self, *, x):
            return {"logits": self.inner(x)}["logits"]

    model, (x, y) = Named(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=10)
    LOSS(model(x=x), y).backward()
    optimizer.step()
    norm, expected = watched.history[0].jacobian_norm, watched.length
    optimizer.zero_grad()
    LOSS(model(x=x[:9]), y[:9]).backward()
    optimizer.zero_grad()
    for rows in (slice(0, 4), slice(4, 7)):
        loss = LOSS(model(x=x[rows]), y[rows])
        loss.backward(retain_graph=True)
        loss.backward()
    with torch.no_grad():
        model(x=x)
    optimizer.step()
    expected += 0.1 / 7 * norm
    assert watched.length == pytest.approx(expected, rel=1e-12)
    optimizer.step()  # on no input
    assert watched.length == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("divisor", [3, 1])
def test_micro_batches_are_one_batch(divisor):
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    optimizer.zero_grad()
    for part in range(3):
        rows = slice(8 * part, 8 * part + 8)
        (LOSS(model(x[rows]), y[rows]) / divisor).backward()
    square = sum(float(p.grad.square().sum()) for p in model.parameters())
    optimizer.step()
    (found,) = watched.history
    assert found.batch_size == 24
    assert found.gradient_square == pytest.approx(square, rel=1e-8)


def test_a_scaled_loss_is_seen_through():
    found = []
    for scale in (1.0, 1024.0):
        model, (x, y) = _mlp(), _data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watched = TrainingMonitor(model, LOSS, optimizer)
        (LOSS(model(x), y) * scale).backward()
        for p in model.parameters():
            p.grad /= scale  # as GradScaler.unscale_ does
        optimizer.step()
        found.append(watched.history[0])
    assert found[0] == found[1]


def test_positions_that_are_ignored_do_not_count():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    y = torch.randint(3, (6, 4))
    y[0, 1:] = y[3, :2] = -100
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, fishopt.Categorical(dim=-1), optimizer)
    exact = fishopt.fisher_diagonal(model, x, fishopt.Categorical(dim=-1), estimator="exact", targets=y)
    loss(model(x).flatten(0, 1), y.flatten()).backward()
    square = sum(float(p.grad.square().sum()) for p in model.parameters())
    optimizer.step()
    assert watched.history[0].gradient_square == pytest.approx(square, rel=1e-8)
    assert watched.history[0].trace == pytest.approx(sum(float(v.sum()) for v in exact.values()), rel=1e-8)


def test_many_outputs_leave_the_fisher_part_out(monkeypatch):
    monkeypatch.setattr(monitor, "COLUMN_LIMIT", 2)
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    _step(model, optimizer, x, y)
    assert watched.failures == 0
    assert math.isnan(watched.history[0].trace)
    assert watched.history[0].condition > 1
