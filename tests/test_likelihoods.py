"""Likelihoods against enumeration, and their closed forms against autograd."""

import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.likelihoods import Independent, as_likelihood
from tests.cases import LIKELIHOODS
from tests.reference import labels

FAMILIES = [(name, t) for name in LIKELIHOODS for t in (1, 2, 3) if (name, t) != ("categorical", 1)]


def _h(t, n=5, scale=1.5):
    return scale * torch.randn(n, t, dtype=torch.float64, generator=torch.Generator().manual_seed(t))


@pytest.fixture(params=FAMILIES, ids=lambda f: f"{f[0]}-{f[1]}")
def family(request):
    name, t = request.param
    h = _h(t, scale=0.7 if name == "poisson" else 1.5)
    statistic, weights = labels(name, h)
    eta = (weights[..., None] * statistic).sum(0)
    z = eta - statistic
    covariance = torch.einsum("kn,kna,knb->nab", weights, z, z)
    return name, LIKELIHOODS[name](), h, z, weights, eta, covariance


def test_mean_covariance_and_factor(family):
    _, likelihood, h, _, _, eta, covariance = family
    torch.testing.assert_close(likelihood.mean(h), eta)
    torch.testing.assert_close(likelihood.covariance(h), covariance)
    torch.testing.assert_close(likelihood.covariance_diagonal(h), covariance.diagonal(dim1=1, dim2=2))
    columns = likelihood.factor(h)
    torch.testing.assert_close(torch.einsum("kna,knb->nab", columns, columns), covariance)


def test_quartic_form_is_the_fourth_moment(family):
    _, likelihood, h, z, weights, _, covariance = family
    u = torch.randn(50, *h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(0))
    fisher = torch.einsum("una,nab,unb->un", u, covariance, u)
    fourth = torch.einsum("kn,kun->un", weights, torch.einsum("una,kna->kun", u, z).pow(4))
    quartic = likelihood.quartic(h)
    powers = torch.einsum("una,kna->kun", u, quartic.columns).pow(4)
    found = quartic.multiple * fisher.square() + torch.einsum("kn,kun->un", quartic.weights, powers)
    torch.testing.assert_close(found, fourth - fisher.square())
    torch.testing.assert_close(quartic.shares.sqrt()[..., None] * quartic.columns, likelihood.factor(h))


@pytest.mark.parametrize("tight", [False, True])
def test_spectra_hold(family, tight):
    """Eigenvalues exactly; extremes of M over many directions stay inside, and reach the ends where claimed."""
    name, likelihood, h, z, weights, _, covariance = family
    values = torch.linalg.eigvalsh(covariance)
    low, high = likelihood.covariance_spectrum(h)
    torch.testing.assert_close(low, values[:, 0], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(high, values[:, -1])
    assert (likelihood.covariance_bound(h) >= high - 1e-12).all()
    assert (
        likelihood.radius(h) >= z.square().sum(-1).masked_fill(weights < 1e-300, 0).amax(0) - 1e-9
    ).all() or math.isinf(float(likelihood.radius(h)[0]))
    t = h.shape[1]
    u = torch.randn(min(20_000, 2_000_000 // len(z)), t, dtype=h.dtype, generator=torch.Generator().manual_seed(1))
    u = torch.cat([u / u.norm(dim=1, keepdim=True), torch.eye(t, dtype=h.dtype)])
    fisher = torch.einsum("ua,nab,ub->un", u, covariance, u)
    m = torch.einsum("kn,kun->un", weights, torch.einsum("ua,kna->kun", u, z).pow(4)) - fisher.square()
    low, high = likelihood.quartic_spectrum(h, tight=tight)
    assert (m >= low - 1e-10 * (1 + m.abs())).all()
    assert (m <= high + 1e-10 * (1 + m.abs())).all()
    if name == "gaussian" or (t == 1) or (tight and name == "categorical" and t == 2):
        torch.testing.assert_close(high, m.amax(0), rtol=1e-6, atol=1e-12)
    if name == "gaussian" or t == 1:
        torch.testing.assert_close(low, m.amin(0), rtol=1e-6, atol=1e-12)


def test_bounds_where_all_rates_underflow():
    h = torch.tensor([[-120.0], [0.5], [-200.0]])
    lower, upper = fishopt.Poisson().quartic_spectrum(h)
    assert (lower <= upper).all()
    assert upper[0] == upper[2] == 0
    assert upper[1] > 0


def test_gaussian_with_unit_variance_is_proposition_5_1():
    h = _h(3)
    assert (fishopt.Gaussian().covariance_spectrum(h).lower == 1).all()
    assert (fishopt.Gaussian().quartic_spectrum(h).lower == 2).all()
    assert (fishopt.Gaussian().quartic_spectrum(h).upper == 2).all()


def test_residual_is_the_gradient_of_the_nll(family):
    _name, likelihood, h, *_ = family
    y = likelihood.sample(h, 1, torch.Generator().manual_seed(0))[0]
    h = h.requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.nll(h, y).sum(), h)
    torch.testing.assert_close(likelihood.residual(h, y), gradient)


def test_samples_have_the_familys_moments(family):
    _name, likelihood, h, _, _, eta, covariance = family
    samples = 40_000
    statistic = likelihood.statistic(h, likelihood.sample(h, samples, torch.Generator().manual_seed(0)))
    assert statistic.shape == (samples, *h.shape)
    z = (statistic.mean(0) - eta) / (covariance.diagonal(dim1=1, dim2=2) / samples).sqrt()
    assert z.abs().max() < 4.5
    spread = torch.einsum("mna,mnb->nab", statistic - eta, statistic - eta) / samples
    torch.testing.assert_close(spread, covariance, atol=0.05 * float(covariance.abs().max()), rtol=0.05)


def test_sampling_never_hits_a_class_of_probability_zero():
    h = torch.tensor([[0.0, -200.0, 0.0, -200.0]])
    y = fishopt.Categorical().sample(h, 10_000, torch.Generator().manual_seed(0))
    assert set(y.unique().tolist()) == {0, 2}


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_closed_forms_are_derivatives_of_the_log_partition(name):
    likelihood, h = LIKELIHOODS[name](), _h(3)
    for method in ("mean", "second_cumulant", "fourth_cumulant"):
        closed, derived = getattr(likelihood, method)(h), getattr(Independent, method)(likelihood, h)
        torch.testing.assert_close(closed, derived, rtol=1e-9, atol=1e-12)


LOSSES = [
    (nn.CrossEntropyLoss(), 4),
    (nn.CrossEntropyLoss(reduction="sum"), 4),
    (nn.CrossEntropyLoss(label_smoothing=0.1), 4),
    (nn.BCEWithLogitsLoss(), 3),
    (nn.BCEWithLogitsLoss(reduction="sum"), 3),
    (nn.MSELoss(), 3),
    (nn.MSELoss(reduction="sum"), 3),
    (nn.PoissonNLLLoss(), 3),
    (nn.PoissonNLLLoss(reduction="sum", full=True), 3),
]


@pytest.mark.parametrize(("loss", "t"), LOSSES, ids=str)
def test_from_loss_has_the_gradient_of_the_loss(loss, t):
    h = _h(t).requires_grad_()
    if isinstance(loss, nn.CrossEntropyLoss):
        y = torch.tensor([0, 1, 2, 3, 0])
        smoothed = (1 - loss.label_smoothing) * nn.functional.one_hot(y, t) + loss.label_smoothing / t
    else:
        y = smoothed = torch.rand(5, t, dtype=h.dtype).round()
    likelihood = fishopt.from_loss(loss)
    mean_nll = likelihood.nll(h, smoothed).mean() * likelihood.gradient_scale(5, t)
    (ours,) = torch.autograd.grad(mean_nll, h)
    (theirs,) = torch.autograd.grad(loss(h, y), h)
    torch.testing.assert_close(ours, theirs)


def test_squared_loss_has_the_promised_variance():
    h = _h(4)
    assert fishopt.from_loss(nn.MSELoss()).noise(h) == 2.0
    assert fishopt.from_loss(nn.MSELoss(reduction="sum")).noise(h) == 0.5


REFUSED = [
    (nn.L1Loss(), ValueError, "L1Loss"),
    (nn.HuberLoss(), ValueError, "HuberLoss"),
    (nn.NLLLoss(), ValueError, "CrossEntropyLoss"),
    (nn.BCELoss(), ValueError, "BCEWithLogitsLoss"),
    (nn.CTCLoss(), ValueError, "CTCLoss"),
    (nn.PoissonNLLLoss(log_input=False), ValueError, "log_input"),
    (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "weight"),
    (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), ValueError, "pos_weight"),
    ("laplace", ValueError, "laplace.*categorical"),
    (3, TypeError, "likelihood=3"),
    (None, TypeError, "likelihood=None"),
    (nn.CrossEntropyLoss, TypeError, "instance"),
    (nn.functional.mse_loss, TypeError, "likelihood="),
]


@pytest.mark.parametrize(("value", "error", "match"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_is_no_likelihood_is_refused_by_name(value, error, match):
    with pytest.raises(error, match=match):
        as_likelihood(value)


@pytest.mark.parametrize("variance", [0, -1.0, float("nan"), float("inf"), "guess", None])
def test_gaussian_refuses_a_bad_variance(variance):
    with pytest.raises(ValueError, match="variance="):
        fishopt.Gaussian(variance)
