"""Several processes, of which some fail; and what is refused, as no process could go on with it."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import fishopt
from fishopt.optim.failures import MAX_FAILURES
from tests.asserts import assert_close
from tests.distributed_setup import ALL, NEWEST, _assert_alike, _averages, _data, _model, _optimizer, _step, both
from tests.ranks import worlds

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


# --- what is refused ---


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
