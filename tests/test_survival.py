"""A run goes on through bad numbers, lack of memory and errors in a refresh; or stops with the cause."""

import gc
import math
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.curvature import NO_MEMORY
from fishopt.optim.failures import MAX_FAILURES, is_lack_of_memory
from fishopt.optim.gradients import MAX_SKIPPED

both = pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
LOSSES = {"ce": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}
AFTER = {"at the first step": 0, "in the middle": 12}
when = pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)


class Model(nn.Module):
    """Does what it is told to between its layers, in training or, as curvature sees it, in eval mode."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.in_training = self.in_eval = None

    def forward(self, x):
        h = self.first(x).tanh()
        act = self.in_training if self.training else self.in_eval
        return self.last(h if act is None else act(h))


def _start(kind, loss="ce", steps=0, **options):
    torch.manual_seed(0)
    model = Model()
    optimizer = kind(model, LOSSES[loss], **{"refresh_every": 1, **options})
    for step in range(steps):
        _step(model, optimizer, step, loss)
    return model, optimizer


def _batch(step, loss="ce"):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1) if loss == "ce" else x[:, :3].clone()


def _step(model, optimizer, step, loss="ce", spoil=lambda x, y: None, before=lambda: None):
    x, y = _batch(step, loss)
    spoil(x, y)
    optimizer.zero_grad()
    LOSSES[loss](model(x), y).backward()
    before()
    optimizer.step()


def _steps(model, optimizer, steps):
    for step in steps:
        _step(model, optimizer, step)


def _kept(model, optimizer):
    """Parameters, averages and preconditioners."""
    state = [{k: v for k, v in s.items() if k != "step"} for s in optimizer.state.values()]
    return [p.tolist() for p in model.parameters()], [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in s.items()} for s in state
    ]


def _fill(value, *places):
    def spoil(x, y):
        for tensor in [(x, y)[place] for place in places]:
            tensor[3, ...] = value

    return spoil


# --- gradients ---


def _in_a_gradient(value):
    def spoil(model):
        model.last.weight.grad[1, 1] = value

    return spoil


BAD_BATCHES = {
    "inputs": (_fill(math.nan, 0), None),
    "infinite inputs": (_fill(math.inf, 0), None),
    "targets": (_fill(math.nan, 1), None),
    "infinite targets": (_fill(-math.inf, 1), None),
    "one gradient": (lambda x, y: None, _in_a_gradient(math.nan)),
    "one infinite gradient": (lambda x, y: None, _in_a_gradient(-math.inf)),
}


@both
@when
@pytest.mark.parametrize("what", BAD_BATCHES)
def test_a_step_with_bad_gradients_is_skipped(kind, after, what):
    """Nothing is spoilt by it: the run is the one without this batch."""
    spoil, in_gradients = BAD_BATCHES[what]
    model, optimizer = _start(kind, "mse", after)
    before = _kept(model, optimizer)
    with pytest.warns(RuntimeWarning, match=r"gradient of '.*NaN or infinite. The step is skipped") as caught:
        _step(model, optimizer, 99, "mse", spoil, lambda: in_gradients and in_gradients(model))
    assert len(caught) == 1
    assert _kept(model, optimizer) == before
    _step(model, optimizer, 99, "mse", spoil, lambda: in_gradients and in_gradients(model))
    report = optimizer.report()
    assert (report.steps, report.skipped, report.failures) == (after, 2, 0)
    assert "skipped for their gradients: 2" in str(report)
    other, without = _start(kind, "mse", after)
    for step in range(after, after + 15):
        _step(model, optimizer, step, "mse")
        _step(other, without, step, "mse")
    assert _kept(model, optimizer) == _kept(other, without)


@both
@when
def test_many_such_steps_in_a_row_stop_training(kind, after):
    model, optimizer = _start(kind, steps=after)
    bad = _in_a_gradient(math.nan)
    with pytest.warns(RuntimeWarning, match=re.escape("'last.weight' is NaN")):
        _step(model, optimizer, 0, before=lambda: bad(model))
    for _ in range(MAX_SKIPPED - 2):
        _step(model, optimizer, 0, before=lambda: bad(model))
    _step(model, optimizer, 0)
    for _ in range(MAX_SKIPPED - 1):
        _step(model, optimizer, 0, before=lambda: bad(model))
    before = _kept(model, optimizer)
    with pytest.raises(RuntimeError, match=r"10 steps in a row were skipped.*'last.weight'.*Lower lr"):
        _step(model, optimizer, 0, before=lambda: bad(model))
    assert _kept(model, optimizer) == before
    _step(model, optimizer, 0)  # whoever catches it may go on


@both
def test_finite_gradients_whose_sum_is_not_are_taken(kind):
    model, optimizer = _start(kind)
    _step(model, optimizer, 0, before=lambda: model.first.weight.grad.fill_(1e38))
    assert optimizer.report().skipped == 0
    assert optimizer.report().steps == 1


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_any_dtype_are_looked_at(kind, dtype):
    """Also next to others, and where the norm of finite ones does not fit into their dtype."""
    model, optimizer = _start(kind)
    model.last.to(dtype)
    model.in_training = model.in_eval = Cast(dtype)
    for bad in (False, True):
        model(_batch(0)[0]).float().square().sum().backward()
        model.last.weight.grad.fill_(3e4)
        model.first.weight.grad[0, 0] = math.nan if bad else 0.0
        if bad:
            with pytest.warns(RuntimeWarning, match="'first.weight' is NaN"):
                optimizer.step()
        else:
            optimizer.step()
    assert (optimizer.report().steps, optimizer.report().skipped) == (1, 1)


class Cast(nn.Module):
    """To half precision in training; curvature's copy of the layer is in float32."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, h):
        return h.to(self.dtype) if self.training else h


@both
def test_skipped_steps_are_in_checkpoints_and_copies(kind):
    model, optimizer = _start(kind)
    with pytest.warns(RuntimeWarning, match="skipped"):
        _step(model, optimizer, 0, before=lambda: _in_a_gradient(math.nan)(model))
    _, other = _start(kind)
    other.load_state_dict(optimizer.state_dict())
    assert other.report().skipped == 1


@both
@when
def test_a_scaler_looks_by_itself(kind, after):
    """Overflows are its daily business: neither warned of nor counted."""
    model, optimizer = _start(kind, steps=after)
    before = _kept(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(MAX_SKIPPED + 1):
        x, y = _batch(0)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        model.last.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.report().skipped == 0
    assert _kept(model, optimizer) == before


# --- numbers in a refresh ---


def _spoilt_estimate(monkeypatch):
    from fishopt.optim import curvature

    def spoilt(*args, **options):
        found = estimate(*args, **options)
        found["first.weight"][0, 0] = math.nan
        return found

    estimate = curvature.estimate
    monkeypatch.setattr(curvature, "estimate", spoilt)


def _spoil_eval(value):
    def act(h):
        return h + torch.zeros_like(h).index_fill_(1, torch.tensor([2]), value)

    return act


REFRESHES = {
    "activations": lambda model, patch: setattr(model, "in_eval", _spoil_eval(math.nan)),
    "infinite activations": lambda model, patch: setattr(model, "in_eval", _spoil_eval(math.inf)),
    "the estimate": lambda model, patch: _spoilt_estimate(patch),
}


@both
@pytest.mark.parametrize("what", REFRESHES)
def test_a_refresh_with_bad_numbers_in_the_middle(kind, what, monkeypatch):
    """The step is made with the last good estimate."""
    model, optimizer = _start(kind, steps=12)
    preconditioners = [optimizer.state[p]["preconditioner"].clone() for p in model.parameters()]
    before, refreshes = [p.detach().clone() for p in model.parameters()], optimizer.report().rows[0].refreshes
    with monkeypatch.context() as patch:
        REFRESHES[what](model, patch)
        with pytest.warns(RuntimeWarning, match=r"NaN or infinite.*The last good estimate stays in use") as caught:
            _steps(model, optimizer, range(12, 15))
    assert len(caught) == 1
    for p, old, kept in zip(model.parameters(), before, preconditioners, strict=True):
        assert torch.equal(optimizer.state[p]["preconditioner"], kept)
        assert torch.isfinite(p).all()
        assert not torch.equal(p, old)
    report = optimizer.report()
    assert (report.steps, report.failures, report.rows[0].refreshes) == (15, 3, refreshes)
    model.in_eval = None
    _step(model, optimizer, 15)
    assert optimizer.report().rows[0].refreshes == refreshes + 1
    assert optimizer._curvature.failures.in_a_row == 0


@both
@pytest.mark.parametrize("what", REFRESHES)
def test_a_refresh_with_bad_numbers_at_the_first_step(kind, what, monkeypatch):
    """Parameters wait for an estimate; each step looks for one, and when there is one the run is as any other."""
    model, optimizer = _start(kind, refresh_every=1000)
    before = [p.detach().clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        REFRESHES[what](model, patch)
        with pytest.warns(RuntimeWarning, match="There is none yet: parameters stay as they are until") as caught:
            _steps(model, optimizer, range(3))
    assert len(caught) == 1
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.report().failures == 3
    model.in_eval = None
    _steps(model, optimizer, range(3, 6))
    assert not any(map(torch.equal, before, model.parameters()))
    assert [optimizer.state[p]["step"] for p in model.parameters()] == [3] * 4


@both
@when
@pytest.mark.parametrize("what", REFRESHES)
def test_bad_numbers_refresh_after_refresh_stop_training(kind, after, what, monkeypatch):
    """So nothing is left untrained for more than ten steps."""
    model, optimizer = _start(kind, steps=after)
    REFRESHES[what](model, monkeypatch)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        _step(model, optimizer, after)
    _steps(model, optimizer, range(after + 1, after + MAX_FAILURES - 1))
    before = _kept(model, optimizer)
    with pytest.raises(RuntimeError, match=r"10 curvature refreshes in a row.*NaN or infinite.*Lower lr"):
        _step(model, optimizer, 99)
    assert _kept(model, optimizer) == before


@both
def test_a_layer_that_is_added_while_refreshes_fail_waits(kind):
    """The others are trained meanwhile, and every step looks for an estimate."""
    model, optimizer = _start(kind, refresh_every=1000)
    optimizer = kind(model, LOSSES["ce"], params=model.first.parameters(), refresh_every=1000)
    _steps(model, optimizer, range(12))
    optimizer.add_param_group({"params": model.last.parameters()})
    old = [p.detach().clone() for p in model.parameters()]
    model.in_eval = _spoil_eval(math.nan)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        _step(model, optimizer, 12)
    _step(model, optimizer, 13)
    assert [torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True)] == [False, False, True, True]
    assert optimizer.report().failures == 2
    model.in_eval = None
    _step(model, optimizer, 14)
    assert not torch.equal(model.last.weight, old[2])


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
