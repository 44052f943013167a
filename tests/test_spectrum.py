"""The Fisher matrix against dense ones in float64: its Gram form, its spectrum, and what is refused."""

import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.spectrum import fisher_gram, fisher_vector_product, spectrum
from fishopt.traces import off_diagonal_bound
from tests.asserts import assert_close
from tests.cases import CASES, Case
from tests.reference import labels
from tests.spectrum_setup import _brute, _dense, _directions, _flat

SMALL = [c for c in CASES if c.network not in {"conv_sigmoid", "conv_groups"}]


def _eigenvalues(matrix, count):
    return torch.linalg.eigvalsh(matrix).flip(0)[:count]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gram_matrix_has_the_eigenvalues_of_the_dense_one(case):
    model, inputs, likelihood, dense = _dense(case)
    found = fisher_gram(model, inputs, likelihood)
    assert found.shape == (9, 9) if case.outputs == 3 else (3, 3)
    count = min(len(found), len(dense))
    torch.testing.assert_close(_eigenvalues(found, count), _eigenvalues(dense, count), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("estimator", ["I1", "hutchinson", "empirical"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_rows_are_scores_in_the_order_of_the_inputs(case, estimator):
    """Entry by entry, the draws repeated."""
    model, inputs, likelihood = case.build()
    d, m = _brute(case)
    statistic, _ = labels(case.family, d.h)
    drawn = {} if estimator == "empirical" else {"samples": 2, "generator": torch.Generator().manual_seed(3)}
    again = torch.Generator().manual_seed(3)
    if estimator == "I1":
        c = likelihood.residual(d.h, likelihood.sample(d.h, 2, again)) / 2**0.5
    elif estimator == "empirical":
        t = statistic[1]
        drawn["targets"] = {"categorical": lambda: t.argmax(-1), "gaussian": lambda: t * 0.7}.get(
            case.family, lambda: t
        )()
        c = (m.eta - t)[None]
    else:
        e = 2.0 * (torch.rand(2, *d.h.shape, generator=again, dtype=d.h.dtype) < 0.5) - 1
        c = likelihood.apply_factor(d.h, e) / 2**0.5
    rows = torch.einsum("kna,nap->nkp", c, d.first).flatten(0, 1)
    found = fisher_gram(model, inputs, likelihood, estimator=estimator, **drawn)
    torch.testing.assert_close(found, rows @ rows.T / len(d.h), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("estimator", ["exact", "I1", "hutchinson", "empirical"])
@pytest.mark.parametrize("network", ["sigmoid", "conv_relu", "tied", "two_inputs"])
def test_the_trace_is_that_of_the_diagonal(network, estimator):
    model, inputs, likelihood = Case(network, "categorical", inputs=5).build()
    y = torch.arange(5) % 3 if estimator == "empirical" else None

    def options():
        return {"estimator": estimator, "targets": y, "generator": torch.Generator().manual_seed(1)}

    diagonal = _flat(fishopt.fisher_diagonal(model, inputs, likelihood, **options())).sum()
    for method in ("gram", "lanczos"):
        found = spectrum(model, inputs, likelihood, method=method, count=3, **options())
        assert found.trace == pytest.approx(float(diagonal), rel=1e-10)


@pytest.mark.parametrize("estimator", ["exact", "I1", "hutchinson", "empirical"])
def test_lanczos_finds_the_largest(estimator, monkeypatch):
    """Also where the inputs go through the network in several parts."""
    model, inputs, likelihood = Case("sigmoid", "categorical", inputs=7).build()
    y = torch.arange(7) % 3 if estimator == "empirical" else None

    def of(method):
        generator = torch.Generator().manual_seed(2)
        return spectrum(
            model, inputs, likelihood, estimator=estimator, targets=y, generator=generator, method=method, count=4
        )

    whole = of("gram")
    assert whole.is_complete
    parts = []
    for activations in (2**24, 20):
        monkeypatch.setattr("fishopt.batch.MAX_ACTIVATIONS", activations)
        parts.append(of("lanczos"))
        assert len(parts[-1].eigenvalues) == 4
        assert not parts[-1].is_complete
        if estimator in {"exact", "empirical"}:  # others draw part by part
            torch.testing.assert_close(parts[-1].eigenvalues, whole.eigenvalues[:4], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(parts[0].eigenvalues, whole.eigenvalues[:4], rtol=1e-9, atol=1e-14)
    again = of("lanczos")
    assert torch.equal(again.eigenvalues, parts[-1].eigenvalues)


def test_what_is_read_off_a_spectrum():
    """A linear model of one output: F = X^T X / N, with eigenvalues that are chosen."""
    values = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    x = (basis * (6 * values).sqrt()) @ torch.eye(3, 5, dtype=torch.float64)
    found = spectrum(nn.Linear(5, 1, bias=False).double(), x, fishopt.Gaussian(variance=1.0))
    torch.testing.assert_close(found.eigenvalues, values)
    assert found.parameters == 5
    assert found.largest == pytest.approx(4)
    assert found.trace == pytest.approx(7)
    assert found.condition_number == pytest.approx(4)
    assert found.stable_rank == pytest.approx(7 / 4)
    entropy = -sum(v / 7 * math.log(v / 7) for v in (4, 2, 1))
    assert found.effective_rank == pytest.approx(math.exp(entropy))


def test_a_network_without_effect_has_an_empty_spectrum():
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    outer = nn.Sequential(nn.Linear(2, 3).double(), model)
    for p in model.parameters():
        p.requires_grad_(False)
    found = spectrum(outer, torch.randn(4, 2, dtype=torch.float64), fishopt.Gaussian(variance=1.0))
    assert (len(found.eigenvalues), found.largest, found.trace) == (0, 0.0, 0.0)
    assert (found.effective_rank, found.stable_rank) == (0.0, 0.0)
    assert math.isnan(found.condition_number)


def test_many_rows_go_to_lanczos(monkeypatch):
    model, inputs, likelihood = Case("relu", "categorical").build()
    monkeypatch.setattr("fishopt.spectrum.GRAM_LIMIT", 8)  # of 9 rows, and more parameters
    found = spectrum(model, inputs, likelihood, count=2)
    assert (len(found.eigenvalues), found.is_complete) == (2, False)
    for name in ("condition_number", "effective_rank"):
        with pytest.raises(ValueError, match=f"{name} takes all eigenvalues, and there are the 2 largest"):
            getattr(found, name)
    monkeypatch.setattr("fishopt.spectrum.GRAM_LIMIT", 9)
    assert spectrum(model, inputs, likelihood, count=2).is_complete


def test_positions_and_what_is_ignored():
    """Labels at several positions, one of them ignored: per observation, as in the diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    y = torch.randint(0, 4, (3, 5))
    y[1, 2] = -100
    flat = fisher_gram(model, x[y >= 0], fishopt.Categorical())
    found = fisher_gram(model, x, fishopt.Categorical(ignore_index=-100), targets=y)
    assert found.shape == (60, 60)
    torch.testing.assert_close(_eigenvalues(found, 20), _eigenvalues(flat, 20), rtol=1e-8, atol=1e-12)
    lanczos = spectrum(
        model, x, fishopt.Categorical(ignore_index=-100), targets=y, method="lanczos", count=3,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(lanczos.eigenvalues, _eigenvalues(flat, 3))


def test_the_model_is_left_alone():
    model, inputs, likelihood = Case("batch_norm", "categorical").build()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fisher_gram(model, inputs, likelihood)
    fisher_vector_product(model, inputs, likelihood, _directions(model, 1)[0])
    spectrum(model, inputs, likelihood, method="lanczos", count=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("estimator", ["exact", "I1", "empirical"])
def test_few_parameters_and_many_rows(estimator, monkeypatch):
    """``J^T J`` in the place of ``J J^T``, from as many inputs at a time as there is room for."""
    model, inputs, likelihood = Case("linear", "categorical", inputs=40).build()
    options = {"estimator": estimator, "targets": torch.arange(40) % 3 if estimator == "empirical" else None}
    monkeypatch.setattr("fishopt.batch.MAX_ELEMENTS", 100)
    found = spectrum(model, inputs, likelihood, generator=torch.Generator().manual_seed(1), **options)
    monkeypatch.setattr("fishopt.batch.MAX_ELEMENTS", 2**25)
    rows = fisher_gram(model, inputs, likelihood, generator=torch.Generator().manual_seed(1), **options)
    assert found.is_complete
    assert len(found.eigenvalues) == 10  # of 15: logits that all rise by the same change nothing
    if estimator != "I1":  # which draws part by part
        torch.testing.assert_close(found.eigenvalues, _eigenvalues(rows, 10), rtol=1e-8, atol=1e-14)
        assert found.trace == pytest.approx(float(rows.trace()))


def test_small_eigenvalues_are_told_from_rounding_in_single_precision():
    """Rows of lengths over four orders of magnitude: to cut at a share of the largest would lose most of them."""
    torch.manual_seed(0)
    x = torch.randn(12, 30, dtype=torch.float64) * torch.logspace(0, -4, 12, dtype=torch.float64)[:, None]
    model = nn.Linear(30, 1, bias=False).double()
    wide = spectrum(model, x, fishopt.Gaussian(variance=1.0))
    single = spectrum(model.float(), x.float(), fishopt.Gaussian(variance=1.0))
    assert len(wide.eigenvalues) == len(single.eigenvalues) == 12
    assert single.condition_number == pytest.approx(wide.condition_number, rel=1e-2)
    assert wide.condition_number > 1e8


def test_lanczos_says_when_there_are_no_more():
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False).double()
    found = spectrum(model, x, fishopt.Gaussian(variance=1.0), method="lanczos", count=4)
    assert len(found.eigenvalues) == 2
    assert found.is_complete
    nothing = spectrum(model, 0 * x, fishopt.Gaussian(variance=1.0), method="lanczos", count=4)
    assert len(nothing.eigenvalues) == 0
    assert nothing.is_complete


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: fisher_gram(m, x, "categorical", estimator="I2"), ValueError, "estimator='I2'"),
        (lambda m, x: fisher_gram(m, x, "categorical", estimator="empirical"), ValueError, "targets=None"),
        (lambda m, x: fisher_gram(m, x, "categorical", targets=torch.zeros(3)), ValueError, "targets is for"),
        (lambda m, x: fisher_gram(m, x, "categorical", samples=0), ValueError, "samples=0"),
        (lambda m, x: spectrum(m, x, "categorical", method="power"), ValueError, "method='power'"),
        (lambda m, x: spectrum(m, x, "categorical", method="lanczos", count=0), ValueError, "count=0"),
        (lambda m, x: spectrum(m, x, "categorical", count=True), ValueError, "count=True"),
        (lambda m, x: spectrum(m, x, "categorical", method="lanczos", count=27), ValueError, "count=27: Lanczos"),
        (
            lambda m, x: fisher_vector_product(m, x, "categorical", {"out": torch.zeros(3)}),
            ValueError,
            "vector has 'out', no trainable parameter",
        ),
        (
            lambda m, x: fisher_vector_product(m, x, "categorical", {"0.bias": torch.zeros(4)}),
            ValueError,
            r"vector\['0.bias'\] has shape \(4,\); pass \(3,\)",
        ),
        (lambda m, x: fisher_vector_product(m, x, "categorical", torch.zeros(3)), TypeError, "vector is a Tensor"),
        (lambda m, x: fisher_vector_product(m, x, "categorical", {"0.bias": [0]}), TypeError, "is a list; pass"),
        (
            lambda m, x: fisher_vector_product(m, x, "categorical", {"0.bias": torch.full((3,), math.nan)}),
            ValueError,
            r"vector\['0.bias'\] contains NaN",
        ),
        (lambda m, x: off_diagonal_bound(m, x, "categorical", estimator="exact"), ValueError, "estimator='exact'"),
    ],
)
def test_bad_input(call, error, message):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    with pytest.raises(error, match=message):
        call(model, torch.randn(3, 4))


def test_coupled_inputs_have_no_scores():
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) - self.a(x).mean(0)

    model, x = Coupled().double(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="the model couples"):
        fisher_gram(model, x, "gaussian")
    for estimator in ("I1", "I2"):
        with pytest.raises(ValueError, match="the model couples"):
            off_diagonal_bound(model, x, "gaussian", estimator=estimator)
    (vector,) = _directions(model, 1)  # products need no scores
    found = fisher_vector_product(model, x, "gaussian", vector)
    j = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"a.weight": w}, (x,)), model.a.weight.detach()
    )
    rows = j.reshape(15, -1)
    expected = rows.T @ rows @ vector["a.weight"].flatten() / 5
    assert_close(found, {"a.weight": expected.reshape(3, 4), "a.bias": torch.zeros(3, dtype=torch.float64)})
