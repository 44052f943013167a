"""A run goes on through lack of memory and errors in a refresh; or stops with the cause."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.curvature import NO_MEMORY
from fishopt.optim.failures import MAX_FAILURES, is_lack_of_memory
from tests.survival_setup import _kept, _spoil_eval, _start, _step, _steps, both, when

# --- memory ---

ERRORS = {
    "a device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "Python": MemoryError(),
    "the CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tri"
    ),
    "a library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}
of_memory = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


class Small:
    """Memory for so many inputs at a time."""

    def __init__(self, most, error):
        self.most, self.error, self.sizes = most, error, []

    def __deepcopy__(self, memo):
        return self

    def __call__(self, h):
        self.sizes.append(len(h))
        if len(h) > self.most:
            raise self.error
        return h


@both
@when
@of_memory
def test_without_the_memory_for_a_refresh_half_of_it_is_made(kind, after, error):
    """And half of that. Neither a failure nor worth a warning."""
    model, optimizer = _start(kind, steps=after, estimator="hutchinson")
    model.in_eval = Small(5, error)
    _step(model, optimizer, after)
    assert [n for n in model.in_eval.sizes if n > 3][-3:] == [16, 8, 4]  # after what the ways are tried on
    assert optimizer.report().failures == 0
    assert optimizer.report().rows[0].refreshes == after + 1


@pytest.mark.filterwarnings("ignore:the curvature of")
@pytest.mark.filterwarnings("ignore:A curvature refresh failed")
@pytest.mark.parametrize("most", [12, 6])
def test_a_network_that_runs_at_one_batch_size_alone_never_sees_fewer(most):
    """Not in a selection, which looks at eight inputs of others, and not where there is too little memory."""

    class WrittenIn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.sizes, self.small = nn.Linear(3, 2), [], None

        def forward(self, x):
            self.sizes.append(len(x))
            if self.small is not None:
                self.small(x)
            return self.a(x.view(12, 3))

    model = WrittenIn()
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), refresh_every=1)
    x, y = torch.randn(12, 3), torch.randint(0, 2, (12,))
    for step in range(4):
        model.small = Small(most, MemoryError()) if step == 3 else None
        if step == 3 and most < 12:
            model.small = None  # training has the memory, the copy that a refresh runs has not
            optimizer._curvature._shadow.module.small = Small(most, MemoryError())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        model.sizes.clear()
        optimizer.step()
    report = optimizer.report()
    assert len(report.history) == 1
    assert report.failures == (1 if most < 12 else 0)


@both
@of_memory
def test_without_the_memory_for_any_refresh_training_goes_on(kind, error):
    model, optimizer = _start(kind, steps=12)
    before = [p.detach().clone() for p in model.parameters()]
    model.in_eval = Small(0, error)
    with pytest.warns(RuntimeWarning, match=r"refresh failed: .*The last good estimate stays in use") as caught:
        _steps(model, optimizer, range(12, 15))
    assert len(caught) == 1
    assert optimizer.report().failures == 3
    assert not any(map(torch.equal, before, model.parameters()))
    _steps(model, optimizer, range(15, 12 + MAX_FAILURES - 1))
    with pytest.raises(RuntimeError, match="10 curvature refreshes in a row") as raised:
        _step(model, optimizer, 99)
    assert is_lack_of_memory(raised.value.__cause__)


@both
@of_memory
def test_without_the_memory_for_the_first_refresh_parameters_wait(kind, error):
    model, optimizer = _start(kind)
    before = [p.detach().clone() for p in model.parameters()]
    model.in_eval = Small(0, error)
    with pytest.warns(RuntimeWarning, match="There is none yet: parameters stay as they are"):
        _step(model, optimizer, 0)
    assert all(map(torch.equal, before, model.parameters()))
    model.in_eval = None
    _step(model, optimizer, 1)
    assert not any(map(torch.equal, before, model.parameters()))


def _selecting(monkeypatch, most, error):
    """Memory for so many inputs in a selection."""
    from fishopt.optim import curvature

    choose, sizes = curvature.choose, []

    def limited(batch, *args, **options):
        sizes.append(len(batch))
        if len(batch) > most:
            raise error
        return choose(batch, *args, **options)

    monkeypatch.setattr(curvature, "choose", limited)
    return sizes


@both
@of_memory
def test_without_the_memory_for_a_selection_fewer_inputs_choose(kind, error, monkeypatch):
    sizes = _selecting(monkeypatch, 2, error)
    _, optimizer = _start(kind, steps=1)
    assert sizes == [8, 4, 2]
    assert optimizer.report().failures == 0
    assert "backward passes:" in optimizer.report().rows[0].reason
    assert optimizer.report().rows[0].refreshes == 1


@both
@of_memory
def test_without_the_memory_for_any_selection_training_goes_on(kind, error, monkeypatch):
    """By what was chosen before; the next one is tried when it is due."""
    with monkeypatch.context() as patch:
        sizes = _selecting(patch, 0, error)
        model, optimizer = _start(kind, steps=3)
        assert sizes == [8, 4, 2, 1]
        assert [(row.estimator, row.reason) for row in optimizer.report().rows] == [("I1", NO_MEMORY)] * 2
    _steps(model, optimizer, range(3, 34))
    chosen = optimizer.report().rows
    assert "backward passes:" in chosen[0].reason
    sizes = _selecting(monkeypatch, 0, error)
    _steps(model, optimizer, range(34, 70))
    assert sizes == [8, 4, 2, 1]
    assert [row.reason for row in optimizer.report().rows] == [row.reason for row in chosen]
    assert optimizer.report().failures == 0
    assert optimizer.report().rows[0].refreshes == 70


@both
@pytest.mark.parametrize("is_memory", [True, False])
def test_a_failed_attempt_is_let_go_of_at_once(kind, is_memory):
    """Its activations would take the memory that the next one needs, if they waited for the garbage collector."""
    model, optimizer = _start(kind, steps=12)
    held = []

    def act(h):
        assert not any(ref() is not None for ref in held)
        kept = h * 2.0
        held.append(weakref.ref(kept))
        if len(h) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory") if is_memory else ZeroDivisionError("not now")
        return h

    gc.collect()
    gc.disable()
    try:
        model.in_eval = act
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _step(model, optimizer, 12)
        assert len(held) > 1
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()
    assert optimizer.report().failures == (not is_memory)


# --- errors of the user's code ---


def _raising(error):
    def act(*_):
        raise error

    return act


@both
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyError("mine"), AssertionError("mine")], ids=repr)
def test_an_error_in_the_model_at_the_first_refresh_is_told(kind, error):
    """It may be that curvature can never be computed; training is not to hide that."""
    model, optimizer = _start(kind)
    model.in_eval = _raising(error)
    before = _kept(model, optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model could not be run.*mine") as raised:
            _step(model, optimizer, 0)
        assert raised.value.__cause__ is error
    assert _kept(model, optimizer) == before
    model.in_eval = None
    _step(model, optimizer, 0)
    assert optimizer.report().failures == 0


@both
def test_an_error_in_the_model_later_is_survived(kind):
    model, optimizer = _start(kind, steps=12)
    before = [p.detach().clone() for p in model.parameters()]
    model.in_eval = _raising(ZeroDivisionError("mine"))
    with pytest.warns(RuntimeWarning, match=r"mine.*The last good estimate stays in use") as caught:
        _steps(model, optimizer, range(12, 15))
    assert len(caught) == 1
    assert not any(map(torch.equal, before, model.parameters()))
    model.in_eval = None
    _step(model, optimizer, 15)
    assert optimizer._curvature.failures == (3, 0, True)
    model.in_eval = _raising(ZeroDivisionError("mine"))
    _steps(model, optimizer, range(MAX_FAILURES - 1))
    with pytest.raises(RuntimeError, match=r"10 curvature refreshes in a row.*mine") as raised:
        _step(model, optimizer, 0)
    assert "mine" in str(raised.value.__cause__)


@both
@when
@pytest.mark.parametrize("where", ["pre", "post"])
def test_an_error_in_a_hook_on_steps(kind, after, where):
    """Before the step nothing has happened; after it the step has."""
    model, optimizer = _start(kind, steps=after)
    handle = getattr(optimizer, f"register_step_{where}_hook")(_raising(ZeroDivisionError("mine")))
    with pytest.raises(ZeroDivisionError):
        _step(model, optimizer, after)
    handle.remove()
    if where == "pre":
        _step(model, optimizer, after)
    assert _kept(model, optimizer) == _kept(*_start(kind, steps=after + 1))


@both
@when
@pytest.mark.parametrize("where", ["model", "output", "activation", "parameter"])
def test_an_error_in_a_hook_on_the_model(kind, after, where):
    """In the forward or backward of training: the same batch may be tried again."""
    model, optimizer = _start(kind, steps=after)
    fail = _raising(ZeroDivisionError("mine"))
    if where == "model":
        handle = model.register_forward_hook(fail)
    elif where == "output":
        handle = model.register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    elif where == "activation":
        handle = model.last.register_full_backward_hook(fail)
    else:
        handle = model.first.weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        _step(model, optimizer, after)
    handle.remove()
    _step(model, optimizer, after)
    assert _kept(model, optimizer) == _kept(*_start(kind, steps=after + 1))


@both
@when
def test_an_error_in_a_closure(kind, after):
    model, optimizer = _start(kind, steps=after)
    before = _kept(model, optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(_raising(ZeroDivisionError("mine")))
    assert _kept(model, optimizer) == before
    _step(model, optimizer, after)
    assert _kept(model, optimizer) == _kept(*_start(kind, steps=after + 1))


@both
@when
def test_warnings_as_errors_leave_the_step_undone(kind, after):
    """Whoever wants it so: all or nothing, and nothing is counted."""
    model, optimizer = _start(kind, steps=after)
    before = _kept(model, optimizer)
    model.in_eval = _spoil_eval(math.nan)
    with pytest.raises(RuntimeWarning):
        _step(model, optimizer, after)
    assert _kept(model, optimizer) == before
    assert optimizer.report().failures == 0
    model.in_eval = None
    _step(model, optimizer, after)
    assert _kept(model, optimizer) == _kept(*_start(kind, steps=after + 1))
