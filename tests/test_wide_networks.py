"""Mean-field theory of wide networks: its formulas against brute force, and the example that measures it."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad, quad
from torch import nn

from tests.examples import loaded


@pytest.fixture(scope="module")
def wide():
    return loaded("wide_networks")


@pytest.fixture
def theory(wide):
    return loaded("mean_field")


@pytest.fixture
def descent(wide):
    return loaded("wide_descent")


def _density(u):
    return math.exp(-u * u / 2) / math.sqrt(2 * math.pi)


def _expected_square(f, scale):
    return sum(quad(lambda u: float(f(scale * u)) ** 2 * _density(u), *ends)[0] for ends in ((-9, 0), (0, 9)))


def _expected_product(f, scale, r, kinked):
    """``E f(scale x) f(scale (r x + sqrt(1 - r^2) y))``; of the ReLU from x = 0, and y where that argument is 0."""
    s = math.sqrt(1 - r * r)

    def integrand(y, x):
        return float(f(scale * x)) * float(f(scale * (r * x + s * y))) * _density(x) * _density(y)

    start = (0.0, 9.0, lambda x: -r * x / s) if kinked else (-9.0, 9.0, lambda x: -9.0)
    return dblquad(integrand, *start, lambda x: 9.0, epsabs=1e-7, epsrel=1e-7)[0]


@pytest.mark.parametrize(("variance", "covariance"), [(2.3, 0.9), (1.7, 0.1), (3.6, 3.2)])
def test_moments_are_adaptive_integrals(theory, variance, covariance):
    for ensemble in (theory.TANH, theory.RELU):
        own, cross = ensemble.moments(variance, variance), ensemble.moments(variance, covariance)
        scale, r = math.sqrt(variance), covariance / variance
        for k, f in enumerate((ensemble.phi, ensemble.derivative)):
            assert own[k] == pytest.approx(_expected_square(f, scale), rel=1e-8)
            assert cross[k] == pytest.approx(_expected_product(f, scale, r, ensemble is theory.RELU), abs=1e-6)


def test_sixty_nodes_are_right_but_for_the_kink(theory):
    """What the reference's numbers come out with: off for the ReLU, not by much for tanh."""
    for ensemble, low, high in ((theory.TANH, 1e-4, 4e-3), (theory.RELU, 5e-3, 2e-2)):
        crude = theory.quadrature(ensemble.phi, ensemble.derivative, 60)
        sizes = theory.Sizes()
        exact, found = (
            theory.statistics(theory.order_parameters(ensemble, 3, moments), sizes) for moments in (None, crude)
        )
        assert low < np.abs(found / exact - 1).max() < high


def test_order_parameters_of_relu_networks_by_hand(theory):
    """He's initialisation without biases keeps second moments and gradients: kappa1 is L / (L - 1)."""
    ensemble = theory.Ensemble("", nn.ReLU, None, None, theory.arc_cosine, 2.0, 0.0)
    for depth in (2, 5):
        order = theory.order_parameters(ensemble, depth)
        assert order.kappa1 == pytest.approx(depth / (depth - 1))
        assert order.variance == pytest.approx(2.0)
    # Two layers: phat^1 of orthogonal inputs is q/2pi = 1/pi; only the last layer's weights are seen by both inputs.
    order = theory.order_parameters(ensemble, 2)
    assert order.kappa2 == pytest.approx(1 / math.pi)
    assert order.covariance == pytest.approx(2 / math.pi)
    with pytest.raises(ValueError, match="depth=1: pass 2 or more"):
        theory.order_parameters(ensemble, 1)


def _monte_carlo_kernel(ensemble, depth, width, networks):
    """``grad f(x_n) . grad f(x_m) / M`` averaged over networks, by autograd."""
    torch.manual_seed(0)
    found = []
    for _ in range(networks):
        widths = [width] * depth + [1]
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b).double(), ensemble.module()]
            nn.init.normal_(layers[-2].weight, std=math.sqrt(ensemble.weight_variance / a))
            nn.init.normal_(layers[-2].bias, std=math.sqrt(ensemble.bias_variance))
        model = nn.Sequential(*layers[:-1])
        rows = []
        for x in torch.randn(2, width, dtype=torch.float64):
            gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in gradients]))
        found.append([rows[0] @ rows[0] / width, rows[0] @ rows[1] / width])
    return np.array(found, dtype=float)


def test_order_parameters_are_what_wide_networks_have(theory):
    """alpha kappa1 and alpha kappa2 are the neural tangent kernel over M; 4 standard errors, and 1/M for its bias."""
    for ensemble in (theory.TANH, theory.RELU):
        for depth in (2, 4):
            found = _monte_carlo_kernel(ensemble, depth, 250, 30)
            order = theory.order_parameters(ensemble, depth)
            expected = (depth - 1) * np.array([order.kappa1, order.kappa2])
            error = found.std(0, ddof=1) / math.sqrt(len(found))
            assert (np.abs(found.mean(0) - expected) < 4 * error + 8 / 250 * expected).all()


def test_statistics_are_those_of_the_limiting_gram_matrix(theory):
    order, sizes = theory.Order(1.3, 0.4, 2.0, 0.5), theory.Sizes(depth=4, width=50, inputs=7, outputs=3)
    kernel = np.full((7, 7), 0.4) + 0.9 * np.eye(7)
    values = np.linalg.eigvalsh(np.kron(kernel, np.eye(3)) * 3 * 50 / 7)
    parameters = 3 * 50**2
    expected = [values.sum() / parameters, (values**2).sum() / parameters, values[-1]]
    np.testing.assert_allclose(theory.statistics(order, sizes), expected)


def test_softmax_eigenvalues_by_the_symmetric_root(theory):
    order, sizes = theory.Order(1.3, 0.4, 2.0, 0.5), theory.Sizes(depth=4, width=50, inputs=4, outputs=3)
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = np.zeros((12, 12))
    for n, row in enumerate(outputs.numpy()):
        g = np.exp(row) / np.exp(row).sum()
        blocks[3 * n : 3 * n + 3, 3 * n : 3 * n + 3] = np.diag(g) - np.outer(g, g)
    kernel = np.kron(np.full((4, 4), 0.4) + 0.9 * np.eye(4), np.eye(3)) * 3 * 50 / 4
    expected = np.sort(np.linalg.eigvals(kernel @ blocks).real)[::-1]
    np.testing.assert_allclose(theory.softmax_eigenvalues(order, sizes, outputs).numpy(), expected, atol=1e-10)


def test_limiting_outputs_have_their_covariance(theory):
    order, sizes = theory.Order(1.0, 1.0, 2.0, 0.5), theory.Sizes(inputs=3, outputs=5000)
    found = np.cov(theory.limiting_outputs(order, sizes, torch.Generator().manual_seed(0)).numpy())
    expected = np.full((3, 3), 0.5) + 1.5 * np.eye(3)
    # A covariance of n normals has variance (S_ii S_jj + S_ij^2) / n.
    error = np.sqrt((4 + expected**2) / 5000)
    assert (np.abs(found - expected) < 4 * error).all()


def _fisher(model, x, softmax):
    """The P x P matrix by its definition."""
    total = 0.0
    for row in x:
        outputs = model(row)
        gradients = []
        for k in range(len(outputs)):
            parts = torch.autograd.grad(outputs[k], list(model.parameters()), retain_graph=True)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        jacobian = torch.stack(gradients)
        g = outputs.detach().softmax(0)
        middle = g.diag() - torch.outer(g, g) if softmax else torch.eye(len(g), dtype=g.dtype)
        total = total + jacobian.mT @ middle @ jacobian / len(x)
    return total


def test_measured_statistics_are_those_of_the_whole_matrix(wide, theory):
    sizes = theory.Sizes(depth=3, width=6, inputs=4, outputs=2)
    for ensemble in (theory.TANH, theory.RELU):
        model, x = theory.network(ensemble, sizes, torch.Generator().manual_seed(3))
        values = torch.linalg.eigvalsh(_fisher(model, x, softmax=False))
        expected = [values.mean(), values.square().mean(), values[-1], values[-2:].mean()]
        found = wide.linear_statistics(ensemble, sizes, torch.Generator().manual_seed(3))
        assert found == pytest.approx([float(value) for value in expected])
        values = torch.linalg.eigvalsh(_fisher(model, x, softmax=True)).flip(0)[:8]
        found = wide.softmax_pair(ensemble, sizes, torch.Generator().manual_seed(3))[0]
        np.testing.assert_allclose(found, values.numpy(), atol=1e-9 * float(values[0]))


def test_networks_have_the_variances_they_say(theory):
    model, x = theory.network(theory.TANH, theory.Sizes(width=1000, inputs=200), torch.Generator().manual_seed(0))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    for values, variance in ((model[0].weight, 3 / 1000), (model[2].bias, 0.64), (x, 1.0)):
        error = variance * math.sqrt(2 / values.numel())
        assert abs(values.detach().square().mean().item() - variance) < 4 * error


def test_beside_moves_along_the_first_eigenvector(theory, descent):
    model, x = theory.network(theory.TANH, theory.Sizes(width=6, inputs=4), torch.Generator().manual_seed(1))
    matrix = _fisher(model, x, softmax=False)
    moved, largest = descent.beside(model, x)
    before, after = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, moved))
    step = (after - before) / descent.OFFSET
    assert largest == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]))
    assert float(step.norm()) == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(matrix @ step, largest * step, rtol=1e-6, atol=1e-6 * largest)


def test_losses_are_of_plain_gradient_descent(descent):
    """Linear least squares, whose error is a power of the matrix (1 - rate F)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    model, truth = nn.Linear(3, 1, bias=False).double(), torch.ones(3, dtype=torch.float64)
    error = model.weight.detach()[0].clone() - truth
    expected = []
    for _ in range(4):
        expected.append(float((x @ error).square().sum() / 10))
        error = error - 0.1 * x.mT @ x @ error / 5
    assert descent.losses(model, x, (x @ truth)[:, None], 0.1, 4) == pytest.approx(expected)


def test_chance_is_students_interval(wide):
    values = np.array([1.0, 2.0, 3.0, 6.0])
    error = math.sqrt(14 / 3)  # deviations -2, -1, 0, 3
    assert wide.chance(values) == pytest.approx(12.92398 * error / 2, rel=1e-6)  # t at 3 degrees, 99.9 %, by the tables
    assert wide.chance(values, 5) == pytest.approx(12.92398 * error * math.sqrt(1 / 4 + 1 / 5), rel=1e-6)


def test_lines_end_where_the_noise_lets_them(wide):
    """Ends of lines through noise are within the interval about as often as it says."""
    generator = np.random.default_rng(0)
    x = np.array([0.1, 0.2, 0.4])
    spread, outside = np.array([1.0, 2.0, 5.0])[:, None], 0
    for _ in range(500):
        found, half = wide.line(x, 3 - 2 * x[:, None] + spread * generator.normal(size=(3, 10)))
        outside += abs(found[1] - 3) > half[1] * 1.833 / wide.quantile(10)  # t at 9 degrees, 90 %
    assert 20 <= outside <= 85
    powers, _ = wide.line(np.log(x), (5 * x**-0.5)[:, None] * np.array([[0.9, 1.1]]), logarithm=True)
    np.testing.assert_allclose(powers, [-0.5, math.log(5)])


def _fabricated(wide, theory, factor):
    """Measurements that are theory but for noise of 2 %, corrections in 1/M, and ``factor``."""
    generator = np.random.default_rng(0)
    linear = {}
    for sizes in (theory.Sizes(width=width) for width in (75, 150, 300, 600)):
        known = theory.statistics(theory.order_parameters(theory.TANH, 3), sizes)[[0, 1, 2, 2]]
        noise = 0.02 * generator.normal(size=(20, 4)) * [1, 1, 0, 1]
        linear[sizes] = factor * known * (1 + 5 / sizes.width + noise)
        split = np.abs(1 + 0.1 * generator.normal(size=20)) / math.sqrt(sizes.width)
        linear[sizes][:, 2] = linear[sizes][:, 3] * (1 + split)
    found = wide.Measured(linear, {}, None, None)
    return wide.linear_checks(theory.TANH, found, list(linear))


def test_checks_hold_for_theory_and_for_nothing_else(wide, theory):
    assert [check.passes for check in _fabricated(wide, theory, 1.0)] == [True] * 7
    for factor in (0.9, 1.1):  # which an excess that is relative does not see
        assert [check.passes for check in _fabricated(wide, theory, factor)] == [False] * 3 + [True] + [False] * 3


def test_the_example(wide, tmp_path, capsys):
    wide.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    path = tmp_path / "wide_networks.png"
    assert 30_000 < path.stat().st_size < 250_000
    assert printed.rstrip().endswith(f"picture: {path.resolve()}")
    rows = re.findall(r"│\s+(yes|NO)\s+│", printed)
    assert rows == ["yes"] * (6 + 8 + 4 + 12), printed
    assert printed.count("independent start, rate 1.5") == 2


def test_the_example_is_the_same_to_the_bit(wide, theory):
    plan = wide.Plan(theory.Sizes(width=8, inputs=3), (6, 8), (2,), (4,), networks=2, draws=2)
    runs = [wide.measure(theory.TANH, plan, torch.Generator().manual_seed(0)) for _ in range(2)]
    for first, second in zip(*(list(run.linear.values()) for run in runs), strict=True):
        assert np.array_equal(first, second)
    assert np.array_equal(runs[0].process, runs[1].process)
    assert np.array_equal(runs[0].example, runs[1].example)
