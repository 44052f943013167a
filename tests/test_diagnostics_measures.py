"""What is watched in training, against its definition: from the rows of J, and from their Gram matrix alone."""

import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.diagnostics import TrainingMonitor, condition_number, monitor
from fishopt.diagnostics.measures import gradient_moments
from tests.diagnostics_setup import LOSS, _data, _mlp, _rows, _step

# --- the measures ---


def test_measures_are_those_of_the_rows():
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    conditions, length = [], 0.0
    for _ in range(3):
        j = _rows(model, x, y)
        e = torch.linalg.svdvals(j)
        conditions.append(float(e[0] / e[-1]))
        length += 0.3 / 24 * float(j.norm())
        _step(model, optimizer, x, y)
        last = watched.history[-1]
        assert last.batch_size == 24
        assert last.jacobian_norm == pytest.approx(float(j.norm()), rel=1e-10)
        assert last.gradient_square == pytest.approx(float(j.mean(0).square().sum()), rel=1e-8)
        assert last.gradient_variance == pytest.approx(float(j.var(0).sum()), rel=1e-10)
        assert last.noise_scale == pytest.approx(float(j.var(0).sum() / j.mean(0).square().sum()), rel=1e-8)
        assert last.condition == pytest.approx(conditions[-1], rel=1e-6)
    assert [one.step for one in watched.history] == [0, 1, 2]
    assert watched.condition == pytest.approx(sum(conditions) / 3, rel=1e-6)
    assert watched.length == pytest.approx(length, rel=1e-10)


def test_the_fisher_part_is_that_of_the_diagonals():
    model, (x, y) = _mlp(), _data(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trace = sum(float(v.sum()) for v in fishopt.fisher_diagonal(model, x, LOSS, estimator="exact").values())
    joint = fishopt.joint_variance(model, x, LOSS, estimator="I1")
    watched = TrainingMonitor(model, LOSS, optimizer)
    _step(model, optimizer, x, y)
    (found,) = watched.history
    assert found.trace == pytest.approx(trace, rel=1e-10)
    assert found.label_variance == pytest.approx(12 * sum(float(v.sum()) for v in joint.label.values()), rel=1e-8)
    unbiased = 12 * 12 / 11
    assert found.input_variance == pytest.approx(unbiased * sum(float(v.sum()) for v in joint.input.values()), rel=1e-8)


def test_both_parts_of_a_variance_are_per_observation():
    """Inputs with labels at three positions each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x, y = torch.randn(8, 3, 2, dtype=torch.float64), torch.randint(0, 4, (8, 3))
    joint = fishopt.joint_variance(model, x, fishopt.Categorical(), estimator="I1")
    with TrainingMonitor(model, fishopt.Categorical(), torch.optim.SGD(model.parameters(), lr=0.1)) as watched:
        LOSS(model(x).flatten(0, 1), y.flatten()).backward()
        watched._optimizer.step()
    (found,) = watched.history
    label, spread = (24 * sum(float(v.sum()) for v in part.values()) for part in (joint.label, joint.input))
    assert found.label_variance == pytest.approx(label, rel=1e-8)
    assert found.input_variance == pytest.approx(8 / 7 * spread, rel=1e-8)


def test_one_row_of_several_tells_nothing_of_their_mean():
    assert gradient_moments(torch.tensor([[4.0]]), 1)[0] == 4.0
    assert all(math.isnan(value) for value in gradient_moments(torch.tensor([[4.0]]), 4))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.BCEWithLogitsLoss])
def test_the_rows_mean_is_the_training_gradient(kind, reduction):
    """Whatever the loss averages over."""
    model, (x, y) = _mlp(), _data()
    loss, targets = kind(reduction=reduction), nn.functional.one_hot(y, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watched = TrainingMonitor(model, loss, optimizer)
    _step(model, optimizer, x, targets, loss)
    square = sum(float(p.grad.square().sum()) for p in model.parameters())
    assert watched.history[0].gradient_square == pytest.approx(square, rel=1e-8)


def test_normalised_norms_are_over_the_root_of_the_batch():
    found = []
    for normalize in (False, True):
        model, (x, y) = _mlp(), _data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watched = TrainingMonitor(model, LOSS, optimizer, normalize=normalize)
        _step(model, optimizer, x, y)
        found.append(watched)
    plain, normalised = (watched.history[0] for watched in found)
    assert normalised.jacobian_norm == pytest.approx(plain.jacobian_norm / 24**0.5)
    assert found[1].length == pytest.approx(found[0].length / 24**0.5)
    assert normalised.condition == plain.condition


def test_groups_count_with_their_own_rates_and_what_is_not_trained_does_not():
    model, (x, y) = _mlp(), _data()
    first, bias, last = model[0].weight, model[0].bias, list(model[2].parameters())
    bias.requires_grad_(False)
    groups = [{"params": [first, bias], "lr": 0.3}, {"params": last[:1], "lr": 0.01}]  # the last bias in neither
    optimizer = torch.optim.SGD(groups)
    watched = TrainingMonitor(model, LOSS, optimizer)
    parts = [_rows(model, x, y, parameters=some) for some in ([first], last[:1])]
    _step(model, optimizer, x, y)
    scaled = torch.cat([0.3 * parts[0], 0.01 * parts[1]], dim=1)
    assert watched.length == pytest.approx(float(scaled.norm()) / 24, rel=1e-10)
    assert watched.history[0].jacobian_norm == pytest.approx(float(torch.cat(parts, dim=1).norm()), rel=1e-10)


def test_length_counts_each_steps_rate_and_batch_with_the_last_norm():
    model, (x, y) = _mlp(), _data(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    watched = TrainingMonitor(model, LOSS, optimizer, every=2)
    expected = 0.0
    for step, size in enumerate((8, 5, 12)):
        _step(model, optimizer, x[:size], y[:size])
        expected += 0.4 * 0.5**step / size * watched.history[-1].jacobian_norm
        scheduler.step()
    assert len(watched.history) == 2
    assert watched.steps == 3
    assert watched.length == pytest.approx(expected, rel=1e-12)


def test_of_a_large_batch_some_inputs_stand_for_all(monkeypatch):
    monkeypatch.setattr(monitor, "GRAM_INPUTS", 16)
    model, (x, y) = _mlp(), _data(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    j = _rows(model, x, y)
    for _ in range(100):
        _step(model, optimizer, x, y)
    norms, squares, variances = torch.tensor(
        [(m.jacobian_norm**2, m.gradient_square, m.gradient_variance) for m in watched.history], dtype=torch.float64
    ).T
    # Drawn without replacement: the finite population's factors make these expectations exact but for the square's.
    for values, expected in ((norms, j.square().sum()), (variances, j.var(0).sum())):
        assert abs(values.mean() - expected) < 4.5 * values.std() / 100**0.5
    assert abs(squares.mean() - j.mean(0).square().sum()) < 4.5 * squares.std() / 100**0.5
    assert squares.std() > 0
    assert {m.batch_size for m in watched.history} == {64}


# --- from a Gram matrix ---


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_condition_numbers_of_rows_of_different_length(scale):
    """In float32, where the products of the shortest rows are lost among those of the longest."""
    j = torch.randn(12, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    j[6:] *= scale
    e = torch.linalg.svdvals(j)
    single = j.float()
    assert condition_number(single @ single.T) == pytest.approx(float(e[0] / e[-1]), rel=1e-3)


def test_condition_numbers_leave_zeros_out():
    j = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([j, j[:3], torch.zeros(2, 40)])
    e = torch.linalg.svdvals(twice.double())
    assert condition_number(twice @ twice.T) == pytest.approx(float(e[0] / e[5]), rel=1e-3)
    assert condition_number(j[:1] @ j[:1].T) == 1
    assert math.isnan(condition_number(torch.zeros(3, 3)))


def test_moments_of_one_row():
    square, variance = gradient_moments(torch.full((1, 1), 4.0), 1)
    assert square == 4
    assert math.isnan(variance)
