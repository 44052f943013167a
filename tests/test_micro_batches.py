"""Several backwards before a step: the residuals, and what follows from them, are those of one batch of all inputs."""

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim import recorder
from tests.optim_setup import both

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
EQUAL, UNLIKE = (3, 3, 3, 3), (5, 4, 2, 1)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _moment(kind, loss_fn, sizes, weights, scaler=None, **options):
    """The moment after a step on micro-batches whose losses are weighted so."""
    model = _model()
    optimizer = kind(model, loss_fn, **options)
    for x, y, weight in zip(X.split(sizes), Y.split(sizes), weights, strict=True):
        loss = weight * loss_fn(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
    (optimizer.step if scaler is None else lambda: scaler.step(optimizer))()
    return optimizer._moment, [p.detach() for p in model.parameters()]


@both
@pytest.mark.parametrize("sizes", [EQUAL, UNLIKE])
@pytest.mark.parametrize(
    ("loss_fn", "weigh"),
    [
        (nn.MSELoss(), lambda size: size / 12),
        (nn.MSELoss(reduction="sum"), lambda size: 1.0),
    ],
    ids=["mean", "sum"],
)
def test_dispersion_is_the_whole_batchs(kind, sizes, loss_fn, weigh):
    """However the batch is cut."""
    whole, ends = _moment(kind, loss_fn, (12,), (1.0,))
    parts, others = _moment(kind, loss_fn, sizes, [weigh(size) for size in sizes])
    assert parts.dispersion == pytest.approx(whole.dispersion, rel=1e-12)
    if sizes == EQUAL:
        assert parts.scale == whole.scale
        for a, b in zip(ends, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_dispersion_is_that_of_the_inputs_that_are_kept(monkeypatch):
    monkeypatch.setattr(recorder, "MAX_KEPT", 1)
    found, _ = _moment(fishopt.FisherAdam, nn.MSELoss(), EQUAL, (0.25,) * 4, refresh_inputs=3)
    residuals = (_model()(X) - Y).detach()[-3:]
    variance = torch.tensor(3 / 2)  # whose NLL has the gradient of MSELoss over three outputs
    assert found.dispersion == pytest.approx(float((residuals.square() / variance).mean()), rel=1e-10)
    assert found.batch_size == 12


@both
def test_a_grad_scaler_hides_nothing_of_losses_that_are_added_up(kind):
    found, ends = _moment(kind, nn.MSELoss(), EQUAL, (1.0,) * 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, others = _moment(kind, nn.MSELoss(), EQUAL, (1.0,) * 4, scaler)
    assert scaled == found
    assert found.scale == pytest.approx(4 * _moment(kind, nn.MSELoss(), EQUAL, (0.25,) * 4)[0].scale)
    assert all(map(torch.equal, ends, others))


@both
def test_a_loss_that_counts_for_nothing(kind):
    """Its weight may be zero in the end; not from the start, where nothing else tells the labels' variance."""
    model, loss_fn = _model(), nn.MSELoss()
    optimizer = kind(model, loss_fn)

    def step(weight):
        optimizer.zero_grad()
        (weight * loss_fn(model(X), Y) + 1e-3 * sum(p.square().sum() for p in model.parameters())).backward()
        optimizer.step()

    with pytest.raises(ValueError, match="other than zero, was seen"):
        step(0.0)
    step(1.0)
    known = optimizer._moment.dispersion
    for _ in range(12):
        step(0.0)
    assert optimizer._moment.dispersion == known
    assert optimizer.report().failures == 0
