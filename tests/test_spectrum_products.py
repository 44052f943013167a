"""Products of the Fisher matrix with vectors, against dense ones in float64."""

import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.diagnostics.measures import condition_number
from fishopt.spectrum import fisher_gram, fisher_vector_product, spectrum
from tests.asserts import assert_close
from tests.cases import CASES, Case
from tests.spectrum_setup import _dense, _directions, _flat


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_with_vectors(case):
    model, inputs, likelihood, dense = _dense(case)
    for vector in _directions(model):
        found = fisher_vector_product(model, inputs, likelihood, vector)
        assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in vector.items()}
        torch.testing.assert_close(_flat(found), dense @ _flat(vector), rtol=1e-8, atol=1e-12)


def test_outputs_in_another_order_than_the_natural_parameters():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 1).double()
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    (vector,) = _directions(model, 1)
    found = fisher_vector_product(model, x, fishopt.Categorical(dim=1), vector)
    linear = nn.Linear(2, 3).double()
    linear.load_state_dict({"weight": model.weight.flatten(1), "bias": model.bias})
    rows = x.permute(0, 2, 3, 1).reshape(-1, 2)
    flat = {name: value.reshape(linear.state_dict()[name].shape) for name, value in vector.items()}
    expected = fisher_vector_product(linear, rows, fishopt.Categorical(), flat)
    torch.testing.assert_close(_flat(found), _flat(expected))


def test_missing_parts_of_a_vector_count_as_zero():
    model, inputs, likelihood, dense = _dense(Case("sigmoid", "poisson"))
    (vector,) = _directions(model, 1)
    some = {"2.weight": vector["2.weight"]}
    whole = {name: value * (name in some) for name, value in vector.items()}
    found = fisher_vector_product(model, inputs, likelihood, some)
    torch.testing.assert_close(_flat(found), dense @ _flat(whole), rtol=1e-8, atol=1e-12)


def test_products_leave_out_what_is_ignored():
    torch.manual_seed(0)
    model, x = nn.Linear(2, 3).double(), torch.randn(6, 2, dtype=torch.float64)
    y = torch.tensor([0, -100, 1, 2, -100, 1])
    (vector,) = _directions(model, 1)
    found = fisher_vector_product(model, x, nn.CrossEntropyLoss(), vector, targets=y)
    assert_close(found, fisher_vector_product(model, x[y >= 0], nn.CrossEntropyLoss(), vector))


def test_rows_of_padding_do_not_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.tensor([[0, 1], [1, 1], [4, 2], [3, 1]])
    gradients = []
    for h in model(x).log_softmax(-1).flatten():
        grads = torch.autograd.grad(h, list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([g.flatten() for g in grads]))
    scores = torch.stack(gradients) * model(x).softmax(-1).detach().sqrt().flatten()[:, None] / len(x) ** 0.5
    for vector in _directions(model):
        found = fisher_vector_product(model, x, "categorical", vector)
        torch.testing.assert_close(_flat(found), scores.T @ (scores @ _flat(vector)), rtol=1e-8, atol=1e-12)


def test_what_is_lost_in_rounding_is_zero():
    """Scores that differ in length by ten orders of magnitude: the smallest eigenvalues are not to be had."""
    torch.manual_seed(0)
    for dtype, scale in ((torch.float32, 30.0), (torch.float64, 20.0)):
        model, x = nn.Linear(6, 3).to(dtype), torch.randn(8, 6, dtype=dtype)
        with torch.no_grad():
            y = model(x).argmax(1)
            model.weight.mul_(3)
            x[:4] *= scale
        found = spectrum(model, x, "categorical", estimator="empirical", targets=y)
        values = found.eigenvalues
        assert (values > len(x) * torch.finfo(torch.float64).eps * values[0]).all()
        assert 1 <= found.condition_number < 1e16
        gram = fisher_gram(model, x, "categorical", estimator="empirical", targets=y)
        assert condition_number(gram) == pytest.approx(found.condition_number**0.5, rel=1e-4)


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.full((3, 3), math.nan), torch.zeros(0, 0)])
def test_there_is_no_condition_of_nothing(gram):
    assert math.isnan(condition_number(gram))
