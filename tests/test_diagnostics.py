"""What is watched in training: against its definition, and without a trace in what is trained."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishopt
from fishopt.diagnostics import BatchSizeSchedule, TrainingMonitor, condition_number, measures, monitor, schedule
from fishopt.diagnostics.measures import Measurement, gradient_moments
from fishopt.plotting import Characterised, plot_characterisation
from tests.examples import loaded

LOSS = nn.CrossEntropyLoss()


def _mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def _data(count=24, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=dtype), torch.randint(3, (count,), generator=generator)


def _rows(model, x, y, loss=LOSS, parameters=None):
    """J by definition: a backward for each input."""
    parameters = list(model.parameters()) if parameters is None else parameters
    found = []
    for one, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(loss(model(one[None]), label[None]), parameters)
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


def _step(model, optimizer, x, y, loss=LOSS):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


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


# --- nothing is changed ---


class _Noisy(nn.Module):
    """Draws from torch's generator in eval mode too."""

    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


def _random_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), _Noisy(), nn.Linear(8, 3)
    ).double()


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "FisherAdam": lambda model: fishopt.FisherAdam(model, LOSS),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:the curvature of")
def test_training_is_the_same_to_the_bit(name):
    found = []
    for is_watched in (False, True):
        model, (x, y) = _random_net(), _data()
        optimizer = OPTIMIZERS[name](model)
        watched = TrainingMonitor(model, LOSS, optimizer, every=2) if is_watched else None

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        for _ in range(5):
            if name == "LBFGS":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append([*model.state_dict().values(), torch.get_rng_state(), *(p.grad for p in model.parameters())])
        if watched is not None:
            assert len(watched.history) == 3
            assert watched.failures == 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_closures_are_measured_where_the_step_starts():
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    before = float(_rows(model, x, y).norm())

    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure=closure), LOSS(_mlp()(x), y))
    assert [one.jacobian_norm for one in watched.history] == [pytest.approx(before, rel=1e-10)]
    assert watched.history[0].batch_size == 24


def test_failures_are_warned_of_once_and_training_goes_on():
    class Fragile(nn.Module):
        def forward(self, x):
            if not self.training and self.fails:
                raise RuntimeError("not in eval mode")
            return x

    model, (x, y) = _mlp(), _data()
    fragile = model.append(Fragile())[-1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    fragile.fails = True
    with pytest.warns(RuntimeWarning, match="measurement of TrainingMonitor failed: .*not in eval mode"):
        _step(model, optimizer, x, y)
    for _ in range(2):
        _step(model, optimizer, x, y)  # a warning would be an error
    assert watched.failures == watched.steps == 3
    assert watched.history == []
    assert watched.length == 0
    assert math.isnan(watched.condition)
    fragile.fails = False
    _step(model, optimizer, x, y)
    assert len(watched.history) == 1
    assert watched.length > 0


def test_a_step_without_a_backward_is_a_failure():
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    with pytest.warns(RuntimeWarning, match="before any backward"):
        optimizer.step()
    assert watched.failures == 1


# --- what the batch is ---


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("place", ["first", "before backward", "last"])
def test_the_batch_under_orders_of_zero_grad(place, to_none):
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    for size in (4, 9, 7):
        if place == "first":
            optimizer.zero_grad(to_none)
        loss = LOSS(model(x[:size]), y[:size])
        if place == "before backward":
            optimizer.zero_grad(to_none)
        loss.backward()
        optimizer.step()
        if place == "last":
            optimizer.zero_grad(to_none)
    assert [one.batch_size for one in watched.history] == [4, 9, 7]


def test_what_was_thrown_away_does_not_count():
    """As in a GAN, where the generator's loss goes backward through the discriminator."""
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    LOSS(model(x[:6]), y[:6]).backward()
    with torch.no_grad():
        model(x)
    model(x)  # no backward
    _step(model, optimizer, x[6:10], y[6:10])
    assert watched.history[0].batch_size == 4
    assert watched.history[0].jacobian_norm == pytest.approx(float(_rows(_mlp(), x[6:10], y[6:10]).norm()), rel=1e-10)


def test_batches_of_steps_that_are_not_measured():
    """In micro-batches, with what was thrown away, twice backward, and by keyword."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _mlp()

        def forward(self, *, x):
            return {"logits": self.inner(x)}["logits"]

    model, (x, y) = Named(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=10)
    LOSS(model(x=x), y).backward()
    optimizer.step()
    norm, expected = watched.history[0].jacobian_norm, watched.length
    optimizer.zero_grad()
    LOSS(model(x=x[:9]), y[:9]).backward()
    optimizer.zero_grad()
    for rows in (slice(0, 4), slice(4, 7)):
        loss = LOSS(model(x=x[rows]), y[rows])
        loss.backward(retain_graph=True)
        loss.backward()
    with torch.no_grad():
        model(x=x)
    optimizer.step()
    expected += 0.1 / 7 * norm
    assert watched.length == pytest.approx(expected, rel=1e-12)
    optimizer.step()  # on no input
    assert watched.length == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("divisor", [3, 1])
def test_micro_batches_are_one_batch(divisor):
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    optimizer.zero_grad()
    for part in range(3):
        rows = slice(8 * part, 8 * part + 8)
        (LOSS(model(x[rows]), y[rows]) / divisor).backward()
    square = sum(float(p.grad.square().sum()) for p in model.parameters())
    optimizer.step()
    (found,) = watched.history
    assert found.batch_size == 24
    assert found.gradient_square == pytest.approx(square, rel=1e-8)


def test_a_scaled_loss_is_seen_through():
    found = []
    for scale in (1.0, 1024.0):
        model, (x, y) = _mlp(), _data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watched = TrainingMonitor(model, LOSS, optimizer)
        (LOSS(model(x), y) * scale).backward()
        for p in model.parameters():
            p.grad /= scale  # as GradScaler.unscale_ does
        optimizer.step()
        found.append(watched.history[0])
    assert found[0] == found[1]


def test_positions_that_are_ignored_do_not_count():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    y = torch.randint(3, (6, 4))
    y[0, 1:] = y[3, :2] = -100
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, fishopt.Categorical(dim=-1), optimizer)
    exact = fishopt.fisher_diagonal(model, x, fishopt.Categorical(dim=-1), estimator="exact", targets=y)
    loss(model(x).flatten(0, 1), y.flatten()).backward()
    square = sum(float(p.grad.square().sum()) for p in model.parameters())
    optimizer.step()
    assert watched.history[0].gradient_square == pytest.approx(square, rel=1e-8)
    assert watched.history[0].trace == pytest.approx(sum(float(v.sum()) for v in exact.values()), rel=1e-8)


def test_many_outputs_leave_the_fisher_part_out(monkeypatch):
    monkeypatch.setattr(monitor, "COLUMN_LIMIT", 2)
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer)
    _step(model, optimizer, x, y)
    assert watched.failures == 0
    assert math.isnan(watched.history[0].trace)
    assert watched.history[0].condition > 1


# --- coming and going ---


def test_detaching_leaves_nothing_behind():
    model, (x, y) = _mlp(), _data()
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    with TrainingMonitor(model, loss, optimizer, every=1) as watched:
        _step(model, optimizer, x, y, loss)
    watched.detach()
    watched.detach()
    _step(model, optimizer, x, y, loss)
    assert watched.steps == len(watched.history) == 1
    for owner in (model, loss):
        assert not owner._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_copy_of_the_model_is_not_watched():
    model, (x, y) = _mlp(), _data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = TrainingMonitor(model, LOSS, optimizer, every=1)
    other = copy.deepcopy(model)
    LOSS(other(x), y).backward()
    _step(model, optimizer, x[:7], y[:7])
    assert watched.history[0].batch_size == 7


class _Wrong(nn.Module):
    def forward(self, x, y):
        return x.sum()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model=3"),
        ({"loss_fn": _Wrong()}, ValueError, "_Wrong"),
        ({"optimizer": "sgd"}, TypeError, "optimizer='sgd'"),
        ({"model": nn.Linear(5, 3)}, ValueError, "group 0 holds a parameter that is not model's"),
        ({"every": 0}, ValueError, "every=0"),
        ({"every": 2.5}, ValueError, "every=2.5"),
        ({"normalize": 1}, TypeError, "normalize=1"),
        ({"generator": 3}, TypeError, "generator=3"),
    ],
)
def test_refusals(change, error, message):
    model = _mlp()
    arguments = {"model": model, "loss_fn": LOSS, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)} | change
    with pytest.raises(error, match=message):
        TrainingMonitor(**arguments)
    assert not model._forward_hooks


def test_a_group_without_a_learning_rate_is_refused():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": None})

    model = _mlp()
    with pytest.raises(ValueError, match="group 0 has lr=None"):
        TrainingMonitor(model, LOSS, Own(model.parameters()))


# --- schedules ---


def test_stages_share_the_passes():
    batches = BatchSizeSchedule(60, sizes=(5, 10), epochs=3, generator=torch.Generator().manual_seed(0))
    sizes = []
    for _ in range(3):
        expected = len(batches)
        listed = list(batches)
        assert len(listed) == expected
        assert sorted(row for rows in listed for row in rows) == list(range(60))
        sizes.append([len(rows) for rows in listed])
    assert sizes == [[5] * 12, [5] * 6 + [10] * 3, [10] * 6]
    assert batches.seen == 180
    assert batches.size == 10


def test_the_last_batch_is_no_small_one():
    def of(count):
        return [len(rows) for rows in BatchSizeSchedule(count, sizes=[16], epochs=1)]

    assert of(35) == [16, 19]
    assert of(39) == [16, 23]
    assert of(40) == [16, 16, 8]
    assert of(3) == [3]


def test_it_is_a_batch_sampler():
    x, y = _data(40)
    orders = []
    for _ in range(2):
        batches = BatchSizeSchedule(40, sizes=(4, 8), epochs=1, generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(x, y), batch_sampler=batches)
        assert len(loader) == 8
        orders.append([len(part) for part, _ in loader])
    assert orders[0] == orders[1] == [4, 4, 4, 4, 4, 8, 8, 4]


def _measured(step, batch_size, variance, square=1.0):
    return Measurement(step, 0.1, batch_size, 1.0, 1.0, square, variance, 1.0, 1.0, 1.0)


def test_batches_grow_where_the_gradient_is_noisy():
    model = _mlp()
    watched = TrainingMonitor(model, LOSS, torch.optim.SGD(model.parameters(), lr=0.1))
    batches = BatchSizeSchedule(100, sizes=(4, 8, 16), monitor=watched)
    assert (batches.size, len(batches)) == (4, 25)
    # With |g|^2 = 1 the noise scale is V / (1 - V / 4), which is 8 at V = 8 / 3.
    low, high = _measured(0, 4, 2.5), _measured(0, 4, 2.7)
    watched.history += 7 * [high]
    assert batches.size == 4  # not enough of them
    watched.history += 9 * [low]
    assert batches.size == 4  # the mean of all 16 is below
    watched.history += 7 * [high]
    assert batches.size == 4  # those that were used do not count again
    watched.history += [high]
    assert batches.size == 8
    assert batches.size == 8
    watched.history += 8 * [_measured(0, 8, 16 / 3 - 0.1)]  # V / (1 - V / 8) < 16
    assert batches.size == 8
    watched.history += 8 * [_measured(0, 8, 16 / 3 + 0.1)]
    assert batches.size == 16
    watched.history += 20 * [_measured(0, 16, 1e3)]
    assert batches.size == 16


def test_larger_batches_pay_up_to_the_noise_scale():
    torch.manual_seed(0)
    gradient = torch.zeros(50, dtype=torch.float64)
    gradient[0] = 1.25  # noise scale: 50 / 1.5625 = 32
    measured = []
    for _ in range(400):
        j = gradient + torch.randn(12, 50, dtype=torch.float64)
        square, variance = gradient_moments(j @ j.T, 12)
        measured.append(_measured(0, 12, variance, square))
    assert schedule._pays(measured, 28)
    assert not schedule._pays(measured, 36)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": 0}, ValueError, "count=0"),
        ({"sizes": ()}, ValueError, "sizes=()"),
        ({"sizes": (4, 0)}, ValueError, "sizes=0"),
        ({"sizes": 16}, ValueError, "sizes=16"),
        ({"sizes": "16"}, ValueError, "sizes='16'"),
        ({"sizes": (8, 4)}, ValueError, "shrink"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"epochs": None}, ValueError, "epochs=None and monitor=None"),
        ({"epochs": None, "monitor": 3}, TypeError, "monitor=3"),
        ({"generator": 1}, TypeError, "generator=1"),
    ],
)
def test_refusals_of_schedules(change, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        BatchSizeSchedule(**({"count": 10, "epochs": 1} | change))


# --- what is shown ---


def test_a_picture_of_runs(tmp_path):
    runs = [Characterised(lr, size, 10.0 * size, lr / size, 0.1 * lr) for lr in (0.1, 0.2) for size in (8, 16)]
    path = plot_characterisation([*runs, Characterised(0.3, 8, 5.0, 1.0, 0.0)], tmp_path / "runs.png")
    assert path.stat().st_size > 10_000


@pytest.fixture(scope="module")
def characterising():
    return loaded("characterising")


def test_the_example(characterising, tmp_path, capsys):
    threads = torch.get_num_threads()
    characterising.main(["--quick", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(str((tmp_path / "characterising.png").resolve()))
    checks = [line for line in printed.splitlines() if line.rstrip().endswith(("yes  │", "NO   │"))]
    assert len([line for line in checks if "row" in line or "inputs" in line or "watched" in line]) == 6
    assert all("yes" in line for line in checks if "L_K falls" not in line and "C_k rises" not in line)
    for name in ("16", "64", "256", "stages", "automatic"):
        assert f"│ {name} " in printed


def test_the_benchmark():
    from benchmarks.monitor import ratios

    pace, found = ratios(every=3, blocks=2)
    assert pace == 3
    assert len(found) == 2
    assert all(0 < ratio < math.inf for ratio in found)


def test_warnings_are_errors_here():
    """Or the tests above that count warnings could not fail."""
    with pytest.raises(UserWarning, match="seen"):
        warnings.warn("seen", UserWarning, stacklevel=1)
    assert measures.Measurement is Measurement
