"""Schedule-free averaging: copies, checkpoints and wrapped models go on as the original."""

import copy
import functools
import gc
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import gathered, worlds
from tests.schedule_free_setup import X, _evaluate, _network, _same, _start, _through_a_file, _train, _values

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "optimizer first": lambda pair: copy.deepcopy(pair[::-1])[::-1],
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("evaluated", [False, True])
def test_copies_go_on(how, evaluated):
    model, optimizer = _start()
    _train(model, optimizer, 15)
    if evaluated:
        _evaluate(model)
    other, copied = COPIES[how]((model, optimizer))
    before = _values(model)
    _train(other, copied, 10, 15)
    _evaluate(other)
    assert _same(_values(model), before)
    _train(model, optimizer, 10, 15)
    _evaluate(model)
    assert _same(_values(model), _values(other))


def test_a_copy_of_the_model_alone_is_left_alone():
    model, optimizer = _start()
    _train(model, optimizer, 5)
    other = copy.deepcopy(model)
    before = _values(other), _values(model)
    _evaluate(other)
    assert (_same(_values(other), before[0]), _same(_values(model), before[1])) == (True, True)
    del optimizer
    gc.collect()
    assert not model._forward_pre_hooks
    _evaluate(model)
    assert _same(_values(model), before[1])


@pytest.mark.parametrize("holds", ["trained", "average", "average, asked for"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_bit_for_bit(holds, dtype):
    model, optimizer = _start(_network(dtype))
    _train(model, optimizer, 15)
    if holds == "average":
        _evaluate(model)
    elif holds != "trained":
        optimizer.eval()
    saved = _through_a_file([model.state_dict(), optimizer.state_dict()])
    assert saved[1]["fishopt"]["holds"] == holds
    # The options are the file's, so a plain one takes it up.
    other, resumed = _start(_network(dtype), schedule_free=False)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    ends = []
    for one, its in ((model, optimizer), (other, resumed)):
        with torch.no_grad():
            out = one(X.to(dtype))  # y, unless the average was asked for
        _train(one, its, 10, 15)
        ends.append([out, *_values(one), _evaluate(one), *_values(one)])
    assert _same(*ends)


def test_a_file_without_what_was_trained():
    """As `torch.distributed.checkpoint` leaves it: y follows from x and the offset, to rounding."""
    model, optimizer = _start(_network(torch.float64))
    _train(model, optimizer, 15)
    y = _values(model)
    optimizer.eval()
    saved = _through_a_file([model.state_dict(), optimizer.state_dict()])
    for state in saved[1]["state"].values():
        del state["y"]
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.train()
    for p, old in zip(model.parameters(), y, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=1e-13, atol=1e-14)


def test_a_file_beside_a_model_of_another_moment():
    """What the model holds already is not put back once more."""
    model, optimizer = _start()
    _train(model, optimizer, 15)
    y = _values(model)
    optimizer.eval()
    saved = _through_a_file(optimizer.state_dict())
    optimizer.train()
    optimizer.load_state_dict(saved)
    optimizer.train()
    assert _same(_values(model), y)


def test_a_file_from_before_goes_on_as_it_was():
    """Its averages are of gradients."""
    model, optimizer = _start(schedule_free=False)
    _train(model, optimizer, 5)
    file = _through_a_file(optimizer.state_dict())
    file["fishopt"]["version"] = 2
    del file["fishopt"]["holds"], file["param_groups"][0]["schedule_free"]
    other, resumed = _start(copy.deepcopy(model))
    resumed.load_state_dict(file)
    assert resumed.param_groups[0]["schedule_free"] is False
    for one in ((model, optimizer), (other, resumed)):
        _train(*one, 5, 5)
        _evaluate(one[0])
    assert _same(_values(model), _values(other))


def test_a_state_of_before_there_was_a_stretch_goes_on():
    """It held z - x itself."""
    runs = []
    for is_old in (False, True):
        model, optimizer = _start(_network(torch.float64))
        _train(model, optimizer, 12)
        saved = optimizer.state_dict()
        if is_old:
            for state in saved["state"].values():
                state["exp_avg"] = state["exp_avg"] / -state.pop("stretch")
        model, optimizer = _start(model)
        optimizer.load_state_dict(saved)
        optimizer.eval()
        average = _values(model)
        optimizer.train()
        _train(model, optimizer, 8, 12)
        runs.append([*average, *_values(model)])
    for old, new in zip(*runs, strict=True):
        torch.testing.assert_close(old, new, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["fishopt"].update(holds="z"), "holds='z'"),
        (lambda s: s["state"][0].update(y=torch.zeros(2)), r"'0.weight': y of shape \(2,\)"),
        (lambda s: s["state"][1].update(averaged=-1), "'0.bias': averaged=-1"),
        (lambda s: s["state"][1].update(lr_max=-1.0), r"'0.bias': lr_max=-1\.0"),
        (lambda s: s["state"][1].update(stretch=0.0), r"'0.bias': stretch=0\.0"),
        (lambda s: s["state"][1].update(stretch=math.nan), "'0.bias': stretch=nan"),
        (lambda s: s["param_groups"][0].update(schedule_free="yes"), "schedule_free='yes'"),
    ],
)
def test_a_damaged_file_changes_nothing(damage, message):
    model, optimizer = _start()
    _train(model, optimizer, 5)
    optimizer.eval()
    saved = _through_a_file(optimizer.state_dict())
    damage(saved)
    optimizer.train()
    y = _values(model)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(saved)
    assert _same(_values(model), y)
    assert optimizer.state_dict()["fishopt"]["holds"] == "trained"


@pytest.mark.parametrize("order", ["optimizer of the compiled", "compiled after", "data parallel"])
def test_wrapped_models(order):
    """Called by the wrapper or without it."""
    torch.compiler.reset()
    model = _network()
    wrap = nn.DataParallel if order == "data parallel" else functools.partial(torch.compile, backend="eager")
    if order == "compiled after":
        _, optimizer = _start(model)
        wrapped = wrap(model)
    else:
        wrapped, optimizer = _start(wrap(model))
    _train(wrapped, optimizer, 5)
    y = _values(model)
    out = _evaluate(wrapped)
    x = _values(model)
    assert not _same(x, y)
    assert torch.equal(_evaluate(model), out)
    wrapped(X)
    assert _same(_values(model), y)
    _evaluate(model)
    assert _same(_values(model), x)
    model(X)
    assert _same(_values(model), y)


@worlds(2)
def test_one_process_evaluates():
    """Without the others, and without the wrapper."""
    wrapped = DistributedDataParallel(model := _network(torch.float64))
    _, optimizer = _start(wrapped)
    for step in range(12):
        _train(wrapped, optimizer, 1, 2 * step + dist.get_rank())
        if dist.get_rank() == 0:
            _evaluate(model)
    wrapped.eval()
    with torch.no_grad():
        wrapped(X.double())
    values = [p.tolist() for p in model.parameters()]
    assert all(value == values for value in gathered(values))
    assert optimizer.state_dict()["fishopt"]["holds"] == "average"
