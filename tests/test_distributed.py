"""Several processes in DistributedDataParallel, by gloo: as one on all of their inputs, and safe where one fails."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import fishopt
from fishopt.optim.failures import MAX_FAILURES
from tests.asserts import assert_close, assert_unbiased, z_scores
from tests.ranks import gathered, run, worlds

KINDS = {"adam": fishopt.FisherAdam, "ngd": fishopt.DiagonalNGD}
FAST = {"adam": {"lr": 1e-2, "eps": 0.0}, "ngd": {"lr": 3e-2, "kl_radius": 1e-4}}
NEWEST = {"adam": {"betas": (0.9, 0.0)}, "ngd": {"decay": 0.0}}
ALL = 10**6
LOSSES = {
    "ce": (nn.CrossEntropyLoss, "mean"),
    "ce sum": (nn.CrossEntropyLoss, "sum"),
    "mse": (nn.MSELoss, "mean"),
    "mse sum": (nn.MSELoss, "sum"),
    "bce": (nn.BCEWithLogitsLoss, "mean"),
    "bce sum": (nn.BCEWithLogitsLoss, "sum"),
}
both = pytest.mark.parametrize("kind", KINDS)


def _loss(name):
    kind, reduction = LOSSES[name]
    return kind(reduction=reduction)


def _model(act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, 3)).double()


def _data(step, rank, loss="ce", count=6):
    """One process's batch."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    scores = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    if loss.startswith("ce"):
        return x, scores.argmax(1)
    return x, scores if loss.startswith("mse") else (scores > 0).double()


def _union(step, loss="ce", count=6):
    parts = [_data(step, rank, loss, count) for rank in range(dist.get_world_size())]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _optimizer(kind, model, loss, **options):
    return KINDS[kind](model, loss, **FAST[kind], **options)


def _step(model, optimizer, loss, batch):
    optimizer.zero_grad()
    loss(model(batch[0]), batch[1]).backward()
    optimizer.step()


def _plain(model):
    return {name.replace("module.", "").replace("_orig_mod.", ""): p.detach() for name, p in model.named_parameters()}


def _averages(optimizer, key="fisher"):
    return {name: optimizer.state[p][key] for p, name in optimizer._name_of.items() if p in optimizer.state}


def _assert_alike(model, optimizer):
    """Parameters and state are the same bit for bit in all processes."""
    own = [_plain(model), _averages(optimizer), _averages(optimizer, "preconditioner"), list(optimizer._moment)]
    own.append([optimizer._curvature.state_dict()[key] for key in ("noise", "choices", "history", "failures")])
    assert len({repr(_listed(one)) for one in gathered(own)}) == 1


def _listed(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else value


def _as_one(kind, loss, model, optimizer, other, reference):
    """A trained model is as one that was trained by one process on the union."""
    assert_close(_plain(model), _plain(other), rtol=1e-9)
    assert_close(_averages(optimizer), _averages(reference), rtol=1e-9)
    assert optimizer._moment.batch_size == reference._moment.batch_size
    # DistributedDataParallel has the mean over processes of what one process would have summed.
    share = dist.get_world_size() if loss.reduction == "sum" else 1
    assert optimizer._moment.scale * share == pytest.approx(reference._moment.scale, rel=1e-12)
    assert optimizer._moment.dispersion == pytest.approx(reference._moment.dispersion, rel=1e-9)


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


@worlds(2)
def test_processes_that_may_stop_early_are_refused():
    loss, rank = nn.CrossEntropyLoss(), dist.get_rank()
    model = DDP(_model())
    optimizer = _optimizer("adam", model, loss)
    with Join([model], enable=False), model.join(enable=False):
        model(_data(0, rank)[0])
    with model.join(throw_on_early_termination=True):
        model(_data(0, rank)[0])
    with pytest.raises(RuntimeError, match=r"model.join\(\).*same number of batches"), model.join():
        model(_data(0, rank)[0])
    assert optimizer._recorder.last.group is dist.group.WORLD


# --- failures ---


class Faulty(nn.Module):
    """Fails where curvature looks, in eval mode, as long as it is told to."""

    how = ""

    def forward(self, x):
        if not self.training and self.how == "raise":
            raise RuntimeError("out of order")
        return x * (float("nan") if not self.training and self.how == "nan" else 1.0)


def _faulty():
    model = DDP(nn.Sequential(*_model(), Faulty()).double())
    return model, model.module[-1]


@worlds(3)
@both
@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("first", [0, 5])
def test_a_failure_in_one_process(kind, how, first):
    """The others' estimate is everyone's, from the first step on or later; training never stops by it."""
    loss, rank, size = nn.CrossEntropyLoss(), dist.get_rank(), dist.get_world_size()
    model, fault = _faulty()
    optimizer = _optimizer(kind, model, loss, estimator="exact", refresh_inputs=ALL, **NEWEST[kind])
    for step in range(first):
        _step(model, optimizer, loss, _data(step, rank))
    fault.how = how if rank == size - 1 else ""
    with pytest.warns(RuntimeWarning, match=rf"on 1 of {size} processes.*The other processes'"):
        _step(model, optimizer, loss, _data(first, rank))
    for step in range(first + 1, 2 * MAX_FAILURES):
        x = torch.cat([_data(step, other)[0] for other in range(size - 1)])
        fine = copy.deepcopy(model.module).train()
        fine[-1].how = ""
        optimizer.refresh(_data(step, rank)[0])
        expected = fishopt.fisher_diagonal(fine, x, loss, estimator="exact")
        assert_close(_averages(optimizer), expected, rtol=1e-9)
        _step(model, optimizer, loss, _data(step, rank))
    assert optimizer._moment.batch_size == 6 * size
    assert optimizer.report().failures == 2 * MAX_FAILURES - first
    _assert_alike(model, optimizer)


@worlds(2)
def test_what_the_output_does_not_depend_on_is_everyones_though_one_fails():
    """The regularized parameter's estimate is made of its gradient, in the process that never saw the network too."""
    torch.manual_seed(0)
    model, rank = nn.Sequential(nn.Linear(4, 3), Faulty()).double(), dist.get_rank()
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model[1].how = "raise" if rank == 1 else ""

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net[1](self.net[0](x)) + 0 * self.net.extra.sum().detach(), self.net.extra.square().sum()

    wrapped, loss = DDP(Trained()), nn.CrossEntropyLoss()
    optimizer = fishopt.FisherAdam(wrapped, loss, output=0)
    for step in range(5):
        x, y = _data(step, rank)
        optimizer.zero_grad()
        h, penalty = wrapped(x)
        (loss(h, y) + penalty).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert _averages(optimizer)["net.extra"].all()
    _assert_alike(wrapped, optimizer)


@worlds(2)
def test_nan_inputs_in_one_process():
    loss, rank = nn.CrossEntropyLoss(), dist.get_rank()
    model = DDP(_model())
    optimizer = _optimizer("adam", model, loss)
    for step in range(8):
        x, y = _data(step, rank)
        if rank == 1 and step % 2 == 0:
            x[0] = float("nan")
        optimizer.zero_grad()
        loss(model(x), y).backward()
        for p in model.parameters():
            p.grad.nan_to_num_(0.0)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            optimizer.step()
    assert optimizer.report().failures == 4
    assert all(p.isfinite().all() for p in model.parameters())
    _assert_alike(model, optimizer)


@worlds(2)
def test_failures_everywhere_end_training_everywhere():
    loss, rank = nn.CrossEntropyLoss(), dist.get_rank()
    model, fault = _faulty()
    optimizer = _optimizer("adam", model, loss)
    _step(model, optimizer, loss, _data(0, rank))
    fault.how = ("raise", "nan")[rank]
    with pytest.warns(RuntimeWarning, match="The last good estimate stays in use"):
        optimizer.refresh(_data(0, rank)[0])
    for _ in range(MAX_FAILURES - 2):
        optimizer.refresh(_data(0, rank)[0])
    with pytest.raises(RuntimeError, match=f"{MAX_FAILURES} curvature refreshes in a row"):
        optimizer.refresh(_data(0, rank)[0])


@worlds(2)
@pytest.mark.parametrize("hows", [("raise", "nan"), ("nan", "raise"), ("raise", "raise")])
def test_what_does_not_fit_at_first_is_raised_everywhere(hows):
    loss, rank = nn.CrossEntropyLoss(), dist.get_rank()
    model, fault = _faulty()
    fault.how = hows[rank]
    optimizer = _optimizer("adam", model, loss)
    with pytest.raises((RuntimeError, ValueError), match="out of order"):
        _step(model, optimizer, loss, _data(0, rank))
    fault.how = ""
    _step(model, optimizer, loss, _data(0, rank))
    _assert_alike(model, optimizer)


# --- checkpoints ---


def _trained(kind, steps, loss="mse", start=0, resumed=None):
    """A model and its optimizer after some steps, each process's own seed; from a state if there is one."""
    model = DDP(_model(nn.Sigmoid))
    torch.manual_seed(dist.get_rank())
    optimizer = _optimizer(kind, model, _loss(loss), refresh_every=3)
    if resumed is not None:
        resumed(model, optimizer)
    for step in range(start, start + steps):
        _step(model, optimizer, _loss(loss), _data(step, dist.get_rank(), loss))
    return model, optimizer


def _save(kind, file):
    model, optimizer = _trained(kind, 20)
    if dist.get_rank() == 0:
        torch.save([model.module.state_dict(), optimizer.state_dict()], file)
    model, _ = _trained(kind, 40)
    if dist.get_rank() == 0:
        torch.save(_plain(model), f"{file}.end")


def _resume(kind, file):
    saved = torch.load(file, weights_only=True)

    def resumed(model, optimizer):
        model.module.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        _assert_alike(model, optimizer)
        assert [saved[1]["state"][i]["fisher"].tolist() for i in range(4)] == _listed([*_averages(optimizer).values()])
        assert len(optimizer._curvature.choices) == 2

    model, optimizer = _trained(kind, 20, start=20, resumed=resumed)
    assert optimizer._moment.batch_size == 6 * dist.get_world_size()
    assert optimizer.report().steps == 40
    _assert_alike(model, optimizer)
    if dist.get_world_size() == 2:
        assert_close(_plain(model), torch.load(f"{file}.end", weights_only=True), rtol=0, atol=0)


@both
def test_a_checkpoint_of_one_process_is_for_any_number(kind, tmp_path):
    """For as many as it came from, training goes on bit for bit."""
    file = str(tmp_path / "at.pt")
    run(2, _save, kind=kind, file=file)
    for size in (1, 2, 3):
        run(size, _resume, kind=kind, file=file)


def _states(model, optimizer, options=None):
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def _set(model, optimizer, states, options=None):
    set_model_state_dict(model, states["model"], options=options)
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)


def _save_distributed(kind, directory):
    dcp.save(_states(*_trained(kind, 20)), checkpoint_id=directory)
    model, _ = _trained(kind, 40)
    if dist.get_rank() == 0:
        torch.save(_plain(model), f"{directory}.end")


def _resume_distributed(kind, directory):
    def resumed(model, optimizer):
        states = _states(model, optimizer)
        dcp.load(states, checkpoint_id=directory)
        _set(model, optimizer, states)

    model, optimizer = _trained(kind, 20, start=20, resumed=resumed)
    assert optimizer.report().steps == 40
    _assert_alike(model, optimizer)
    if dist.get_world_size() == 2:
        assert_close(_plain(model), torch.load(f"{directory}.end", weights_only=True), rtol=0, atol=0)


@both
def test_a_distributed_checkpoint_is_for_any_number(kind, tmp_path):
    directory = str(tmp_path / "at")
    run(2, _save_distributed, kind=kind, directory=directory)
    for size in (2, 3):
        run(size, _resume_distributed, kind=kind, directory=directory)


OPTIONS = {
    "plain": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
}


@both
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("through_disk", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_functions_for_distributed_checkpoints(kind, how, through_disk, dtype, tmp_path):
    """A run resumed by them goes on bit for bit."""
    options, loss = StateDictOptions(**OPTIONS[how]), nn.MSELoss()

    def start():
        model = _model(nn.Sigmoid).to(dtype)
        return model, _optimizer(kind, model, loss, refresh_every=20)

    def go_on(model, optimizer, steps):
        for step in steps:
            x, y = _data(step, 0, "mse")
            _step(model, optimizer, loss, (x.to(dtype), y.to(dtype)))

    model, optimizer = start()
    go_on(model, optimizer, range(15))
    states = copy.deepcopy(_states(model, optimizer, options))
    go_on(model, optimizer, range(15, 45))
    other, resumed = start()
    if through_disk:
        dcp.save(states, checkpoint_id=tmp_path)
        states = _states(other, resumed, options)
        dcp.load(states, checkpoint_id=tmp_path)
    _set(other, resumed, states, options)
    assert [group.keys() for group in resumed.param_groups] == [group.keys() for group in optimizer.param_groups]
    go_on(other, resumed, range(15, 45))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert len(resumed._curvature.history) == 2
    states = [one.state_dict()["state"] for one in (optimizer, resumed)]
    assert len({str([(key, sorted(own.items())) for key, own in sorted(state.items())]) for state in states}) == 1


@both
def test_room_for_a_checkpoint_changes_nothing(kind):
    """Asking a new optimizer for its state neither counts as a step nor shows in training."""
    runs = []
    for asked in (False, True):
        model = _model()
        optimizer = _optimizer(kind, model, nn.MSELoss())
        if asked:
            state = get_optimizer_state_dict(model, optimizer)
            assert {name: own["refreshes"] for name, own in state["state"].items()} == dict.fromkeys(_plain(model), 0)
            assert optimizer.report().steps == 0
        for step in range(12):
            _step(model, optimizer, nn.MSELoss(), _data(step, 0, "mse"))
        runs.append((_plain(model), optimizer))
    assert_close(runs[0][0], runs[1][0], rtol=0, atol=0)
    assert runs[1][1].report().steps == 12
    _refuses_a_step_before_any_forward(kind)


def _refuses_a_step_before_any_forward(kind):
    """As ever, where it is meant: with a learning rate, or with gradients."""
    for rate, gradient in ((0.0, 1.0), (0.1, 0.0)):
        model = _model()
        optimizer = KINDS[kind](model, nn.MSELoss(), lr=rate)
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        with pytest.raises(ValueError, match="before any forward"):
            optimizer.step()


# --- what is spread over processes ---


def _sharded(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def _sharded_in_part(model):
    _sharded(model[2])
    return model


def _in_parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _flat(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def _flat_in_part(model):
    model[2] = _flat(model[2])
    return model


SHARDED = {
    "fully_shard": (_sharded, "'0.weight'"),
    "fully_shard, in part": (_sharded_in_part, "'2.weight'"),
    "tensor parallel": (_in_parallel, "'0.weight'"),
    "FullyShardedDataParallel": (_flat, "'_flat_param'"),
    "FullyShardedDataParallel, in part": (_flat_in_part, "'2._flat_param'"),
}


@worlds(2)
@pytest.mark.parametrize("how", SHARDED)
def test_sharded_parameters_are_refused(how):
    """When the optimizer is built, and at the next refresh where the model was sharded afterwards."""
    shard, name = SHARDED[how]
    message = rf"model parameter {name} is spread over processes.*DistributedDataParallel instead"
    with pytest.raises(TypeError, match=message):
        fishopt.FisherAdam(shard(_model()), nn.CrossEntropyLoss())
    model = _model()
    optimizer = _optimizer("adam", model, nn.CrossEntropyLoss())
    x, y = _data(0, 0)
    _step(model, optimizer, nn.CrossEntropyLoss(), (x, y))
    shard(model)
    with pytest.raises(TypeError, match=message):
        optimizer.refresh(x)


@worlds(2)
def test_data_parallelism_of_a_part_is_refused():
    with pytest.raises(TypeError, match=r"model part '1' is in DistributedDataParallel.*wrap it as a whole"):
        fishopt.FisherAdam(nn.Sequential(nn.Linear(4, 4), DDP(nn.Linear(4, 3))), nn.CrossEntropyLoss())
