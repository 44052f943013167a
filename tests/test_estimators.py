"""Estimators: expectations by enumeration, spread by z-tests, one scale for all, reproducible."""

import warnings

import pytest
import torch
from torch import nn

import fishopt
from fishopt.batch import Batch
from fishopt.estimators import ESTIMATORS, Draw, by_structure, estimate, fewest_columns
from tests.asserts import assert_close, assert_unbiased, z_scores
from tests.cases import CASES, Case
from tests.reference import derivatives, labels, moments


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_is_the_fisher_diagonal(case):
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    m = moments(d, case.family)
    found = fishopt.fisher_diagonal(model, inputs, likelihood, estimator="exact")
    assert_close(found, d.by_name(m.fisher.mean(0)))
    # Both paper estimators have it as their expectation (Remark H.1).
    torch.testing.assert_close(m.mean_i1, m.fisher)
    torch.testing.assert_close(m.mean_i2, m.fisher)


@pytest.mark.parametrize("name", ["I1", "I2"])
@pytest.mark.parametrize("case", [c for c in CASES if c.family in {"categorical", "bernoulli"}], ids=str)
def test_every_label_gives_the_value_by_definition(case, name):
    """With the sampled label replaced by each possible one in turn."""
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    m = moments(d, case.family)
    statistic, _ = labels(case.family, d.h)
    for t in statistic[:3]:
        y = t.argmax(-1) if case.family == "categorical" else t
        likelihood.sample = lambda h, samples, generator=None, y=y: y[None]
        found = fishopt.fisher_diagonal(model, inputs, likelihood, estimator=name)
        c = m.eta - t
        if name == "I1":
            expected = torch.einsum("nap,na->np", d.first, c).square()
        else:
            expected = m.fisher + torch.einsum("nap,na->np", d.second, c)
        assert_close(found, d.by_name(expected.mean(0)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_empirical_uses_the_datas_labels(case):
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    statistic, _ = labels(case.family, d.h)
    t = statistic[1]
    targets = {"categorical": lambda: t.argmax(-1), "gaussian": lambda: t * 0.7}.get(case.family, lambda: t)()
    eta = moments(d, case.family).eta
    expected = torch.einsum("nap,na->np", d.first, eta - t).square().mean(0)
    found = fishopt.fisher_diagonal(model, inputs, likelihood, estimator="empirical", targets=targets)
    assert_close(found, d.by_name(expected))


MONTE_CARLO = [
    Case("sigmoid", "categorical", inputs=4),
    Case("conv_relu", "categorical"),
    Case("sigmoid", "bernoulli", inputs=4),
    Case("sigmoid", "gaussian"),
    Case("softplus", "poisson"),
]


def _scores(case, name, scale=1.0, runs=200, samples=4):
    model, inputs, likelihood = case.build()
    batch = Batch.of(model, inputs, likelihood)
    exact = fishopt.fisher_diagonal(model, inputs, likelihood, estimator="exact")
    variance = fishopt.label_variance(model, inputs, likelihood, estimator=name)
    variance = {k: v / (samples * case.inputs) for k, v in variance.items()}
    draw = Draw(samples, torch.Generator().manual_seed(7))
    rows = []
    for _ in range(runs):
        found = estimate(batch, by_structure({name: batch.names}, batch.structure, batch.coverage), draw)
        if scale != 1.0:
            found = {k: v * scale for k, v in found.items()}
            random = {k: variance[k] > 0 for k in found}
            found = {k: torch.where(random[k], v, exact[k]) for k, v in found.items()}
        rows.append(z_scores({k: found[k] for k in exact}, exact, variance))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["I1", "I2", "hutchinson"])
@pytest.mark.parametrize("case", MONTE_CARLO, ids=str)
def test_unbiased_with_the_variance_in_closed_form(case, name):
    scores = _scores(case, name)
    if not scores.numel():
        assert name == "I2"
        assert case.network == "conv_relu"
        return
    assert_unbiased(scores)


@pytest.mark.parametrize("name", ["I1", "hutchinson"])
def test_the_z_test_catches_a_factor_of_1_05(name):
    """5% of the value is little against one label's deviation, so it takes many labels to see."""
    scores = _scores(MONTE_CARLO[0], name, scale=1.05, samples=400, runs=100)
    with pytest.raises(AssertionError, match="bias"):
        assert_unbiased(scores)
    assert_unbiased(_scores(MONTE_CARLO[0], name, samples=400, runs=100))


def test_same_seed_same_result_and_global_generator_untouched():
    model, inputs, likelihood = Case("sigmoid", "categorical").build()
    for name in ("I1", "I2", "hutchinson"):
        before = torch.random.get_rng_state()
        a, b, c = (
            fishopt.fisher_diagonal(
                model, inputs, likelihood, estimator=name, generator=torch.Generator().manual_seed(s)
            )
            for s in (1, 1, 2)
        )
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert any(not torch.equal(a[k], c[k]) for k in a)


def test_chunks_do_not_change_the_result(monkeypatch):
    model, inputs, likelihood = Case("sigmoid", "categorical", inputs=5).build()
    whole = fishopt.fisher_diagonal(model, inputs, likelihood, estimator="exact")
    variance = fishopt.label_variance(model, inputs, likelihood, estimator="I1")
    joint = fishopt.joint_variance(model, inputs, likelihood, estimator="I2")
    monkeypatch.setattr("fishopt.batch.MAX_ELEMENTS", 100)
    monkeypatch.setattr("fishopt.passes.functional.MAX_ELEMENTS", 20)
    assert_close(fishopt.fisher_diagonal(model, inputs, likelihood, estimator="exact"), whole)
    assert_close(fishopt.label_variance(model, inputs, likelihood, estimator="I1"), variance)
    assert_close(fishopt.joint_variance(model, inputs, likelihood, estimator="I2").total, joint.total)


def test_fewest_columns_keeps_every_quadratic_form():
    c = torch.randn(20, 4, 3, dtype=torch.float64)
    few = fewest_columns(c)
    assert few.shape == (3, 4, 3)
    torch.testing.assert_close(torch.einsum("kna,knb->nab", few, few), torch.einsum("kna,knb->nab", c, c))


def _of_one_batch_size(n):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x.view(n, 4))

    torch.manual_seed(0)
    return Network().double(), torch.randn(n, 4, dtype=torch.float64) + 1


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_more_samples_than_outputs_where_inputs_are_squared_together(samples):
    model, x = _of_one_batch_size(64)
    p = model(x).detach().softmax(1)
    expected = (p * (1 - p)).T @ x.square() / 64
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = [
            fishopt.fisher_diagonal(model, x, "categorical", samples=samples, generator=generator)["layer.weight"]
            for _ in range(200)
        ]
    ratio = torch.stack(draws).mean(0) / expected
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


def test_empirical_needs_gradients_of_single_inputs():
    model, x = _of_one_batch_size(8)
    with pytest.raises(ValueError, match=r"estimator='empirical'.*'layer.weight'.*couples the inputs"):
        fishopt.fisher_diagonal(model, x, "categorical", estimator="empirical", targets=torch.zeros(8).long())


def test_frozen_parameters_are_left_out_and_the_model_is_left_alone():
    model, inputs, likelihood = Case("batch_norm", "categorical").build()
    model.train()
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.ones(3, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("I1", "I2", "exact"):
        found = fishopt.fisher_diagonal(model, inputs, likelihood, estimator=name)
        assert "0.weight" not in found
        assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training
    assert torch.equal(model[4].bias.grad, torch.ones(3, dtype=torch.float64))
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model[2].inplace


def test_works_under_no_grad_and_inside_training():
    model, inputs, likelihood = Case("sigmoid", "categorical").build()
    expected = fishopt.fisher_diagonal(
        model, inputs, likelihood, estimator="I2", generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        found = fishopt.fisher_diagonal(
            model, inputs, likelihood, estimator="I2", generator=torch.Generator().manual_seed(0)
        )
    assert_close(found, expected)
    assert not any(v.requires_grad for v in found.values())


def test_a_new_estimator_is_one_function(monkeypatch):
    from fishopt.estimators import Cotangents, estimator

    monkeypatch.setattr("fishopt.estimators.ESTIMATORS", dict(ESTIMATORS))

    @estimator("two_signs")
    def two_signs(likelihood, h, draw):
        return ESTIMATORS["hutchinson"](likelihood, h, Draw(2, draw.generator))

    assert isinstance(two_signs(fishopt.Categorical(), torch.randn(2, 3), Draw()), Cotangents)
    model = nn.Linear(4, 3)
    a = fishopt.fisher_diagonal(model, torch.ones(2, 4), "categorical", estimator="two_signs")
    assert a["weight"].shape == (3, 4)
