"""The optimizers: training, known limits, failed refreshes and the schedule of refreshes."""

import itertools
import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.curvature import Curvature
from tests.optim_setup import _problem, _train, _weights, both


@both
@pytest.mark.parametrize("estimator", ["auto", "I1", "I2", "exact", "hutchinson", "empirical"])
def test_training_lowers_the_loss(kind, estimator):
    model, x, y = _problem()
    start = float(nn.functional.cross_entropy(model(x), y).detach())
    fast = {"lr": 1e-2} if kind is fishopt.FisherAdam else {"lr": 3e-2, "kl_radius": 1e-4}
    _train(model, kind(model, nn.CrossEntropyLoss(), estimator=estimator, **fast), x, y, steps=150)
    assert float(nn.functional.cross_entropy(model(x), y).detach()) < 0.5 * start


LOSSES = {
    "mse": (nn.MSELoss(), lambda z: z),
    "mse_sum": (nn.MSELoss(reduction="sum"), lambda z: z),
    "bce": (nn.BCEWithLogitsLoss(), lambda z: (z > 0).float()),
    "bce_sum": (nn.BCEWithLogitsLoss(reduction="sum"), lambda z: (z > 0).float()),
    "poisson": (nn.PoissonNLLLoss(), lambda z: z.exp().round()),
}


@both
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(kind, name):
    loss_fn, targets_of = LOSSES[name]
    model, x, _ = _problem()
    y = targets_of(0.5 * x @ torch.randn(6, 3))
    start = float(loss_fn(model(x), y).detach())
    _train(model, kind(model, loss_fn), x, y, steps=300, loss_fn=loss_fn)
    end = float(loss_fn(model(x), y).detach())
    assert end < start - 0.1 * abs(start)


@both
def test_the_scale_of_the_loss_does_not_matter(kind):
    """Sum or mean over inputs: the same steps, up to rounding."""
    ends = []
    for loss_fn in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        model, x, y = _problem(act=nn.Tanh)
        optimizer = kind(model, loss_fn, estimator="exact")
        _train(model, optimizer, x, y, loss_fn=loss_fn)
        ends.append(_weights(model))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def _minibatch_squared(self, units, wanted, record, training, step):
    """B times the square of the mini-batch gradient: with it, F/B is what Adam averages."""
    from fishopt.optim.estimate import Estimate, Moment

    names = dict(self._model.named_parameters())
    return Estimate({n: 16.0 * p.grad.square() for n, p in names.items()}, Moment(16, 1.0, 1.0))


@pytest.mark.parametrize("maximize", [False, True])
def test_fisher_adam_with_squared_gradients_is_adam(monkeypatch, maximize):
    monkeypatch.setattr(Curvature, "refresh", _minibatch_squared)
    ends = []
    for build in (
        lambda m: fishopt.FisherAdam(
            m,
            "categorical",
            lr=1e-2,
            betas=(0.9, 0.99),
            damping=0.0,
            clip=math.inf,
            weight_decay=0.1,
            refresh_every=1,
            maximize=maximize,
        ),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, maximize=maximize),
    ):
        model, x, y = _problem()
        model, x = model.double(), x.double()
        _train(model, build(model), x, y, steps=50)
        ends.append(_weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_ngd_with_infinite_damping_is_gradient_descent():
    model, x, y = _problem()
    before = _weights(model)
    optimizer = fishopt.DiagonalNGD(model, nn.CrossEntropyLoss(), damping=1e12, momentum=0.0, kl_radius=1e30, lr=1e10)
    _train(model, optimizer, x, y, steps=1)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert nn.functional.cosine_similarity(_weights(model) - before, -gradient, dim=0) > 1 - 1e-6


def test_ngd_keeps_the_predicted_divergence():
    """With a huge learning rate the step lies on the trust region's edge: d^T (F + damping) d / 2 = radius."""
    model, x, y = _problem()
    optimizer = fishopt.DiagonalNGD(model, nn.CrossEntropyLoss(), lr=1e6, kl_radius=1e-4, damping=0.5)
    before = _weights(model)
    _train(model, optimizer, x, y, steps=1)
    step = _weights(model) - before
    damped = torch.cat([optimizer.state[p]["preconditioner"].flatten() ** -2 for p in model.parameters()])
    torch.testing.assert_close((step.square() * damped).sum() / 2, torch.tensor(1e-4), rtol=1e-3, atol=0)


def test_fisher_adam_clips_each_tensor():
    model, x, y = _problem()
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), damping=0.0, clip=0.01, lr=1.0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    _train(model, optimizer, x, y, steps=1)
    for p, old in zip(model.parameters(), before, strict=True):
        assert (p - old).square().mean().sqrt() <= 0.01 * (1 + 1e-4)


def test_squared_loss_estimates_the_variance():
    """F is scaled by the residuals' variance, so the size of the step does not depend on the targets' unit."""
    steps = []
    for unit in (1.0, 1000.0):
        model, x, _ = _problem(act=nn.Tanh)
        model, x = model.double(), x.double()
        with torch.no_grad():
            model[2].weight.mul_(unit)
            model[2].bias.mul_(unit)
        y = unit * (x @ torch.ones(6, 3, dtype=x.dtype))
        optimizer = fishopt.FisherAdam(model, nn.MSELoss(), weight_decay=0.0, estimator="exact", eps=0.0)
        before = model[2].weight.detach().clone()
        residuals = float((model(x[:16]) - y[:16]).detach().square().mean())
        _train(model, optimizer, x, y, steps=1, loss_fn=nn.MSELoss())
        steps.append(model[2].weight.detach() - before)
        noise = optimizer._moment.dispersion * 3 / 2
        assert math.isclose(noise, residuals, rel_tol=1e-9)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=1e-15)


@both
def test_gaussian_of_unknown_variance_as_likelihood(kind):
    model, x, _ = _problem()
    y = x @ torch.ones(6, 3)
    optimizer = kind(model, fishopt.Gaussian(variance="estimated"))
    start = float(nn.functional.mse_loss(model(x), y).detach())
    _train(model, optimizer, x, y, steps=100, loss_fn=nn.MSELoss())
    assert float(nn.functional.mse_loss(model(x), y).detach()) < start


# --- failed refreshes ---


@both
def test_a_failed_refresh_is_survived_counted_and_warned_of_once(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), refresh_every=1)
    _train(model, optimizer, x, y, steps=12)
    before = {p: optimizer.state[p]["preconditioner"].clone() for p in model.parameters()}
    bad = torch.full((4, 6), float("nan"))
    for attempt in range(3):
        optimizer.zero_grad()
        model(bad).sum().backward()
        for p in model.parameters():
            p.grad.zero_()
        if attempt:
            optimizer.step()
        else:
            with pytest.warns(RuntimeWarning, match="NaN or infinite"):
                optimizer.step()
    assert optimizer.report().failures == 3
    assert all(torch.equal(optimizer.state[p]["preconditioner"], before[p]) for p in model.parameters())
    assert torch.isfinite(_weights(model)).all()
    _train(model, optimizer, x, y, steps=3)
    assert optimizer.report().failures == 3


@both
def test_refresh_after_refresh_failing_stops_training(kind):
    model, _x, _ = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())

    def attempt():
        model(torch.full((4, 6), float("inf"))).sum().backward()
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()

    with pytest.warns(RuntimeWarning):
        attempt()
    for _ in range(8):
        attempt()
    with pytest.raises(RuntimeError, match="10 curvature refreshes in a row"):
        attempt()


def test_a_negative_estimate_is_clamped(monkeypatch):
    model, x, y = _problem(act=nn.Sigmoid)
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), estimator="I2", refresh_inputs=2)
    _train(model, optimizer, x, y, steps=30)
    assert any((optimizer.state[p]["fisher"] < 0).any() for p in model.parameters())
    for p in model.parameters():
        assert torch.isfinite(optimizer.state[p]["preconditioner"]).all()
        assert (optimizer.state[p]["preconditioner"] > 0).all()
    assert torch.isfinite(_weights(model)).all()


# --- the schedule ---


@both
def test_refreshes_and_selections_keep_their_schedule(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), refresh_every=10)
    _train(model, optimizer, x, y, steps=101)
    report = optimizer.report()
    # At steps 0, 1, ... 10, then every 2 to 20, every 4 to 40, every 8 to 80, and every 10.
    assert report.rows[0].refreshes == 11 + 5 + 5 + 5 + 2
    steps = [entry["step"] for entry in report.history]
    assert steps[0] == 0
    assert all(b >= 2 * a for a, b in itertools.pairwise(steps))
    assert 2 <= len(steps) <= 4


@both
def test_refresh_by_hand_replaces_the_next_one(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    optimizer.refresh(x)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.report().rows[0].refreshes == 1


@both
def test_criterion_bound_gives_the_papers_choice(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.Sigmoid(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    optimizer = kind(model, nn.CrossEntropyLoss(), criterion="bound", refresh_inputs=4)
    optimizer.refresh(torch.rand(4, 784))
    assert [row.estimator for row in optimizer.report().rows] == ["I1", "I1", "I2"]


@both
def test_a_thousand_outputs_stay_cheap(kind):
    """The default rule never takes a column per output in a hidden layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1000))
    optimizer = kind(model, nn.CrossEntropyLoss())
    optimizer.refresh(torch.randn(16, 8))
    assert [row.estimator for row in optimizer.report().rows] == ["hutchinson", "I2"]
