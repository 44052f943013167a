"""The example of singular models: its matrices and steps against brute force, and what it prints."""

import math
import re

import pytest
import torch
from torch.func import grad, jacfwd, vmap

from tests.examples import loaded

pytestmark = pytest.mark.usefixtures("threads")  # examples set their own number


@pytest.fixture(scope="module")
def example():
    return loaded("singularities")


@pytest.fixture(scope="module")
def models(example):
    return loaded("singular_models")


def _theta(problem, seed=3):
    torch.manual_seed(seed)
    return torch.randn(len(problem.truth), dtype=torch.float64)


def _output(theta, x):
    first, second = (torch.erf(x @ theta[i : i + 2] / math.sqrt(2)) for i in (2, 4))
    return theta[0] * first + theta[1] * second


def _density(theta, y):
    v = torch.sigmoid(theta[0])
    parts = [torch.exp(-((y - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in theta[1:]]
    return v * parts[0] + (1 - v) * parts[1]


def _square(size, step):
    line = torch.arange(-size, size + step / 2, step, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    return x, torch.exp(-x.square().sum(1) / 2) / (2 * math.pi) * step**2


def test_the_network_by_sums_over_a_square(models):
    theta = _theta(models.EQUAL)
    x, mass = _square(9, 0.1)
    assert abs(mass.sum() - 1) < 1e-12
    gradients = jacfwd(lambda t: _output(t, x))(theta)
    torch.testing.assert_close(models.EQUAL.metric(theta), gradients.T @ (gradients * mass[:, None]))
    error = _output(theta, x) - _output(models.EQUAL.truth, x)
    torch.testing.assert_close(models.EQUAL.loss(theta), (mass * error**2).sum() / 2)


def test_the_mixture_by_sums_over_a_line(models):
    theta, truth = _theta(models.MIXTURE), models.MIXTURE.truth
    y = torch.arange(-14, 14, 0.01, dtype=torch.float64)
    p, q = _density(theta, y), _density(truth, y)
    derivatives = jacfwd(lambda t: _density(t, y))(theta)
    fisher = torch.einsum("yi,yj,y->ij", derivatives, derivatives, 0.01 / p)
    torch.testing.assert_close(models.MIXTURE.metric(theta), fisher)
    torch.testing.assert_close(models.MIXTURE.loss(theta), (q * (q / p).log()).sum() * 0.01)


@pytest.mark.parametrize("name", ["EQUAL", "MIXTURE"])
def test_the_fisher_matrix_is_the_losses_hessian_at_the_truth(models, name):
    problem = getattr(models, name)
    hessian = torch.autograd.functional.hessian(problem.loss, problem.truth)
    torch.testing.assert_close(problem.metric(problem.truth), hessian, rtol=1e-8, atol=1e-10)


def test_centred_coordinates(models):
    point = torch.tensor([2.5, 0.3, 0.1, -0.2, 0.4, 0.5], dtype=torch.float64)
    w, j = models.network_centred(point).split([2, 4])
    assert float(w.sum()) == pytest.approx(2.5)
    assert float((w[0] - w[1]) / w.sum()) == pytest.approx(0.3)
    torch.testing.assert_close((w[0] * j[:2] + w[1] * j[2:]) / w.sum(), point[2:4])
    torch.testing.assert_close(j[:2] - j[2:], point[4:])
    logit, first, second = models.mixture_centred(torch.tensor([0.4, 0.7, 0.3], dtype=torch.float64)).tolist()
    v = 1 / (1 + math.exp(-logit))
    assert (logit, first - second) == pytest.approx((0.4, 0.3))
    assert v * first + (1 - v) * second == pytest.approx(0.7)


def test_the_plateau_is_the_best_single_unit_and_critical(models):
    """By hand: w = 2, J = (1, 1) / sqrt 6, where both arc sines are of 1/4; no start finds a better one."""
    point, height = models.plateau(models.EQUAL)
    torch.testing.assert_close(point[[0, 2, 3]].abs(), torch.tensor([2, 6**-0.5, 6**-0.5]).double(), rtol=1e-5, atol=0)
    corner = (2 / math.pi) * math.asin(0.25)
    truth = 2 * (2 / math.pi) * math.asin(0.5)
    assert height == pytest.approx((truth - 4 * corner) / 2)
    on = models.equal_units(point, torch.Generator().manual_seed(0), 5, 0.0)
    gradients = vmap(grad(models.EQUAL.loss))(vmap(models.EQUAL.centred)(on))
    assert gradients.abs().max() < 1e-6
    for guess in torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        elsewhere = models.replace(models.EQUAL, guess=guess)
        assert models.plateau(elsewhere)[1] > height - 1e-9


def test_plateaus_said_to_be_saddles_are(models):
    """A negative eigenvalue of the Hessian at each start; with weights of opposite signs there may be none."""
    for problem in (models.EQUAL, models.MIXTURE):
        for point in models.starts(problem, 0, 4, 0.0):
            hessian = torch.autograd.functional.hessian(problem.loss, problem.centred(point))
            assert torch.linalg.eigvalsh(hessian)[0] < -1e-3
    w, _, *j = models.plateau(models.EQUAL)[0].tolist()
    theta = models.EQUAL.centred(torch.tensor([w, 1.5, *j, 0.0, 0.0]).double())
    assert theta[:2].prod() < 0
    assert torch.linalg.eigvalsh(torch.autograd.functional.hessian(models.EQUAL.loss, theta))[0] > -1e-8


def test_the_mixtures_plateau_is_the_normal_density_of_its_mean(models):
    point, height = models.plateau(models.MIXTURE)
    assert float(point[1]) == pytest.approx(0.4 * -0.6 + 0.6 * 0.6, abs=1e-6)
    alone = torch.tensor([0.0, 0.12, 0.12], dtype=torch.float64)
    assert height == pytest.approx(float(models.MIXTURE.loss(alone)))


def test_starts_are_at_their_distance(models):
    """And the same ones but for it."""
    for problem in (models.EQUAL, models.MIXTURE):
        near, far = (models.starts(problem, 1, 4, d) for d in (0.01, 0.1))
        planes = vmap(problem.plane)(vmap(problem.centred)(near))
        torch.testing.assert_close(planes[:, 1], torch.full((4,), 0.01).double())
        assert ((planes[:, 0] > 0.25) & (planes[:, 0] < 0.75)).all()
        u = len(problem.guess)
        torch.testing.assert_close(near[:, u:] * 10, far[:, u:])
        torch.testing.assert_close(near[:, :u], far[:, :u])
    weights = vmap(models.ZERO.centred)(models.starts(models.ZERO, 1, 4, 0.01))[:, :2]
    torch.testing.assert_close(weights[:, 1].abs(), torch.full((4,), 0.01).double())


@pytest.mark.parametrize("method", ["gradient", "gradient, centred", "diagonal", "diagonal, centred", "full"])
def test_a_step_by_hand(example, models, method):
    """In centred coordinates the matrix is pulled back by finite differences of the coordinates."""
    problem, damping, h = models.MIXTURE, 0.01, 1e-6
    start = models.starts(problem, 0, 1, 0.5)
    rule, centred = example.METHODS[method]
    point = example.in_coordinates(problem, method, start)
    found, loss = example.steps_of(problem, method, point, torch.tensor([damping]).double())
    theta = problem.centred(start[0])
    jacobian = torch.eye(3, dtype=torch.float64)
    if centred:
        moved = [problem.centred(start[0] + h * e) - problem.centred(start[0] - h * e) for e in jacobian]
        jacobian = torch.stack(moved, 1) / (2 * h)
    gradient = jacobian.T @ grad(problem.loss)(theta)
    fisher = jacobian.T @ problem.metric(theta) @ jacobian
    expected = {
        "gradient": gradient,
        "diagonal": gradient / (fisher.diagonal() + damping),
        "full": torch.linalg.inv(fisher + damping * torch.eye(3)) @ gradient,
    }[rule]
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-9)
    assert float(loss) == pytest.approx(float(problem.loss(theta)))


@pytest.mark.parametrize(("lr", "returns"), [(0.5, False), (1.0, True), (6.0, False)])
def test_leaving_counts_the_steps_that_a_trace_shows(example, models, lr, returns):
    """A run that comes back has not left: at lr 1 the diagonal oscillates back up to the plateau."""
    problem, method, steps = models.MIXTURE, "diagonal", 200
    start = models.starts(problem, 0, 3, 0.01)
    _, losses = example.trace(problem, method, start, lr, steps)
    height = models.plateau(problem)[1]
    assert bool(((losses.cummin(0).values < height / 10) & (losses > height / 10)).any()) is returns
    expected = []
    for row in losses.T.tolist():
        above = [k for k, loss in enumerate(row) if not loss < height / 10]
        expected.append(above[-1] + 1 if above[-1] < steps else math.inf)
    damping = example.DAMPINGS[example.COMPARED].expand(3)
    assert example.leave(problem, method, start, torch.full((3,), lr).double(), damping, steps).tolist() == expected


def test_the_best_step_size_has_the_least_mean(example):
    inf = math.inf
    found = torch.tensor([[[6, 6, 6], [5, 5, 5], [1, 1, inf]]]).double()
    assert example.best(found, 100).tolist() == [1]
    assert example.best(found, 10).tolist() == [2]


def test_the_diagonal_sees_the_singularity_in_centred_coordinates_only(models):
    point = models.starts(models.EQUAL, 0, 1, 1e-3)[0]
    theta = models.EQUAL.centred(point)
    jacobian = torch.autograd.functional.jacobian(models.EQUAL.centred, point)
    fisher = models.EQUAL.metric(theta)
    assert fisher.diagonal().min() > 1e-3
    assert (jacobian.T @ fisher @ jacobian).diagonal()[-2:].max() < 1e-5


def test_it_runs(example, tmp_path, capsys):
    example.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["singularities.png"]
    assert printed.rstrip().endswith(str((tmp_path / "singularities.png").resolve()))
    verdicts = re.findall(r"│ (yes|NO) +│$", printed, flags=re.MULTILINE)
    assert verdicts == ["yes"] * 17, printed
    for method in example.METHODS:
        assert method in printed
