"""The penalty of elastic weight consolidation: its value, its gradient, what it refuses."""

import itertools

import pytest
import torch
from torch import nn

import fishopt
from fishopt.penalty import fisher_penalty


def _network(activation=nn.Tanh, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2)).to(dtype)


def _values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _moved(model, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))


def _case(dtype=torch.float64):
    model = _network(dtype=dtype)
    anchor = _values(model)
    x = torch.randn(6, 3, dtype=dtype)
    diagonal = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    _moved(model)
    return model, anchor, diagonal


def test_value_and_gradient_by_loops():
    model, anchor, diagonal = _case()
    value = fisher_penalty(model, anchor, diagonal)
    assert value.shape == ()
    expected = 0.0
    for name, p in model.named_parameters():
        for index in itertools.product(*map(range, p.shape)):
            expected += 0.5 * float(diagonal[name][index]) * float(p.detach()[index] - anchor[name][index]) ** 2
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert expected > 1e-3
    value.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, diagonal[name] * (p.detach() - anchor[name]), rtol=1e-12, atol=0)


def test_nothing_but_the_model_gets_a_gradient():
    model, anchor, diagonal = _case()
    for given in (anchor, diagonal):
        for value in given.values():
            value.requires_grad_()
    fisher_penalty(model, anchor, diagonal).backward()
    assert all(value.grad is None for given in (anchor, diagonal) for value in given.values())
    assert all(p.grad is not None for p in model.parameters())


def test_it_is_zero_at_the_anchor():
    model, _, diagonal = _case()
    value = fisher_penalty(model, _values(model), diagonal)
    value.backward()
    assert value == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_it_is_the_divergence_of_predictions_where_one_parameter_moves():
    """KL(p_anchor || p_now) = 1/2 F_i step^2 + O(step^3), exactly the scale of `fisher_diagonal`."""
    model = _network()
    anchor, x = _values(model), torch.randn(50, 3, dtype=torch.float64)
    diagonal = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    before = model(x).detach().log_softmax(1)
    for p in model.parameters():
        with torch.no_grad():
            p.view(-1)[1] += 1e-3
        kl = (before.exp() * (before - model(x).log_softmax(1))).sum(1).mean()
        torch.testing.assert_close(fisher_penalty(model, anchor, diagonal), kl, rtol=5e-3, atol=0)
        with torch.no_grad():
            p.view(-1)[1] -= 1e-3


def test_parameters_without_a_diagonal_are_free():
    model, anchor, diagonal = _case()
    only = {"2.bias": diagonal["2.bias"]}
    value = fisher_penalty(model, anchor, only)
    value.backward()
    assert model[0].weight.grad is None
    step = model[2].bias.detach() - anchor["2.bias"]
    torch.testing.assert_close(value.detach(), 0.5 * (diagonal["2.bias"] * step.square()).sum())


def test_negative_entries_of_i2_count_as_zero():
    """Left as they are, they would make the penalty unbounded below."""
    model = _network()
    anchor, x = _values(model), torch.randn(2, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    raw = fishopt.fisher_diagonal(model, x, "categorical", estimator="I2", generator=generator)
    negative = {name: value < 0 for name, value in raw.items()}
    assert sum(int(mask.sum()) for mask in negative.values()) > 2
    kept = {name: value.clone() for name, value in raw.items()}
    for scale in (1.0, 1e6):
        _moved(model, scale)
        model.zero_grad()
        value = fisher_penalty(model, anchor, raw)
        value.backward()
        assert value > 0
        for name, p in model.named_parameters():
            assert (p.grad[negative[name]] == 0).all()
            step = p.detach() - anchor[name]
            assert (p.grad[~negative[name]] == (raw[name] * step)[~negative[name]]).all()
    assert all(torch.equal(raw[name], kept[name]) for name in raw)


def test_zero_is_nearer_to_what_is_estimated_than_a_negative_entry():
    """The reason for the decision, on real estimates: the error falls, and the mean rises."""
    model, x = _network(), torch.randn(4, 3, dtype=torch.float64)
    exact = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")["0.weight"]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            fishopt.fisher_diagonal(model, x, "categorical", estimator="I2", generator=generator)["0.weight"]
            for _ in range(200)
        ]
    )
    raw, clamped = (draws - exact).square().mean(0), (draws.clamp_min(0) - exact).square().mean(0)
    assert (clamped <= raw).all()
    assert (clamped < raw).any()
    assert (draws.clamp_min(0).mean(0) >= draws.mean(0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_takes_what_fisher_diagonal_returns(dtype):
    """Of half precision the diagonal is float32; the gradient is the parameter's."""
    model, anchor, diagonal = _case(dtype)
    _moved(model, 1000)  # squares that float16 does not hold
    value = fisher_penalty(model, anchor, diagonal)
    assert value.dtype is torch.float32
    steps = {name: p.detach().double() - anchor[name].double() for name, p in model.named_parameters()}
    expected = sum(float((diagonal[name].double() * step.square()).sum()) for name, step in steps.items()) / 2
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype is dtype
        expected = diagonal[name] * (p.detach().float() - anchor[name].float())
        torch.testing.assert_close(p.grad, expected.to(dtype))


def test_tied_and_wrapped_parameters_go_by_the_diagonals_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model = Tied()
    diagonal = fishopt.fisher_diagonal(model, torch.randn(5, 3), "categorical")
    anchor = _values(model)
    _moved(model)
    plain = fisher_penalty(model, anchor, diagonal)
    assert plain > 0
    assert fisher_penalty(nn.DataParallel(model), anchor, diagonal) == plain


def test_it_goes_through_torch_func():
    model, anchor, diagonal = _case()

    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return fisher_penalty(self.model, anchor, diagonal)

    penalty = Penalty()
    parameters = {f"model.{name}": p.detach() + 0.1 for name, p in model.named_parameters()}
    found = torch.func.grad(lambda ps: torch.func.functional_call(penalty, ps, ()))(parameters)
    for name, gradient in found.items():
        plain = name.removeprefix("model.")
        torch.testing.assert_close(gradient, diagonal[plain] * (parameters[name] - anchor[plain]))


def test_a_gradient_step_returns_to_the_anchor():
    """The curvature of the penalty is F itself: Newton's step with it lands on the anchor."""
    model, anchor, diagonal = _case()
    fisher_penalty(model, anchor, diagonal).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach() - p.grad / diagonal[name], anchor[name])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m, a, d: (list(m.parameters()), a, d), TypeError, "torch.nn.Module itself"),
        (lambda m, a, d: (m, list(a.values()), d), TypeError, "anchor is a list"),
        (lambda m, a, d: (m, a, d["0.bias"]), TypeError, "diagonal is a Tensor"),
        (lambda m, a, d: (m, a, {}), ValueError, "diagonal is empty"),
        (
            lambda m, a, d: (m, a, {**d, "3.bias": d["2.bias"]}),
            ValueError,
            "diagonal has '3.bias'.*'0.weight', '0.bias'",
        ),
        (lambda m, a, d: (m, {"0.bias": a["0.bias"]}, d), ValueError, "anchor has no '0.weight'.*names '0.bias'"),
        (lambda m, a, d: (m, {}, d), ValueError, "anchor names none"),
        (lambda m, a, d: (m, a, {"2.bias": 1.0}), TypeError, r"diagonal\['2.bias'\] is a float; pass a tensor"),
        (lambda m, a, d: (m, {**a, "0.bias": None}, d), TypeError, r"anchor\['0.bias'\] is a NoneType"),
        (
            lambda m, a, d: (m, a, {"2.bias": torch.ones(1).double()}),
            ValueError,
            r"diagonal.*shape \(1,\).*shape \(2,\)",
        ),
        (
            lambda m, a, d: (m, {**a, "0.bias": torch.ones(()).double()}, d),
            ValueError,
            r"anchor.*shape \(\).*shape \(4,\)",
        ),
        (lambda m, a, d: (m, a, {"2.bias": d["2.bias"].float()}), TypeError, "diagonal.*float32.*float64.*convert it"),
        (lambda m, a, d: (m, a, {"2.bias": d["2.bias"].long()}), TypeError, "diagonal.*int64"),
        (lambda m, a, d: (m, a, {"2.bias": d["2.bias"] + 0j}), TypeError, "diagonal.*complex128"),
        (lambda m, a, d: (m, {**a, "0.bias": a["0.bias"].float()}, d), TypeError, "anchor.*float32.*float64"),
        (lambda m, a, d: (m, a, {"2.bias": d["2.bias"].to("meta")}), ValueError, "diagonal.*on meta.*on cpu; move it"),
        (lambda m, a, d: (m, {**a, "0.bias": a["0.bias"].to("meta")}, d), ValueError, "anchor.*on meta"),
        (lambda m, a, d: (m, m.state_dict(), d), ValueError, "shares the parameter's memory"),
        (lambda m, a, d: (m, dict(m.named_parameters()), d), ValueError, "detach.*clone"),
        (
            lambda m, a, d: (m, a, {"2.bias": d["2.bias"] * NAN}),
            ValueError,
            r"diagonal\['2.bias'\] has 2 values that are",
        ),
        (lambda m, a, d: (m, a, {**d, "2.bias": d["2.bias"] * -INF}), ValueError, r"diagonal\['2.bias'\] has 2 values"),
        (lambda m, a, d: (m, {**a, "0.bias": a["0.bias"] + INF}, d), ValueError, r"anchor\['0.bias'\] has 4 values"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        fisher_penalty(*change(*_case()))


def test_large_values_are_not_taken_for_infinite_ones():
    model, anchor, diagonal = _case()
    anchor["0.bias"] = torch.full_like(anchor["0.bias"], 0.9 * torch.finfo(torch.float64).max)
    assert not anchor["0.bias"].sum().isfinite()
    fisher_penalty(model, anchor, {"0.bias": 0 * diagonal["0.bias"]})


def test_a_diverged_model_is_not_the_penaltys_to_refuse():
    model, anchor, diagonal = _case()
    with torch.no_grad():
        model[0].weight.fill_(NAN)
    assert fisher_penalty(model, anchor, diagonal).isnan()
