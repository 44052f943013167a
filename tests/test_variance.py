"""Lemma 3.1, Theorem 4.1, Theorem 4.7, Lemma 4.8 and Section 6 against enumeration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fishopt
from tests.asserts import assert_at_most, assert_close
from tests.cases import CASES, LIKELIHOODS, Case
from tests.reference import derivatives, hutchinson_variance, labels, moments


@pytest.mark.parametrize("case", CASES, ids=str)
def test_label_variance_is_the_variance_over_labels(case):
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    m = moments(d, case.family)
    expected = {
        "I1": m.v1,
        "I2": m.v2,
        "hutchinson": hutchinson_variance(d, m, case.family),
        "exact": torch.zeros_like(m.v1),
    }
    for name, value in expected.items():
        found = fishopt.label_variance(model, inputs, likelihood, estimator=name)
        scale = float(m.fisher.square().max())
        assert_close(found, d.by_name(value.mean(0)), atol=1e-11 * max(scale, 1.0))


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bounds_hold_for_every_parameter_and_input(case, tight):
    model, inputs, likelihood = case.build()
    for row in zip(*(x.split(1) for x in inputs), strict=True):
        exact = fishopt.fisher_diagonal(model, row, likelihood, estimator="exact")
        assert_at_most(fishopt.fisher_bound(model, row, likelihood, side="lower", tight=tight), exact)
        assert_at_most(exact, fishopt.fisher_bound(model, row, likelihood, side="upper", tight=tight))
        for name in ("I1", "I2", "hutchinson", "exact"):
            v = fishopt.label_variance(model, row, likelihood, estimator=name)
            upper = fishopt.variance_bound(model, row, likelihood, estimator=name, tight=tight)
            lower = fishopt.variance_bound(model, row, likelihood, estimator=name, side="lower", tight=tight)
            assert_at_most(lower, v)
            assert_at_most(v, upper)


@given(
    seed=st.integers(0, 2**20),
    family=st.sampled_from(sorted(LIKELIHOODS)),
    outputs=st.integers(2, 4),
    scale=st.floats(0.1, 8.0),
    act=st.sampled_from([nn.Sigmoid, nn.Tanh, nn.ReLU, nn.Softplus]),
)
@settings(max_examples=60, deadline=None)
def test_bounds_hold_on_random_networks(seed, family, outputs, scale, act):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), act(), nn.Linear(3, outputs)).double()
    with torch.no_grad():
        for p in model[2].parameters():
            p.mul_(min(scale, 2.0) if family == "poisson" else scale)
    x = torch.randn(1, 3, dtype=torch.float64)
    likelihood = LIKELIHOODS[family]()
    for name in ("I1", "I2", "hutchinson"):
        v = fishopt.label_variance(model, x, likelihood, estimator=name)
        for tight in (False, True):
            assert_at_most(v, fishopt.variance_bound(model, x, likelihood, estimator=name, tight=tight), rtol=1e-8)
            lower = fishopt.variance_bound(model, x, likelihood, estimator=name, side="lower", tight=tight)
            assert_at_most(lower, v, rtol=1e-8)


@pytest.mark.parametrize("network", ["sigmoid", "relu", "conv_relu", "two_inputs"])
def test_gaussian_bounds_are_equalities(network):
    """Proposition 5.1, for any variance: V1 = 2 |d h|^4 / s^8, V2 = |d^2 h|^2 / s^4."""
    model, inputs, likelihood = Case(network, "gaussian").build()
    for name in ("I1", "I2"):
        v = fishopt.label_variance(model, inputs, likelihood, estimator=name)
        for side in ("lower", "upper"):
            assert_close(fishopt.variance_bound(model, inputs, likelihood, estimator=name, side=side), v)


def test_relu_networks_have_exact_i2():
    """Theory beyond the paper: kinks are met with probability zero, so I2 has no label variance (our deviation)."""
    model, inputs, likelihood = Case("relu", "categorical").build()
    exact = fishopt.fisher_diagonal(model, inputs, likelihood, estimator="exact")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        found = fishopt.fisher_diagonal(model, inputs, likelihood, estimator="I2", generator=generator)
        assert_close(found, exact, atol=1e-17)
    variance = fishopt.label_variance(model, inputs, likelihood, estimator="I2")
    assert all((v == 0).all() for v in variance.values())
    d = derivatives(model, inputs)
    assert d.second.abs().max() == 0


@pytest.mark.parametrize("case", [c for c in CASES if c.network in {"sigmoid", "conv_relu"}], ids=str)
def test_joint_variance_and_its_parts(case):
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    m = moments(d, case.family)
    spread = (m.fisher - m.fisher.mean(0)).square().mean(0) / case.inputs
    for name, v in (("I1", m.v1), ("I2", m.v2), ("exact", torch.zeros_like(m.v1))):
        found = fishopt.joint_variance(model, inputs, likelihood, estimator=name, samples=5)
        label = v.mean(0) / (5 * case.inputs)
        atol = 1e-11 * max(float(m.fisher.square().max()), 1.0)
        assert_close(found.input, d.by_name(spread), atol=atol)
        assert_close(found.label, d.by_name(label), atol=atol)
        assert_close(found.total, d.by_name(spread + label), atol=atol)


def test_joint_variance_is_that_of_drawing_inputs_and_labels():
    """Theorem 4.7, by enumerating all pairs of inputs and, for each, all labels."""
    case = Case("sigmoid", "categorical", inputs=2)
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    statistic, weights = labels(case.family, d.h)
    m = moments(d, case.family)
    values = torch.einsum("nap,kna->knp", d.first, m.eta - statistic).square()
    mean = second = 0
    for i in range(2):
        for j in range(2):
            for a in range(3):
                for b in range(3):
                    p = 0.25 * weights[a, i] * weights[b, j]
                    value = (values[a, i] + values[b, j]) / 2
                    mean, second = mean + p * value, second + p * value.square()
    found = fishopt.joint_variance(model, inputs, likelihood, estimator="I1")
    assert_close(found.total, d.by_name(second - mean.square()), atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_variance_bound(case):
    """Lemma 4.8."""
    model, inputs, likelihood = case.build()
    found = fishopt.joint_variance(model, inputs, likelihood, estimator="exact").input
    spread = {name: v * case.inputs for name, v in found.items()}
    for tight in (False, True):
        assert_at_most(spread, fishopt.input_variance_bound(model, inputs, likelihood, tight=tight))


@pytest.mark.parametrize("case", [c for c in CASES if c.network in {"sigmoid", "conv_relu", "residual"}], ids=str)
def test_empirical_error_by_definition(case):
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    m = moments(d, case.family)
    statistic, _ = labels(case.family, d.h)
    t = statistic[-2]
    targets = {"categorical": lambda: t.argmax(-1), "gaussian": lambda: t * 0.7}.get(case.family, lambda: t)()
    q = torch.einsum("nap,na->np", d.first, m.eta - t).square()
    found = fishopt.empirical_error(model, inputs, likelihood, targets)
    atol = 1e-10 * float(q.max())
    assert_close(found.bias, d.by_name((q - m.fisher).mean(0)), atol=atol)
    spread = (q - q.mean(0)).square().mean(0) / case.inputs
    assert_close(found.variance, d.by_name(spread), atol=atol * float(q.max()))
    assert_at_most({k: v.abs() for k, v in found.bias.items()}, found.bias_bound)
    assert_at_most(found.variance, found.variance_bound)


class Rare(nn.Module):
    """Sends its inputs through a smooth branch too, if any of them asks for it."""

    def __init__(self):
        super().__init__()
        self.first, self.usual, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        z, is_rare = self.first(x), x[:, :1] < 0
        out = self.usual(z.relu())
        return torch.where(is_rare, self.other(z.tanh()), out) if is_rare.any() else out


@pytest.mark.parametrize("estimator", ["I1", "I2", "exact"])
def test_a_branch_that_the_first_inputs_do_not_take(estimator):
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor([1, 2, 3, -1, -2, -3])
    found = []
    for rows in (x, x.flip(0)):
        torch.manual_seed(1)
        model = Rare().double()
        found.append(fishopt.label_variance(model, rows, "gaussian", estimator=estimator))
    assert_close(*found)
    assert estimator != "I2" or found[0]["first.weight"].any()
