"""Checkpoints of several processes are for any number of them."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from tests.asserts import assert_close
from tests.distributed_setup import (
    KINDS,
    _assert_alike,
    _averages,
    _data,
    _listed,
    _loss,
    _model,
    _optimizer,
    _plain,
    _step,
    both,
)
from tests.ranks import run


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
