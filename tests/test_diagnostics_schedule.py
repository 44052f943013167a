"""Schedules of batch sizes: each input once a pass, in stages or growing where the gradient is noisy."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fishopt.diagnostics import BatchSizeSchedule, TrainingMonitor, schedule
from fishopt.diagnostics.measures import Measurement, gradient_moments
from tests.diagnostics_setup import LOSS, _data, _mlp


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
