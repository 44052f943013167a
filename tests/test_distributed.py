"""Several processes in DistributedDataParallel, by gloo: as one on all of their inputs, and alike."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import fishopt
from tests.asserts import assert_close, assert_unbiased, z_scores
from tests.distributed_setup import (
    ALL,
    LOSSES,
    NEWEST,
    _as_one,
    _assert_alike,
    _averages,
    _data,
    _loss,
    _model,
    _optimizer,
    _step,
    _union,
    both,
)
from tests.ranks import gathered, worlds

# --- as one process ---


@worlds(2, 3)
@both
def test_equals_one_process_on_the_union(kind):
    for family in LOSSES:
        loss = _loss(family)
        model, other = DDP(_model()), _model()
        options = {"estimator": "exact", "refresh_inputs": ALL, "refresh_every": 4}
        optimizer, reference = _optimizer(kind, model, loss, **options), _optimizer(kind, other, loss, **options)
        for step in range(15):
            _step(model, optimizer, loss, _data(step, dist.get_rank(), family))
            _step(other, reference, loss, _union(step, family))
        _as_one(kind, loss, model, optimizer, other, reference)
        _assert_alike(model, optimizer)


@worlds(2)
@pytest.mark.parametrize("family", ["ce", "mse", "mse sum"])
def test_micro_batches_without_sync(family):
    loss = _loss(family)
    model, other = DDP(_model()), _model()
    options = {"estimator": "exact", "refresh_inputs": ALL, "refresh_every": 4}
    optimizer, reference = _optimizer("adam", model, loss, **options), _optimizer("adam", other, loss, **options)
    for step in range(13):
        optimizer.zero_grad()
        reference.zero_grad()
        for micro in range(2):
            x, y = _data(100 * micro + step, dist.get_rank(), family)
            model.require_backward_grad_sync = micro == 1  # as model.no_sync() has it
            (loss(model(x), y) / 2).backward()
            x, y = _union(100 * micro + step, family)
            (loss(other(x), y) / 2).backward()
        optimizer.step()
        reference.step()
    assert optimizer._moment.batch_size == 24
    _as_one("adam", loss, model, optimizer, other, reference)
    _assert_alike(model, optimizer)


@worlds(2)
def test_micro_batches_of_which_processes_have_different_numbers():
    """Added up, not averaged: the gradient's scale is theirs on average, and the same for all."""
    loss = nn.CrossEntropyLoss()
    model = DDP(_model())
    optimizer = _optimizer("adam", model, loss)
    with model.no_sync():
        for micro in range(dist.get_rank()):
            x, y = _data(micro, dist.get_rank())
            loss(model(x), y).backward()
    for micro in range(2):
        with model.no_sync() if micro == 0 else torch.enable_grad():
            x, y = _data(50 + micro, dist.get_rank())
            loss(model(x), y).backward()
    optimizer.step()
    assert optimizer._moment.scale == 2.5
    _assert_alike(model, optimizer)


@worlds(2, 3)
@both
def test_uneven_batches_count_by_their_observations(kind):
    loss, counts = nn.CrossEntropyLoss(), [7, 2, 4][: dist.get_world_size()] if dist.is_initialized() else []
    model = DDP(_model())
    optimizer = _optimizer(kind, model, loss, estimator="exact", refresh_inputs=ALL)
    batches = [_data(0, rank, count=count) for rank, count in enumerate(counts)]
    x = torch.cat([batch[0] for batch in batches])
    expected = fishopt.fisher_diagonal(_model(), x, loss, estimator="exact")
    _step(model, optimizer, loss, batches[dist.get_rank()])
    decay = optimizer._decay(optimizer.param_groups[0])
    assert_close({k: v / (1 - decay) for k, v in _averages(optimizer).items()}, expected, rtol=1e-10)
    assert optimizer._moment.batch_size == len(x)
    for step in range(1, 15):
        _step(model, optimizer, loss, _data(step, dist.get_rank(), count=counts[dist.get_rank()]))
    _assert_alike(model, optimizer)


@worlds(2)
def test_labels_that_do_not_count():
    """Sequences, of which the processes have different numbers of labels that count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(2, 4, 6, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (2, 4, 6))
    y[0, :, 4:], y[1, 1:, 1:] = -100, -100
    loss = nn.CrossEntropyLoss()
    expected = fishopt.fisher_diagonal(
        model, x.flatten(0, 1), fishopt.Categorical(dim=-1), estimator="exact", targets=y.flatten(0, 1)
    )
    model, rank = DDP(model), dist.get_rank()
    optimizer = _optimizer("adam", model, loss, estimator="exact", refresh_inputs=ALL, betas=(0.9, 0.0))
    optimizer.zero_grad()
    loss(model(x[rank]).flatten(0, 1), y[rank].flatten()).backward()
    optimizer.step()
    assert_close(_averages(optimizer), expected, rtol=1e-10)
    assert optimizer._moment.batch_size == int((y != -100).sum())
    _assert_alike(model, optimizer)


@worlds(2)
@both
def test_a_branch_that_one_process_takes(kind):
    """The others' estimate of it is zero, and counts."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.own = nn.ModuleList(nn.Linear(4, 3) for _ in range(3)).double()

        def forward(self, x):
            return self.own[2](x) + (self.own[0](x) if x[0, 0] > 0 else 0)

    loss, rank = nn.CrossEntropyLoss(), dist.get_rank()
    model = DDP(Branches(), find_unused_parameters=True)
    optimizer = _optimizer(kind, model, loss, estimator="exact", refresh_inputs=ALL, **NEWEST[kind])
    for step in range(12):
        x, y = _data(step, rank)
        x[:, 0] = x[:, 0].abs() if rank == 0 else -x[:, 0].abs()
        before = copy.deepcopy(model.module)
        _step(model, optimizer, loss, (x, y))
        if step < 10:
            expected = gathered(fishopt.fisher_diagonal(before, x, loss, estimator="exact"))
            found = _averages(optimizer)
            assert found.keys() == {f"own.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")}
            assert_close(found, {name: (expected[0][name] + expected[1][name]) / 2 for name in found}, rtol=1e-9)
    assert not expected[1]["own.0.weight"].any()
    assert expected[0]["own.0.weight"].any()
    _assert_alike(model, optimizer)


# --- alike, though each has its own ---


@worlds(3)
@both
@pytest.mark.parametrize("family", ["ce", "mse"])
def test_processes_stay_alike(kind, family):
    """Choices, estimates and parameters, though inputs, labels and seeds are each one's own."""
    loss, rank = _loss(family), dist.get_rank()
    model = DDP(_model(nn.Sigmoid))
    torch.manual_seed(rank)
    optimizer = _optimizer(kind, model, loss, refresh_every=5)
    for step in range(40):
        _step(model, optimizer, loss, _data(step, rank, family))
    assert [entry["step"] for entry in optimizer._curvature.history] == [0, 32] or len(
        optimizer._curvature.history
    ) == 2
    likelihood = "gaussian" if family == "mse" else "categorical"
    own = fishopt.select_estimators(model, _data(39, rank, family)[0], likelihood, criterion="efficiency")
    assert len(set(map(repr, gathered(own)))) == dist.get_world_size()  # each for itself would have chosen by others
    _assert_alike(model, optimizer)


@worlds(2)
def test_each_process_draws_its_own_labels():
    """The variance is that of one label for each input of each process, the same inputs here."""
    size, loss = dist.get_world_size(), nn.CrossEntropyLoss()
    model, (x, _) = DDP(_model()), _data(0, 0)
    optimizer = _optimizer("adam", model, loss, estimator="I1", refresh_inputs=ALL, betas=(0.9, 0.0))
    exact = fishopt.fisher_diagonal(model, x, loss, estimator="exact")
    variance = fishopt.label_variance(model, x, loss, estimator="I1")
    scores = []
    for _ in range(300):
        optimizer.refresh(x)
        variances = {name: v / (size * len(x)) for name, v in variance.items()}
        scores.append(z_scores(copy.deepcopy(_averages(optimizer)), exact, variances))
    assert_unbiased(torch.stack(scores))
    _assert_alike(model, optimizer)


@worlds(2)
def test_each_process_draws_its_own_rows():
    model, rank = DDP(_model()), dist.get_rank()
    optimizer = _optimizer("adam", model, nn.CrossEntropyLoss(), estimator="exact", refresh_inputs=1)
    seen = []
    optimizer._curvature._estimated = lambda some, *rest, inner=optimizer._curvature._estimated: (
        seen.append(some.rows.tolist()) or inner(some, *rest)
    )
    for step in range(10):
        _step(model, optimizer, nn.CrossEntropyLoss(), _data(step, rank))
    assert len(seen) == 10
    first, second = gathered(seen)
    assert first != second


# --- how models are wrapped ---

WRAPPED = {
    "first": lambda model, build: (wrapped := DDP(model), build(wrapped)),
    "after the optimizer": lambda model, build: (build(model), DDP(model))[::-1],
    "first, the optimizer on what is inside": lambda model, build: (DDP(model), build(model)),
    "static graph": lambda model, build: (wrapped := DDP(model, static_graph=True), build(wrapped)),
    "unused parameters": lambda model, build: (wrapped := DDP(model, find_unused_parameters=True), build(wrapped)),
    "gradients as views": lambda model, build: (wrapped := DDP(model, gradient_as_bucket_view=True), build(wrapped)),
    "compiled inside": lambda model, build: (wrapped := DDP(_compiled(model)), build(wrapped)),
    "compiled outside": lambda model, build: (wrapped := _compiled(DDP(model)), build(wrapped)),
    "compiled outside, the optimizer inside": lambda model, build: (_compiled(DDP(model)), build(model)),
}


def _compiled(model):
    return torch.compile(model, backend="eager")


@worlds(2)
@pytest.mark.parametrize("how", WRAPPED)
def test_wrapping(how):
    warnings.simplefilter("default")  # torch.compile's own
    loss = nn.MSELoss()
    options = {"estimator": "exact", "refresh_inputs": ALL}
    model, optimizer = WRAPPED[how](_model(), lambda model: _optimizer("adam", model, loss, **options))
    other = _model()
    reference = _optimizer("adam", other, loss, **options)
    for step in range(12):
        _step(model, optimizer, loss, _data(step, dist.get_rank(), "mse"))
        _step(other, reference, loss, _union(step, "mse"))
    _as_one("adam", loss, model, optimizer, other, reference)
    _assert_alike(model, optimizer)


@worlds(2)
def test_a_model_without_data_parallelism_is_left_alone():
    """One process trains, another waits: any meeting would be a deadlock."""
    if dist.get_rank() == 0:
        model, loss = _model(), nn.CrossEntropyLoss()
        optimizer = _optimizer("adam", model, loss)
        for step in range(12):
            _step(model, optimizer, loss, _data(step, 0))
        optimizer.refresh(_data(0, 0)[0])
        assert optimizer._moment.batch_size == 6


@worlds(2)
def test_other_forwards_change_nothing():
    """Evaluation and a penalty on what is inside, in one process or in all."""
    loss, rank = nn.CrossEntropyLoss(), dist.get_rank()
    model = DDP(_model())
    optimizer = _optimizer("adam", model.module, loss)
    for step in range(12):
        x, y = _data(step, rank)
        if rank == 0:
            model.module(x)
        optimizer.zero_grad()
        penalty = 0 * model.module(x).square().mean()  # first, so that its backward is the last
        (loss(model(x), y) + penalty).backward()
        if rank == 1:
            model.module(x)
        optimizer.step()
    _assert_alike(model, optimizer)


@worlds(2)
def test_refresh_by_hand_is_everyones():
    loss, rank = nn.CrossEntropyLoss(), dist.get_rank()
    model = DDP(_model())
    for built_on in (model, model.module):
        optimizer = _optimizer("adam", built_on, loss, estimator="exact", betas=(0.9, 0.0))
        if built_on is model.module:  # which is not known to be shared before
            _step(model, optimizer, loss, _data(1, rank))
        optimizer.refresh(_data(0, rank)[0])
        expected = fishopt.fisher_diagonal(model, _union(0)[0], loss, estimator="exact")
        assert_close(_averages(optimizer), expected, rtol=1e-10)


@worlds(2)
def test_copies_go_on():
    loss, rank = nn.MSELoss(), dist.get_rank()
    model = DDP(_model())
    optimizer = _optimizer("adam", model, loss)
    for step in range(3):
        _step(model, optimizer, loss, _data(step, rank, "mse"))
    copied, other = copy.deepcopy((model, optimizer))
    assert other._recorder.last.group is dist.group.WORLD
    for step in range(3, 12):
        for pair in ((model, optimizer), (copied, other)):
            _step(*pair, loss, _data(step, rank, "mse"))
    assert all(map(torch.equal, model.parameters(), copied.parameters()))
    _assert_alike(copied, other)
