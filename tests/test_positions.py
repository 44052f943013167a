"""Labels at several positions, by enumeration: every joint label of an input, in float64."""

import itertools
import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.estimators import Draw, by_structure, estimate
from fishopt.likelihoods.positions import Positions
from fishopt.variance import mean_label_variance
from tests.asserts import assert_at_most, assert_close, assert_unbiased, z_scores
from tests.positions_setup import IGNORED, NETWORKS, Problem

MASKS = [False, True]


@pytest.fixture(scope="module", params=itertools.product(NETWORKS, MASKS), ids=lambda p: f"{p[0]}-{p[1]}")
def problem(request):
    return Problem(*request.param)


def test_exact_is_the_sum_over_positions_per_observation(problem):
    found = fishopt.fisher_diagonal(
        problem.model, problem.inputs, problem.likelihood, estimator="exact", targets=problem.targets
    )
    assert_close(found, problem.mean(problem.fisher()))


@pytest.mark.parametrize("name", ["I1", "I2"])
def test_every_joint_label_gives_the_value_by_definition(problem, name, monkeypatch):
    batch = problem.batch()
    values, _ = problem.per_label(name)
    for k, y in list(enumerate(problem.labels()[0]))[:5]:
        monkeypatch.setattr(problem.likelihood, "sample", lambda h, samples, generator=None, y=y: y.repeat(3)[None])
        found = estimate(batch, by_structure({name: batch.names}, batch.structure, batch.coverage), Draw())
        assert_close({n: found[n] for n in batch.names}, problem.mean(values[k]))


@pytest.mark.parametrize("name", ["I1", "I2", "hutchinson"])
def test_label_variance_is_the_variance_over_joint_labels(problem, name):
    found = mean_label_variance(problem.batch(), name)
    assert_close(found, problem.mean(problem.variance(name)), rtol=1e-7, atol=1e-12)


def test_empirical_takes_the_labels_that_count(problem):
    y = torch.arange(3 * problem.p.shape[1]).reshape(3, -1) % problem.classes
    c = problem.in_order((problem.p - nn.functional.one_hot(y, problem.classes)) * problem.mask[..., None])
    targets = torch.where(problem.mask, y, IGNORED).reshape(3, *problem.places)
    q = torch.einsum("nai,na->ni", problem.d.first, c).square()
    arguments = problem.model, problem.inputs, problem.likelihood
    assert_close(fishopt.fisher_diagonal(*arguments, estimator="empirical", targets=targets), problem.mean(q))
    error = fishopt.empirical_error(*arguments, targets)
    assert_close(error.bias, problem.mean(q - problem.fisher()))
    spread = (q - q.mean(0)).square().sum(0) / problem.observations**2
    assert_close(error.variance, problem.d.by_name(spread))
    assert_at_most({k: v.abs() for k, v in error.bias.items()}, error.bias_bound)
    assert_at_most(error.variance, error.variance_bound)


def test_class_probabilities_are_labels_too():
    problem = Problem("pixels", False)
    probabilities = torch.rand(3, *problem.output, dtype=torch.float64).softmax(1)
    c = problem.in_order(problem.p - problem.by_position(probabilities))
    q = torch.einsum("nai,na->ni", problem.d.first, c).square()
    found = fishopt.fisher_diagonal(
        problem.model, problem.inputs, problem.likelihood, estimator="empirical", targets=probabilities
    )
    assert_close(found, problem.mean(q))


@pytest.mark.parametrize("tight", [False, True])
def test_spectra_hold_and_the_quartic_form_is_the_fourth_moment(problem, tight):
    likelihood, h = problem.likelihood.at(
        problem.d.h.reshape(3, *problem.output), problem.mask.reshape(3, *problem.places)
    )
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(600, 3, h.shape[1], dtype=h.dtype, generator=generator)
    # Half of the directions are at one position, where the extremes may be.
    count = problem.p.shape[1]
    at_one = torch.eye(count, dtype=h.dtype)[:, None, :, None].expand(-1, 3, -1, problem.classes)
    u[:300] *= problem.in_order(at_one).repeat(300 // count, 1, 1)
    u = u / u.norm(dim=-1, keepdim=True)
    _, c, weights = problem.labels()
    fisher = torch.einsum("una,nab,unb->un", u, problem.covariance(), u)
    m = torch.einsum("kn,kun->un", weights, torch.einsum("una,kna->kun", u, c).pow(4)) - fisher.square()
    lower, upper = likelihood.quartic_spectrum(h, tight=tight)
    assert (m >= lower - 1e-12).all()
    assert (m <= upper + 1e-12).all()
    assert (likelihood.covariance_bound(h) >= likelihood.covariance_spectrum(h).upper - 1e-12).all()
    values = torch.linalg.eigvalsh(problem.covariance())
    torch.testing.assert_close(likelihood.covariance_spectrum(h).lower, values[:, 0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(likelihood.covariance_spectrum(h).upper, values[:, -1])
    torch.testing.assert_close(likelihood.radius(h), problem.labels()[1].square().sum(-1).amax(0))


def test_likelihood_of_a_joint_label_and_its_gradient(problem):
    shape = problem.mask.reshape(3, *problem.places)
    likelihood, h = problem.likelihood.at(problem.d.h.reshape(3, *problem.output).requires_grad_(), shape)
    torch.testing.assert_close(likelihood.mean(h), problem.in_order(problem.p))
    joint, residuals, _ = problem.labels()
    for y, c in list(zip(joint, residuals, strict=True))[::3]:
        y = y.expand(3, -1)
        hot = nn.functional.one_hot(y, problem.classes)
        terms = -(problem.p.log() * hot).sum(-1) * problem.mask
        torch.testing.assert_close(likelihood.nll(h, y), terms.sum(-1))
        torch.testing.assert_close(likelihood.statistic(h, y), problem.in_order(hot.double()))
        torch.testing.assert_close(torch.autograd.grad(likelihood.nll(h, y).sum(), h)[0], c)
        torch.testing.assert_close(likelihood.residual(h, y), c)


@pytest.mark.parametrize("family", [fishopt.Bernoulli(), fishopt.Poisson(), fishopt.Gaussian(0.7)], ids=repr)
def test_positions_of_independent_outputs_are_just_more_outputs(family):
    """Where a family factorises anyway, the product over positions is the family itself on all outputs."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    apart = Positions(family, (2, 3), 1)
    y = family.sample(h, 5, generator)
    rows = y.unflatten(-1, (2, 3))
    torch.testing.assert_close(apart.nll(h, rows[0]), family.nll(h, y[0]))
    torch.testing.assert_close(apart.residual(h, rows), family.residual(h, y))
    assert apart.sample(h, 5, generator).shape == rows.shape
    for method in ("mean", "covariance_diagonal", "covariance", "covariance_bound", "radius"):
        torch.testing.assert_close(getattr(apart, method)(h), getattr(family, method)(h))
    for end, expected in zip(apart.covariance_spectrum(h), family.covariance_spectrum(h), strict=True):
        torch.testing.assert_close(end, expected)
    u = torch.randn(300, 4, 6, dtype=torch.float64, generator=generator)
    u[:100, :, 3:] = 0
    u /= u.norm(dim=-1, keepdim=True)
    m = _quartic_form(family, h, u)
    torch.testing.assert_close(_quartic_form(apart, h, u), m)
    for tight in (False, True):
        lower, upper = apart.quartic_spectrum(h, tight=tight)
        assert (lower <= m + 1e-12).all()
        assert (m <= upper + 1e-12).all()


def _quartic_form(likelihood, h, u):
    quartic, columns = likelihood.quartic(h), likelihood.factor(h)
    squares = torch.einsum("una,kna->kun", u, columns).square()
    blocks = squares.unflatten(0, (likelihood.positions, -1)).sum(1).square().sum(0)
    fourth = torch.einsum("kn,kun->un", quartic.weights, torch.einsum("una,kna->kun", u, quartic.columns).pow(4))
    return quartic.multiple * squares.sum(0).square() + quartic.within * blocks + fourth


@pytest.mark.parametrize("tight", [False, True])
def test_bounds_hold_for_every_parameter_and_input(tight):
    for network in NETWORKS:
        problem = Problem(network, False)
        for x in problem.inputs.split(1):
            arguments = problem.model, x, problem.likelihood
            exact = fishopt.fisher_diagonal(*arguments, estimator="exact")
            assert_at_most(exact, fishopt.fisher_bound(*arguments, tight=tight))
            for name in ("I1", "I2", "hutchinson"):
                v = fishopt.label_variance(*arguments, estimator=name)
                assert_at_most(v, fishopt.variance_bound(*arguments, estimator=name, tight=tight))
                assert_at_most(fishopt.variance_bound(*arguments, estimator=name, side="lower", tight=tight), v)


def test_bounds_and_scores_are_averages_over_observations():
    problem = Problem("hidden", False)
    arguments = problem.model, problem.inputs, problem.likelihood
    likelihood, h = problem.likelihood.at(problem.d.h.reshape(3, *problem.output))
    norms = problem.d.first.square().sum(1)
    largest = likelihood.covariance_spectrum(h).upper[:, None]
    assert_close(fishopt.fisher_bound(*arguments, tight=True), problem.mean(norms * largest))
    fourth = norms.square() * largest.square()
    assert_close(fishopt.input_variance_bound(*arguments, tight=True), problem.mean(fourth))
    score = norms.square() * likelihood.quartic_spectrum(h, tight=True).upper[:, None]
    assert_close(fishopt.variance_bound(*arguments, estimator="I1", tight=True), problem.mean(score))
    traces = fishopt.trace_bound(*arguments, quantity="I1")
    for choice in fishopt.select_estimators(*arguments, candidates=("I1", "I2")):
        value = torch.cat([v.flatten() for name, v in problem.mean(score).items() if name.startswith(choice.group)])
        assert math.isclose(choice.scores["I1"], value.mean(), rel_tol=1e-9)
        torch.testing.assert_close(traces[choice.group], value.sum())
        bound = fishopt.variance_bound(*arguments, estimator="I2", tight=True)
        value = torch.cat([v.flatten() for name, v in bound.items() if name.startswith(choice.group)])
        assert math.isclose(choice.scores["I2"], value.mean(), rel_tol=1e-9)
    curved = problem.d.second.square().sum(1) * largest
    assert_close(fishopt.variance_bound(*arguments, estimator="I2", tight=True), problem.mean(curved))


@pytest.mark.parametrize("name", ["tokens", "pixels"])
def test_efficiency_weighs_the_variance_of_sums_over_positions(name):
    problem = Problem(name, False)
    candidates = ("I1", "hutchinson", "exact")
    fisher, n = problem.fisher(), len(problem.d.h)
    for choice in fishopt.select_estimators(
        problem.model, problem.inputs, problem.likelihood, criterion="efficiency", candidates=candidates
    ):
        mine = [n for n, _ in problem.model.named_parameters() if n.startswith(choice.group)]
        mine = problem.d.columns(tuple(mine))
        for estimator in candidates:
            label = 0 * fisher if estimator == "exact" else problem.variance(estimator)
            value = (n * fisher.var(0) + label.sum(0))[mine].mean() / problem.observations
            passes = problem.d.h.shape[1] if estimator == "exact" else 1
            assert math.isclose(choice.scores[estimator], value * passes, rel_tol=1e-7)


def test_joint_variance_and_bounds_on_its_parts():
    problem = Problem("tokens", False)
    arguments = problem.model, problem.inputs, problem.likelihood
    fisher, o = problem.fisher(), problem.observations
    spread = (fisher - fisher.mean(0)).square().sum(0) / o**2
    found = fishopt.joint_variance(*arguments, estimator="I1", samples=2)
    assert_close(found.input, problem.d.by_name(spread))
    assert_close(found.label, problem.d.by_name(problem.variance("I1").sum(0) / (2 * o**2)), rtol=1e-7)
    for tight in (False, True):
        bound = fishopt.input_variance_bound(*arguments, tight=tight)
        assert_at_most({name: v * o for name, v in found.input.items()}, bound)
    parts = problem.d.by_name(fisher.sum(0) / o)
    for full in (False, True):
        upper = fishopt.trace_bound(*arguments, full_spectrum=full)
        for group in upper:
            trace = sum(v.sum() for name, v in parts.items() if name.startswith(group))
            assert trace <= upper[group] * (1 + 1e-10)


@pytest.mark.parametrize("name", ["I1", "I2", "hutchinson"])
@pytest.mark.parametrize("network", ["tokens", "pixels"])
def test_unbiased_with_the_variance_in_closed_form(network, name):
    problem = Problem(network, True)
    batch, samples = problem.batch(), 4
    plan, draw = (
        by_structure({name: batch.names}, batch.structure, batch.coverage),
        Draw(samples, torch.Generator().manual_seed(3)),
    )
    exact = problem.mean(problem.fisher())
    variance = problem.d.by_name(problem.variance(name).sum(0) / (samples * problem.observations**2))
    scores = []
    for _ in range(150):
        found = estimate(batch, plan, draw)
        scores.append(z_scores({n: found[n] for n in exact}, exact, variance))
    assert_unbiased(torch.stack(scores))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("network", "masked"), [("hidden", False), ("hidden", True), ("pixels", True)])
def test_the_scale_is_that_of_the_losss_gradient(network, masked, reduction):
    """The second moment of the loss's own gradient at labels from the model is F / O times the scale's square."""
    problem = Problem(network, masked)
    n = 2
    mask, model, inputs = problem.mask[:n], problem.model, problem.inputs[:n]
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    y, _, weights = problem.labels()
    for first, other in itertools.product(range(len(y)), repeat=n):
        labels = torch.where(mask, torch.stack([y[first], y[other]]), IGNORED).reshape(n, *problem.places)
        model.zero_grad()
        h = model(inputs)
        loss_fn(h.movedim(problem.dim, 1), labels).backward()
        for name, p in model.named_parameters():
            second[name] += weights[first, 0] * weights[other, 1] * p.grad.square()
    targets = torch.where(mask, 0, IGNORED).reshape(n, *problem.places)
    likelihood = fishopt.Categorical(problem.dim)
    likelihood.reduction = fishopt.from_loss(loss_fn).reduction
    fisher = fishopt.fisher_diagonal(model, inputs, likelihood, estimator="exact", targets=targets)
    observations = int(mask.sum())
    scale = likelihood.gradient_scale(observations, problem.classes)
    assert_close(second, {name: v * scale**2 / observations for name, v in fisher.items()})


def test_chunks_cut_the_mask_along_with_the_inputs(monkeypatch):
    problem = Problem("tokens", True)
    exact, v1 = problem.mean(problem.fisher()), problem.mean(problem.variance("I1"))
    monkeypatch.setattr("fishopt.batch.MAX_ELEMENTS", 1)
    monkeypatch.setattr("fishopt.batch.MAX_ACTIVATIONS", 1)
    found = fishopt.fisher_diagonal(
        problem.model, problem.inputs, problem.likelihood, estimator="exact", targets=problem.targets
    )
    assert_close(found, exact)
    assert_close(mean_label_variance(problem.batch(), "I1"), v1, rtol=1e-7)


def test_ignored_inputs_are_as_good_as_left_out():
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 2, 0])
    likelihood = fishopt.from_loss(nn.CrossEntropyLoss(ignore_index=2))
    kept = y != 2
    for options in ({"estimator": "exact"}, {"estimator": "empirical"}):
        found = fishopt.fisher_diagonal(model, x, likelihood, targets=y, **options)
        also = {} if options["estimator"] == "exact" else {"targets": y[kept]}
        assert_close(found, fishopt.fisher_diagonal(model, x[kept], likelihood, **options, **also))


def test_a_head_at_every_position_is_not_separable():
    problem = Problem("hidden", False)
    assert not problem.batch().structure.separable
    assert problem.batch().structure.affine == {"2.weight", "2.bias"}
    assert Problem("middle", False).batch().structure.separable == {"0.weight", "0.bias"}


@pytest.mark.parametrize("estimator", ["I1", "exact"])
def test_labels_that_may_mark_inputs_but_mark_none(estimator):
    """A loader's batches may have labels to ignore or not."""
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.tensor([0, 2, 1, 0, 1, 2])
    options = {"estimator": estimator}
    found, expected = (
        fishopt.fisher_diagonal(model, x, "categorical", generator=torch.Generator().manual_seed(0), **options, **also)
        for also in ({"targets": y}, {})
    )
    assert_close(found, expected)
