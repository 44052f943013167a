"""Schedule-free averaging: which of y and x the parameters hold when."""

import contextlib
import copy
import signal
import sys

import pytest
import torch
from torch import nn

import fishopt
from tests.schedule_free_setup import X, _backward, _evaluate, _network, _offset, _same, _start, _train, _values

# --- what the parameters hold ---


def test_calls_put_in_what_they_are_for():
    model, optimizer = _start()
    _train(model, optimizer, 8)
    y = _values(model)
    with torch.no_grad():
        model(X)
    assert _same(_values(model), y)
    out = _evaluate(model)
    x = _values(model)
    assert not any(map(torch.equal, x, y))
    assert torch.equal(_evaluate(model), out)
    assert _same(_values(model), x)  # for model.state_dict()
    model(X)
    assert _same(_values(model), y)
    _evaluate(model)
    with torch.no_grad():
        model(X)  # in training mode
    assert _same(_values(model), y)
    _evaluate(model)
    model.eval()
    model(X)  # with gradients, as where a part is fine-tuned
    assert _same(_values(model), y)
    with torch.inference_mode():
        assert torch.equal(model(X), out)
    assert _same(_values(model), x)
    assert not any(state["y"].is_inference() for state in optimizer.state.values())  # they go into checkpoints
    optimizer.train()
    assert _same(_values(model), y)
    optimizer.eval()
    assert _same(_values(model), x)


def test_what_was_asked_for_stays_until_training():
    """Statistics of BatchNorm are taken in training mode, saliency with gradients: both of the average, once asked."""
    model, optimizer = _start()
    _train(model, optimizer, 8)
    y = _values(model)
    optimizer.eval()
    x = _values(model)
    with torch.no_grad():
        model(X)
    assert _same(_values(model), x)
    model.eval()(X)
    assert _same(_values(model), x)
    model.train()(X)
    assert _same(_values(model), y)
    _evaluate(model)
    optimizer.eval()
    model.eval()(X)
    assert _same(_values(model), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_hand", [False, True])
def test_evaluation_leaves_training_alone(by_hand, dtype):
    runs = []
    for evaluates in (False, True):
        model, optimizer = _start(_network(dtype))
        for step in range(30):
            _train(model, optimizer, 1, step)
            if evaluates and by_hand:
                optimizer.eval()
                model.eval()(X.to(dtype))
                model.train()
                if step % 2:
                    optimizer.train()
            elif evaluates:
                _evaluate(model)
        optimizer.train()
        runs.append([*_values(model), *(optimizer.state[p]["exp_avg"] for p in model.parameters())])
        assert all("y" not in optimizer.state[p] for p in model.parameters())
    assert _same(*runs)


@pytest.mark.parametrize("how", ["step", "refresh", "closure"])
def test_a_step_is_made_from_y(how):
    """Also where gradients are those of the average, which the call before was made at."""
    model, optimizer = _start()
    _train(model, optimizer, 15)
    other, same = copy.deepcopy((model, optimizer))
    optimizer.eval()
    _backward(model.eval(), optimizer, 15)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    if how == "refresh":
        optimizer.refresh(X)
        same.refresh(X)
    if how == "closure":
        other.eval()
        optimizer.step(lambda: _backward(model, optimizer, 15))
        same.step(lambda: _backward(other, same, 15))
    else:
        optimizer.step()
        same.step()
    assert _same(_values(model), _values(other))
    assert optimizer.state_dict()["fishopt"]["holds"] == "trained"


def test_what_is_loaded_in_evaluation_is_trained_on():
    model, optimizer = _start()
    _train(model, optimizer, 12)
    y = _values(model)
    _evaluate(model)
    with torch.no_grad():
        model[0].weight[0] = 3.0
    x = _values(model)
    optimizer.train()
    e = _offset(optimizer.state[model[0].weight]).float()
    assert torch.equal(model[0].weight[1:], y[0][1:])
    torch.testing.assert_close(model[0].weight[0], 3 + (1 - 0.9) * e[0])
    optimizer.eval()
    for p, old in zip(model.parameters(), x, strict=True):
        torch.testing.assert_close(p.detach(), old)


def test_nothing_happens_when_it_is_off():
    model, optimizer = _start(schedule_free=False)
    assert not model._forward_pre_hooks
    _train(model, optimizer, 5)
    before = _values(model)
    optimizer.eval()
    _evaluate(model)
    optimizer.train()
    assert _same(_values(model), before)
    assert {*optimizer.state[model[0].weight]} == {"step", "refreshes", "exp_avg", "fisher", "preconditioner", "energy"}


def test_before_the_first_step_there_is_one_point():
    model, optimizer = _start()
    before = _values(model)
    _evaluate(model)
    optimizer.eval()
    assert _same(_values(model), before)
    _train(model, optimizer, 1)
    y = _values(model)
    _evaluate(model)
    assert _same(_values(model), y)  # the average of one


def test_a_group_added_later_is_watched():
    model = _network()
    _, optimizer = _start(model, params=[*model[0].parameters()], schedule_free=False)
    optimizer.add_param_group({"params": model[2].parameters(), "schedule_free": True})
    _train(model, optimizer, 5)
    y = _values(model)
    _evaluate(model)
    assert [torch.equal(p, old) for p, old in zip(model.parameters(), y, strict=True)] == [True, True, False, False]


# --- errors on the way ---


@pytest.mark.parametrize("at", ["clone", "add", "where"])
def test_lack_of_memory_in_a_switch_changes_nothing(monkeypatch, at):
    model, optimizer = _start()
    _train(model, optimizer, 5)
    y = _values(model)
    if at in ("add", "where"):
        optimizer.eval()
    before = _values(model)
    holder = torch.Tensor if at == "clone" else torch
    real, calls = getattr(holder, at), []

    def failing(*args, **kwargs):
        calls.append(at)
        if len(calls) == 3:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, at, failing)
    with pytest.raises(MemoryError):
        (optimizer.train if at in ("add", "where") else optimizer.eval)()
    monkeypatch.undo()
    assert _same(_values(model), before)
    optimizer.train()
    assert _same(_values(model), y)


def test_an_interrupted_switch_is_whole():
    """At each line of it: what the parameters hold is what the optimizer says, and y is not lost."""
    model, optimizer = _start()
    _train(model, optimizer, 5)
    y = _values(model)
    optimizer.eval()
    x = _values(model)
    optimizer.train()
    seen = set()
    for switch in ("eval", "train"):
        for line in range(1, 300, 2):
            before = optimizer.state_dict()["fishopt"]["holds"]
            with contextlib.suppress(KeyboardInterrupt):
                _interrupted_at(line, getattr(optimizer, switch))
            holds = optimizer.state_dict()["fishopt"]["holds"]
            seen.add((switch, before, holds))
            assert _same(_values(model), y if holds == "trained" else x), (switch, line)
            (optimizer.train if switch == "eval" else optimizer.eval)()
    asked = "average, asked for"
    assert seen >= {("eval", "trained", end) for end in ("trained", asked)}
    assert seen >= {("train", asked, end) for end in ("trained", asked)}


def _interrupted_at(line, function):
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if "/fishopt/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("before", [False, True])
def test_it_cannot_be_changed_in_training(before):
    """Momentum would be taken for the offset of an average, or the other way round; nothing changes."""
    model = nn.Linear(3, 2)
    optimizer = fishopt.FisherAdam(model, "categorical", schedule_free=before)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.ones(4, 3)), torch.zeros(4).long()).backward()
        optimizer.step()

    optimizer.param_groups[0]["schedule_free"] = not before
    optimizer.param_groups[0]["schedule_free"] = before
    step()
    optimizer.param_groups[0]["schedule_free"] = not before
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['schedule_free'\]={not before} was changed after"):
        step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), kept, rtol=0, atol=0)
    optimizer.param_groups[0]["schedule_free"] = before
    step()
