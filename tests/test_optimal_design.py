"""The example of optimal design: its information, its exchange algorithms and what it says of PopED's numbers."""

import dataclasses
import itertools
import math
from decimal import Decimal

import mpmath
import numpy as np
import pytest
import sympy
import torch
from scipy.optimize import minimize
from torch.distributions import MultivariateNormal, kl_divergence

from tests.examples import loaded

DTYPE = torch.float64


fisher, exchanging, warfarin, example = (
    loaded(name) for name in ("population_fisher", "design_exchange", "warfarin", "optimal_design")
)


def _by_algebra(errors, reduced):
    """The warfarin model's derivatives by computer algebra, and the information by its formula, in 30 digits."""
    names = sympy.symbols("CL V ka w1 w2 w3 s1 s2", positive=True)
    values = [sympy.Rational(v) for v in ("0.15", "8", "1", "0.07", "0.02", "0.6", "0.01", "0.25")]
    (clearance, volume, ka), t = names[:3], sympy.Symbol("t", positive=True)
    theta = names[:7] if errors == "proportional" else names
    f = 70 * ka / (volume * (ka - clearance / volume)) * (sympy.exp(-clearance / volume * t) - sympy.exp(-ka * t))
    effects = [sympy.diff(f, name) * name for name in names[:3]]  # by b, of beta exp(b) at b = 0
    noise = f**2 * names[6] + (0 if errors == "proportional" else names[7])

    def at_times(*expressions):
        function = sympy.lambdify([t], [e.subs(dict(zip(names, values, strict=True))) for e in expressions], "mpmath")
        return np.array([function(mpmath.mpf(str(time))) for time in warfarin.TIMES], object)

    with mpmath.workdps(30):
        mean, level = at_times(*(sympy.diff(f, p) for p in theta)), at_times(noise)[:, 0]
        first, omega = at_times(*effects), [mpmath.mpf(str(v)) for v in warfarin.OMEGA]
        covariance = sum(o * np.outer(column, column) for o, column in zip(omega, first.T, strict=True)) + np.diag(
            level
        )
        inverse = np.array(mpmath.inverse(mpmath.matrix(covariance.tolist())).tolist(), object)
        products = []
        for k, p in enumerate(theta):
            slope = np.diag(at_times(sympy.diff(noise, p))[:, 0])
            for e, o, name, column in zip(effects, omega, names[3:6], first.T, strict=True):
                half = o * np.outer(at_times(sympy.diff(e, p))[:, 0], column)
                slope = slope + half + half.T + (np.outer(column, column) if p == name else 0)
            products.append(0 * inverse if reduced and k < 3 else inverse @ slope)
        total = mean.T @ inverse @ mean + np.array([[(u @ v).trace() / 2 for v in products] for u in products])
        return torch.from_numpy(total.astype(float))


def _emax(t, g):
    """Another user's response."""
    return g[0] * t / (g[1] + t)


def _other_population():
    return fisher.Population(
        _emax,
        lambda f: torch.stack([f.sqrt(), torch.ones_like(f)], 1),
        torch.tensor([3.0, 1.5], dtype=DTYPE),
        torch.tensor([0.2, 0.1], dtype=DTYPE),
        torch.tensor([0.05, 0.02], dtype=DTYPE),
    )


TIMES = torch.tensor([0.3, 1.0, 2.5, 4.0], dtype=DTYPE)


def test_the_example_runs_and_its_checks_pass(tmp_path, capsys):
    example.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "NO" not in printed
    assert printed.count(" yes ") == 27 + 3 + 9 + 4
    assert printed.rstrip().endswith(str((tmp_path / "optimal_design.png").resolve()))
    assert 10_000 < (tmp_path / "optimal_design.png").stat().st_size < 250_000


@pytest.mark.parametrize("errors", ["proportional", "combined"])
def test_information_is_that_of_computer_algebra(errors):
    for reduced in (True, False):
        linear = fisher.linearise(warfarin.population(errors), warfarin.vector(warfarin.TIMES), reduced=reduced)
        torch.testing.assert_close(linear.information(), _by_algebra(errors, reduced), rtol=1e-9, atol=1e-9)


def test_full_information_is_the_curvature_of_the_kl_divergence():
    """Of any response: I is the Hessian of KL(p_theta0 || p_theta) at theta0."""
    model = _other_population()

    def normal(theta):
        return MultivariateNormal(*model.moments(theta, TIMES), validate_args=False)

    here = normal(model.theta)
    hessian = torch.autograd.functional.hessian(lambda theta: kl_divergence(here, normal(theta)), model.theta)
    linear = fisher.linearise(model, TIMES)
    torch.testing.assert_close(linear.information(), hessian, rtol=1e-9, atol=1e-9)
    reduced = fisher.linearise(model, TIMES, reduced=True).information()
    assert (reduced[:2, 2:] == 0).all()
    torch.testing.assert_close(reduced[2:, 2:], hessian[2:, 2:], rtol=1e-9, atol=1e-9)
    assert torch.linalg.eigvalsh(hessian[:2, :2] - reduced[:2, :2]).min() > -1e-9


def test_moments_are_those_of_the_linearised_model():
    """Mean and covariance of mu + L b + h e, over the corners of a design with these variances."""
    model = _other_population()
    mean, covariance = model.moments(model.theta, TIMES)
    step = 1e-6
    moves = torch.eye(2, dtype=DTYPE) * step
    slope = [(_emax(TIMES, model.fixed * m.exp()) - _emax(TIMES, model.fixed * (-m).exp())) / (2 * step) for m in moves]
    f = _emax(TIMES, model.fixed)
    columns = [*slope, f.sqrt().diag(), torch.eye(4, dtype=DTYPE)]
    deviations = [model.omega[0].sqrt() * columns[0][:, None], model.omega[1].sqrt() * columns[1][:, None]]
    deviations += [model.sigma[0].sqrt() * columns[2], model.sigma[1].sqrt() * columns[3]]
    factor = torch.cat(deviations, 1)
    torch.testing.assert_close(mean, f)
    torch.testing.assert_close(covariance, factor @ factor.T, rtol=1e-8, atol=1e-10)


def test_information_of_sets_of_times(monkeypatch):
    monkeypatch.setattr(fisher, "CHUNK", 2)
    model, sets = _other_population(), torch.tensor([[0, 1, 3], [1, 2, 3], [3, 0, 2], [0, 1, 2], [2, 1, 0]])
    found = fisher.linearise(model, TIMES).information(sets)
    for chosen, matrix in zip(sets, found, strict=True):
        torch.testing.assert_close(matrix, fisher.linearise(model, TIMES[chosen]).information())


def test_scores_are_gradients_of_the_log_density():
    model = _other_population()
    scores = fisher.simulated_scores(model, TIMES, 5, torch.Generator().manual_seed(1))
    mean, covariance = model.moments(model.theta, TIMES)
    normal = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    for y, score in zip(mean + normal @ torch.linalg.cholesky(covariance).T, scores, strict=True):
        theta = model.theta.requires_grad_()
        MultivariateNormal(*model.moments(theta, TIMES)).log_prob(y).backward()
        torch.testing.assert_close(score, theta.grad)
    again = fisher.simulated_scores(model, TIMES, 5, torch.Generator().manual_seed(1))
    assert torch.equal(scores, again)


def test_relative_errors():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=DTYPE)
    expected = torch.tensor([100 * (3 / 11) ** 0.5 / 2, 100 * (4 / 11) ** 0.5 / 5], dtype=DTYPE)
    torch.testing.assert_close(fisher.relative_errors(matrix, torch.tensor([2.0, 5.0], dtype=DTYPE)), expected)


def test_published_digits_tell_conventions_apart():
    """Half a unit of the last digit, which standard deviations, interaction or a mistaken L would all miss."""
    assert warfarin.half_unit("5.996147e22") == Decimal("5e15")
    assert warfarin.half_unit("26.748640") == Decimal("5e-7")
    (check,) = warfarin.digits("", "4.738266", [4.7382664])
    assert check.passes
    assert not dataclasses.replace(check, got=4.7382666).passes
    model, times = warfarin.population("proportional"), warfarin.vector(warfarin.TIMES)
    text = warfarin.PUBLISHED["proportional", "reduced"]

    def passing(model, information):
        rse = fisher.relative_errors(information, model.theta).tolist()
        got = [float(torch.det(information)), *rse]
        return [check.passes for check in warfarin.digits("", text, got)]

    right = 32 * fisher.linearise(model, times, reduced=True).information()
    assert all(passing(model, right))
    # Variances of effects that interact with the errors: E[f(g)^2], to second order, in place of f(beta)^2.
    mixed = dataclasses.replace(model, error=lambda f: f[:, None] * (1 + 0.07) ** 0.5)
    # Effects that add to the parameters in place of log-normal ones.
    additive = dataclasses.replace(model, response=lambda t, g: warfarin.concentration(t, model.fixed + g.log()))
    for wrong in (mixed, dataclasses.replace(additive, fixed=torch.ones(3, dtype=DTYPE))):
        assert not any(passing(wrong, 32 * fisher.linearise(wrong, times, reduced=True).information())[:1])
    assert sum(passing(model, 32 * fisher.linearise(model, times).information())) == 0


def test_full_digits_of_poped_are_rounding_errors():
    """With its differences all digits agree, with exact derivatives not: a step of 1e-5, squared, under 1e-16."""
    text, model = warfarin.PUBLISHED["proportional", "full"], warfarin.population("proportional")
    times = warfarin.vector(warfarin.TIMES)
    got = warfarin.numbers(warfarin.differences(float, math.exp), model.theta)
    assert all(check.passes for check in warfarin.digits("", text, got))
    exact = warfarin.numbers(fisher.linearise(model, times), model.theta)
    missed = [check.what.split(": ")[1] for check in warfarin.digits("", text, exact) if not check.passes]
    assert missed == [
        "determinant",
        "RSE of ka, %",
        "RSE of omega2 CL, %",
        "RSE of omega2 V, %",
        "RSE of sigma2 prop, %",
    ]


def test_differences_tend_to_derivatives():
    linear = fisher.linearise(warfarin.population("proportional"), warfarin.vector(warfarin.TIMES))
    found = warfarin.differences(Decimal, Decimal.exp)  # 28 digits
    for name in ("mean_slope", "covariance", "covariance_slope"):
        torch.testing.assert_close(getattr(found, name), getattr(linear, name), rtol=1e-7, atol=1e-7)


def _quadratic(count):
    """Information of one observation of a quadratic at points in [-1, 1]."""
    x = torch.linspace(-1, 1, count, dtype=DTYPE)
    f = torch.stack([torch.ones_like(x), x, x**2], 1)
    return f[:, :, None] * f[:, None, :]


def test_exchange_finds_the_textbook_design():
    """Quadratic regression on [-1, 1]: a third each at -1, 0 and 1."""
    information = _quadratic(21)
    design = exchanging.exchange(information, torch.full((21,), 1 / 21, dtype=DTYPE))
    expected = torch.zeros(21, dtype=DTYPE)
    expected[[0, 10, 20]] = 1 / 3
    torch.testing.assert_close(design.weights, expected, rtol=0, atol=1e-4)
    assert design.sensitivity.max() <= 3 * (1 + 1e-9)


def test_exchange_against_a_general_solver():
    """Weights of 20 sets of three times by SLSQP."""
    grid = torch.tensor([0.5, 2.0, 6.0, 24.0, 72.0, 120.0], dtype=DTYPE)
    found = exchanging.search(fisher.linearise(warfarin.population("combined"), grid, reduced=True), 3)
    assert found.sets.tolist() == [list(chosen) for chosen in itertools.combinations(range(6), 3)]
    design, flat = found.design, found.information.numpy()

    def loss(w):
        return -np.linalg.slogdet(np.einsum("k,kij->ij", w, flat))[1]

    def gradient(w):
        return -np.einsum("kij,ji->k", flat, np.linalg.inv(np.einsum("k,kij->ij", w, flat)))

    solved = minimize(
        loss, np.full(20, 1 / 20), jac=gradient, bounds=[(0, 1)] * 20, method="SLSQP", tol=1e-12,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(20)},
    )  # fmt: skip
    assert float(design.information.logdet()) == pytest.approx(-solved.fun, abs=1e-6)
    assert -float(design.information.logdet()) <= solved.fun + 1e-8
    torch.testing.assert_close(design.weights, torch.from_numpy(solved.x), rtol=0, atol=1e-3)
    assert float(design.weights.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(design.information, torch.einsum("k,kij->ij", design.weights, found.information))
    assert 1 < len(found.used) < 20
    assert (design.weights[found.used] > 0).all()
    assert (design.weights[found.used].diff() <= 0).all()


def test_sensitivity_is_the_derivative_towards_a_candidate():
    information = _quadratic(7)
    weights = torch.arange(1.0, 8, dtype=DTYPE) / 28
    matrix, step = torch.einsum("k,kij->ij", weights, information), 1e-6
    found = exchanging.sensitivity(information, matrix)
    ahead, behind = (((1 - a) * matrix + a * information).logdet() for a in (step, -step))
    torch.testing.assert_close(found - 3, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
    assert float(weights @ found) == pytest.approx(3)


def test_certificates_fail_for_what_is_not_optimal(monkeypatch):
    grid = warfarin.vector(example.QUICK_GRID)
    published = torch.tensor([example.QUICK_GRID.index(t) for t in warfarin.TIMES])
    linear = fisher.linearise(warfarin.population("combined"), grid, reduced=True)
    right = exchanging.search(linear, 8, published)
    assert all(check.passes for check in example.certified("", right))
    monkeypatch.setattr(exchanging, "MOST", 0)
    wrong = exchanging.search(linear, 8, published)
    assert wrong.design.exchanges == 0
    highest, _, single = example.certified("", wrong)
    assert not highest.passes
    assert not single.passes
    uneven = dataclasses.replace(right, design=dataclasses.replace(right.design, sensitivity=wrong.design.sensitivity))
    assert not all(check.passes for check in example.certified("", uneven))


@pytest.mark.parametrize(("target", "limit"), [(8, 1 / 3), (1, 1 / 3), (3, 0.02), (6, 1 / 3), (8, 1.0), (5, 1.0)])
def test_best_move_is_the_best_of_many(target, limit):
    """Up to the limit, or to where the matrix is no longer one of information."""
    information = _quadratic(9)
    matrix = information[[0, 4, 7]].mean(0)
    change = information[target] - information[7]
    grid = torch.linspace(0, limit, 10_001, dtype=DTYPE)
    matrices = matrix + grid[:, None, None] * change
    values = torch.where(torch.linalg.eigvalsh(matrices)[:, 0] > 0, matrices.logdet(), -math.inf)
    found = exchanging.best_move(matrix, change, limit)
    assert found == pytest.approx(float(grid[values.argmax()]), abs=1.1 * limit / 10_000)


def test_swaps_of_times_end_where_none_gains():
    grid = warfarin.vector(example.QUICK_GRID)
    linear = fisher.linearise(warfarin.population("combined"), grid)
    start = torch.tensor([0, 1, 2, 3])
    found = exchanging.exchange_times(linear, start)
    value = linear.information(found[None])[0].logdet()
    for place, other in itertools.product(range(4), set(range(len(grid))) - set(found.tolist())):
        swapped = found.clone()
        swapped[place] = other
        assert fisher.linearise(warfarin.population("combined"), grid[swapped]).information().logdet() <= value + 1e-9
    assert value > linear.information(start[None])[0].logdet()


def test_efficiency_is_a_share_of_subjects():
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=DTYPE)
    assert exchanging.efficiency(0.7 * matrix, matrix) == pytest.approx(0.7)


def test_designs_are_by_the_information_that_they_are_named_for():
    found = example.designs(example.QUICK_GRID)
    assert found.grid[found.published].tolist() == list(warfarin.TIMES)
    for chosen, correlated, samples in ((found.reduced, False, 8), (found.full, True, 8), (found.sparse, False, 3)):
        assert bool((chosen.design.information[:3, 3:].abs() > 1e-9).any()) is correlated
        assert chosen.sets.shape[1] == samples
    assert found.full.used.tolist() != found.reduced.used.tolist()
    of_published, *_ = example.described(found).columns[3].cells
    before = found.reduced.linear.information(found.published[None])[0]
    assert of_published == f"{exchanging.efficiency(before, found.reduced.design.information):.4f}"


def test_bad_input():
    model = _other_population()
    good = {name: getattr(model, name) for name in ("response", "error", "fixed", "omega", "sigma")}
    for name, value in (("fixed", -model.fixed), ("omega", model.omega[None]), ("sigma", 0 * model.sigma)):
        with pytest.raises(ValueError, match=f"{name}="):
            fisher.Population(**{**good, name: value})
    with pytest.raises(ValueError, match=r"omega=.*each of the 2"):
        fisher.Population(**{**good, "omega": model.sigma.repeat(2)})
    with pytest.raises(ValueError, match=r"times=.*different"):
        fisher.linearise(model, torch.ones(2, dtype=DTYPE))
    with pytest.raises(ValueError, match=r"response: gives shape \(\)"):
        fisher.linearise(fisher.Population(**{**good, "response": lambda t, g: g.sum()}), TIMES)
    with pytest.raises(ValueError, match=r"error: gives shape \(4, 1\); \(4, 2\)"):
        fisher.linearise(fisher.Population(**{**good, "error": lambda f: f[:, None]}), TIMES)
    start = torch.tensor([0.0, 1.0, 2.0], dtype=DTYPE)
    with pytest.raises(ValueError, match="singular covariance"):
        fisher.linearise(warfarin.population("proportional"), start).information()
    with pytest.raises(ValueError, match="singular; start from more"):
        exchanging.exchange(_quadratic(5), torch.eye(5, dtype=DTYPE)[0])
    linear = fisher.linearise(model, TIMES)
    with pytest.raises(ValueError, match="samples=5: pass a number from 1 to 4"):
        exchanging.search(linear, 5)
