"""Theorem C.1: bounds on the variance of every entry of the Fisher matrix, against enumeration in float64."""

import pytest
import torch
from torch import nn

import fishopt
from fishopt.traces import off_diagonal_bound
from tests.cases import Case
from tests.reference import derivatives, labels, moments
from tests.spectrum_setup import _flat


def _variances(case):
    """The label variance of every entry of I1's and I2's matrices, by every label: the means over inputs."""
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    statistic, weights = labels(case.family, d.h)
    c = moments(d, case.family).eta - statistic
    scores = torch.einsum("nap,kna->knp", d.first, c)
    i1 = scores[..., :, None] * scores[..., None, :]
    second = _hessians(model, inputs)
    i2 = torch.einsum("napq,kna->knpq", second, c)
    found = {}
    for name, value in (("I1", i1), ("I2", i2)):
        mean = torch.einsum("kn,knpq->npq", weights, value)
        found[name] = torch.einsum("kn,knpq->npq", weights, (value - mean).square()).mean(0)
    return model, inputs, likelihood, found


def _hessians(model, inputs):
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in named.values()])

    def output(theta, *x):
        parts = zip(named.items(), theta.split([p.numel() for p in named.values()]), strict=True)
        values = {name: part.reshape(p.shape) for (name, p), part in parts}
        return torch.func.functional_call(model, values, tuple(v[None] for v in x)).reshape(-1)

    return torch.stack([torch.func.hessian(output)(flat, *x) for x in zip(*inputs, strict=True)])


@pytest.mark.parametrize(
    "case",
    [Case(n, f) for n in ("sigmoid", "relu", "tied") for f in ("categorical", "bernoulli", "gaussian")]
    + [Case("sigmoid", "poisson", outputs=1)],
    ids=str,
)
@pytest.mark.parametrize("estimator", ["I1", "I2"])
def test_theorem_c1_bounds_the_variance_of_every_entry(case, estimator):
    model, inputs, likelihood, found = _variances(case)
    bound = off_diagonal_bound(model, inputs, likelihood, estimator=estimator)
    assert bound.shape == found[estimator].shape
    assert (found[estimator] <= bound * (1 + 1e-9) + 1e-14).all()
    torch.testing.assert_close(bound, bound.T)
    if estimator == "I2":  # its diagonal is Theorem 4.1's
        own = fishopt.variance_bound(model, inputs, likelihood, estimator="I2", tight=True)
        torch.testing.assert_close(bound.diagonal(), _flat(own), rtol=1e-8, atol=1e-13)
        assert (bound[found["I2"] > 1e-9] < 200 * found["I2"][found["I2"] > 1e-9]).float().mean() > 0.5


def test_the_bound_on_i1_is_an_equality_for_one_gaussian_output():
    model, inputs, likelihood, found = _variances(Case("sigmoid", "gaussian", outputs=1))
    bound = off_diagonal_bound(model, inputs, likelihood, estimator="I1")
    torch.testing.assert_close(bound, found["I1"], rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("estimator", ["I1", "I2"])
def test_bounds_are_in_the_models_order(estimator, monkeypatch):
    """Whatever order a pass has its parameters in, and however few inputs go through it at a time."""

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.used = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x):
            return torch.tanh(self.used(x))

    torch.manual_seed(0)
    model, x = Spare().double(), torch.randn(5, 2, dtype=torch.float64)
    found = off_diagonal_bound(model, x, fishopt.Gaussian(variance=1.0), estimator=estimator)
    own = fishopt.variance_bound(model, x, fishopt.Gaussian(variance=1.0), estimator=estimator)
    assert not found[:6].any()
    assert found[6:, 6:].all()
    torch.testing.assert_close(found.diagonal(), _flat(own))
    monkeypatch.setattr("fishopt.traces.MAX_ELEMENTS", 1)
    parts = off_diagonal_bound(model, x, fishopt.Gaussian(variance=1.0), estimator=estimator)
    torch.testing.assert_close(parts, found)


def test_large_models_have_no_number_for_any_two_parameters():
    with pytest.raises(ValueError, match="model has 4,100 trainable parameters"):
        off_diagonal_bound(nn.Linear(40, 100), torch.randn(2, 40), "categorical", estimator="I1")


def test_rates_that_are_zero_in_floating_point_have_a_bound():
    model = nn.Linear(1, 2)
    nn.init.constant_(model.bias, -200.0)
    assert not off_diagonal_bound(model, torch.ones(3, 1), "poisson", estimator="I1").any()
