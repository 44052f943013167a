"""The checks of torch's own optimizer suite: what is kept, saved, copied and added, closures, and hooks.

All of torch's checks are listed in test_torch_contract.py.
"""

import copy
import io
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fishopt
from tests.torch_contract_setup import _build, _closure, _linear, _same, _train, _weights, configured, each

# --- state ---


@each
def test_state_is_not_empty(info):
    model, optimizer = _build(info)
    assert not optimizer.state
    _train(model, optimizer, 1)
    for p in model.parameters():
        assert {"step", "exp_avg", "fisher", "preconditioner", "refreshes"} <= optimizer.state[p].keys()
        assert optimizer.state[p]["step"] == 1


@configured
def test_state_dict_is_deterministic(info, config):
    """Loaded in the middle into another on an equal model, which then does the same; saving changes nothing."""
    model, optimizer = _build(info, config)
    _train(model, optimizer)
    first = copy.deepcopy(optimizer.state_dict())
    assert str(first) == str(optimizer.state_dict())
    other, loaded = _build(info, config, copy.deepcopy(model))
    loaded.load_state_dict(first)
    assert str(loaded.state_dict()) == str(first)
    _train(model, optimizer)
    _train(other, loaded)
    assert _same(model.parameters(), other.parameters())
    # Groups' settings come with the state, and what an older file lacks stays away.
    for group in first["param_groups"]:
        group["lr"] = 0.125
        del group["maximize"]
    loaded.load_state_dict(first)
    assert loaded.param_groups[0]["lr"] == 0.125


@configured
def test_saved_is_loaded(info, config):
    model, optimizer = _build(info, config)
    _train(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert str(torch.load(file, weights_only=True)) == str(optimizer.state_dict())


@each
def test_a_step_count_saved_as_a_tensor_loads(info):
    model, optimizer = _build(info)
    _train(model, optimizer)
    other, loaded = copy.deepcopy((model, optimizer))
    state = copy.deepcopy(optimizer.state_dict())
    for kept in state["state"].values():
        kept["step"] = torch.tensor(float(kept["step"]))
    loaded.load_state_dict(state)
    _train(model, optimizer)
    _train(other, loaded)
    torch.testing.assert_close(_weights(model), _weights(other), rtol=1e-6, atol=0)


@configured
def test_deepcopy_copies_public_attributes(info, config):
    model, optimizer = _build(info, config)
    _train(model, optimizer)
    copied = copy.deepcopy(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(copied) if not name.startswith("_")} == public
    assert str(copied.state_dict()["param_groups"]) == str(optimizer.state_dict()["param_groups"])


@configured
def test_pickles(info, config):
    pair = _build(info, config)
    _train(*pair)
    other = pickle.loads(pickle.dumps(pair))
    _train(*pair)
    _train(*other)
    assert _same(pair[0].parameters(), other[0].parameters())


@configured
def test_prints(info, config):
    text = repr(_build(info, config)[1])
    assert text.startswith(info.name)
    assert "Parameter Group 0" in text
    assert all(key in text for key in config.kwargs if key not in {"refresh_every", "refresh_inputs"})


@each
def test_a_group_can_be_added(info):
    model = _linear()
    _, optimizer = _build(info, model=model, params=[model.weight])
    _train(model, optimizer)
    bias = model.bias.detach().clone()
    optimizer.add_param_group({"params": [model.bias]})
    assert optimizer.param_groups[1]["lr"] == optimizer.defaults["lr"]
    _train(model, optimizer)
    assert not torch.equal(bias, model.bias)


@each
def test_the_closures_loss_is_returned(info):
    model, optimizer = _build(info)
    seen = []

    def closure():
        assert torch.is_grad_enabled()
        seen.append(_closure(model, optimizer)())
        return seen[-1]

    assert optimizer.step(closure) is seen[0]
    assert len(seen) == 1
    _closure(model, optimizer)()
    assert optimizer.step() is None


# --- hooks ---


@each
def test_step_hooks(info):
    """The optimizer's own inside of the global ones, each called once, before and after the parameters move."""
    model, optimizer = _build(info)
    calls, start = [], _weights(model)

    def note(name):
        return lambda opt, args, kwargs: calls.append((name, opt is optimizer, _same(start, model.parameters())))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    closure = _closure(model, optimizer)
    closure()
    optimizer.step()
    order = [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    assert sorted(calls) == sorted((name, True, unmoved) for name, unmoved in order)
    assert [unmoved for _, _, unmoved in calls] == [True, True, False, False]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() is not None
    handle.remove()


@each
def test_state_dict_hooks(info):
    model, optimizer = _build(info)
    _train(model, optimizer, 1)
    seen = []
    pre = optimizer.register_state_dict_pre_hook(seen.append)
    post = optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    assert optimizer.state_dict()["note"] == 1
    assert seen == [optimizer]
    pre.remove()
    post.remove()
    assert "note" not in optimizer.state_dict()
    assert len(seen) == 1


@each
def test_load_state_dict_hooks(info):
    model, optimizer = _build(info)
    _train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    order = []

    def set_lr(lr):
        def hook(opt, given):
            order.append(lr)
            given["param_groups"] = [{**group, "lr": lr} for group in given["param_groups"]]
            return given

        return hook

    optimizer.register_load_state_dict_pre_hook(set_lr(0.002))
    optimizer.register_load_state_dict_pre_hook(set_lr(0.001), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: order.append(opt.param_groups[0]["lr"]))
    optimizer.load_state_dict(state)
    assert order == [0.001, 0.002, 0.002]
    assert state["param_groups"][0]["lr"] == optimizer.defaults["lr"]


@pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
def test_a_state_that_is_cleared_is_begun_anew(kind):
    """As `torch.optim` does it, in the next step."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = kind(model, loss_fn)
    for step in range(16):
        if step == 13:  # between two refreshes
            optimizer.state.clear()
        optimizer.zero_grad()
        loss_fn(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {3}


def test_what_wrappers_keep_in_the_state_keeps_its_type():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = fishopt.FisherAdam(model, loss_fn)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        optimizer.step()
        for p in model.parameters():
            optimizer.state[p].setdefault("mask", p > 0)
            optimizer.state[p].setdefault("count", torch.tensor(2**24 + 1))
    for p in model.parameters():
        assert optimizer.state[p]["mask"].dtype == torch.bool
        assert optimizer.state[p]["count"] == 2**24 + 1


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_numpy_numbers_are_numbers():
    """A scheduler's function may return them."""
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    options = {"lr": np.float32(0.5), "weight_decay": np.float32(0.1), "damping": np.float16(0.5), "clip": np.int64(2)}
    optimizer = fishopt.FisherAdam(model, loss_fn, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float32(0.5))
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    torch.load(_saved(optimizer.state_dict()), weights_only=True)
    assert type(optimizer.param_groups[0]["damping"]) is float
    with pytest.raises(ValueError, match=r"damping=Fraction\(1, 100\)"):
        fishopt.FisherAdam(model, loss_fn, damping=Fraction(1, 100))
    with pytest.raises(ValueError, match="lr="):
        fishopt.FisherAdam(model, loss_fn, lr=np.float32("nan"))
    with pytest.raises(ValueError, match="lr="):
        fishopt.FisherAdam(model, loss_fn, lr=np.bool_(True))
