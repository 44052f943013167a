"""Schedule-free averaging where others write the parameters: weights that are loaded, newer optimizers, exports."""

import copy

import pytest
import torch

from tests.schedule_free_setup import X, _evaluate, _offset, _same, _start, _train, _values


def _best():
    model, optimizer = _start()
    _train(model, optimizer, 8)
    out = _evaluate(model)
    best = copy.deepcopy(model.state_dict())
    _train(model, optimizer, 12, start=8)
    return model, optimizer, best, out


def test_weights_that_are_restored_are_evaluated_as_they_are():
    model, optimizer, best, out = _best()
    model.load_state_dict(best)
    assert torch.equal(_evaluate(model), out)
    assert _same(_values(model), best.values())
    model(X)  # training goes on from them
    assert _same(_values(model), best.values())
    _train(model, optimizer, 1, start=20)
    y = _values(model)
    _evaluate(model)  # an average again
    for p, before in zip(model.parameters(), y, strict=True):
        torch.testing.assert_close((before - p).double(), 0.1 * _offset(optimizer.state[p]), atol=1e-6, rtol=1e-4)


def test_loads_of_nothing_or_of_a_part_leave_the_rest_alone():
    model, optimizer = _start()
    _train(model, optimizer, 8)
    y = _values(model)
    for some in ({}, {"2.bias": model[2].bias.detach().clone()}, model.state_dict()):
        model.load_state_dict(some, strict=False)
        model(X)
        assert _same(_values(model), y)
    x = [p - 0.1 * _offset(optimizer.state[p]).float() for p in model.parameters()]
    _train(model, optimizer, 1, start=8)
    y = _values(model)
    model.load_state_dict({"2.bias": torch.zeros(3)}, strict=False)
    _evaluate(model)
    assert not model[2].bias.any()
    assert not torch.equal(model[0].weight, y[0])
    assert not torch.equal(model[0].weight, x[0])


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_checkpoint_is_loaded_in_either_order(first, evaluated):
    model, optimizer = _start()
    _train(model, optimizer, 8)
    if evaluated:
        _evaluate(model)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other, resumed = _start()
    _train(other, resumed, 3)
    for name in sorted(saved, reverse=first == "optimizer"):
        {"model": other, "optimizer": resumed}[name].load_state_dict(saved[name])
    for one, its in ((model, optimizer), (other, resumed)):
        _train(one, its, 8, start=8)
        _evaluate(one)
    assert _same(_values(model), _values(other))


def test_loads_after_a_resumed_run_has_gone_on():
    model, optimizer, best, out = _best()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(model, optimizer, 4)
    model.load_state_dict(best)
    assert torch.equal(_evaluate(model), out)


@pytest.mark.parametrize("wraps", [False, True])
def test_a_newer_optimizer_has_the_parameters(wraps):
    model, older = _start()
    wrapped = torch.compile(model, backend="eager") if wraps else model
    if wraps:
        _, older = _start(wrapped)
    _train(wrapped, older, 8)
    _, newer = _start(model)
    assert older._switch is None
    _train(model, newer, 8)
    out = _evaluate(model)
    alone, first = _start()
    _train(alone, first, 8)
    del first
    _, second = _start(alone)
    _train(alone, second, 8)
    assert torch.equal(out, _evaluate(alone))
    assert older.report().steps == 8


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["export", "trace"])
def test_a_switch_does_not_become_a_part_of_what_is_exported(how):
    def exported(model):
        if how == "export":
            return torch.export.export(model, (X,)).module()
        return torch.jit.trace(model, (X,), check_trace=False)

    model, optimizer = _start()
    _train(model, optimizer, 8)
    y = _values(model)
    model.eval()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"call optimizer.eval\(\) first"):
            exported(model)
        assert _same(_values(model), y)
        optimizer.eval()
        out = model(X)
        found = exported(model)
        for _ in range(2):
            torch.testing.assert_close(found(X), out)
    torch.testing.assert_close(model(X), out)
