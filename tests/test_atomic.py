"""A step that is interrupted has happened as a whole or not at all."""

import contextlib
import copy
import functools
import json
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import fishopt
from fishopt.optim.atomic import Transaction
from fishopt.passes.batching import quiet_fallbacks

KINDS = {
    "FisherAdam": fishopt.FisherAdam,
    "schedule free": functools.partial(fishopt.FisherAdam, schedule_free=True),
    "DiagonalNGD": fishopt.DiagonalNGD,
}
both = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def _start(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, kind(model, nn.MSELoss(), generator=torch.Generator().manual_seed(0), **options)


def _backward(model, optimizer, step, scale=1.0):
    optimizer.zero_grad()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    (scale * nn.functional.mse_loss(model(x), x[:, :3])).backward()


def _plain(value):
    """Without the clock's readings, and in a form that compares by value."""
    if isinstance(value, str) and value.startswith("{"):  # the copy that the first group has
        value = json.loads(value)
    if isinstance(value, dict):
        return {
            k: _plain(v) for k, v in value.items() if k != "seconds" and not (k == "fishopt" and isinstance(v, str))
        }
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def _all_of(model, optimizer):
    recorded = optimizer._recorder.last
    return _plain([model.state_dict(), optimizer.state_dict(), recorded and recorded.gradient])


def _stepped(model, optimizer):
    """The gradients too: copies are made without."""
    model, optimizer, grads = copy.deepcopy((model, optimizer, [p.grad for p in model.parameters()]))
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    return model, optimizer


class _At:
    """Sends Ctrl-C at a line of fishopt's that is executed; counts them."""

    def __init__(self, at=None):
        self.at, self.count = at, 0

    def __call__(self, frame, event, arg):
        if "/fishopt/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = frame.f_code.co_filename.endswith(("atomic.py", "base.py", "batching.py"))
        if event in {"line", "opcode"}:
            self.count += 1
            if self.count == self.at:
                signal.raise_signal(signal.SIGINT)
        return self

    def during(self, function):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        finally:
            sys.settrace(before)


@both
@pytest.mark.parametrize("at", [0, 3, 12])
def test_an_interrupt_at_any_line_is_before_or_after_the_step(kind, at):
    """The first step, one with a refresh, one without: some moments of each, most of those at the end."""
    start = _start(kind)
    for step in range(at):
        _backward(*start, step)
        start[1].step()
    _backward(*start, at)
    for _ in range(2):  # some lines are for the first time alone
        done = _stepped(*start)
        counter = _At()
        counter.during(done[1].step)
    untouched, whole = _all_of(*start), _all_of(*done)
    rng = random.Random(at)
    moments = range(1, counter.count + 1)
    lines = {*rng.sample(moments, 25), *moments[-60::2]}
    seen = set()
    for line in lines:
        model, optimizer = _stepped(*start)
        with pytest.raises(KeyboardInterrupt):
            _At(line).during(optimizer.step)
        assert not _get_current_function_mode_stack(), line
        after = _all_of(model, optimizer)
        assert after in (untouched, whole), line
        seen.add(after == whole)
        if after != whole:
            optimizer.step()
            assert _all_of(model, optimizer) == whole, line
        assert torch._C._len_torch_function_stack() == 0
        assert torch.is_grad_enabled()
    assert seen == {False, True}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def _not_for_long():
    """A test that waits for ever fails after half a minute."""

    def held_up(*_):
        raise AssertionError("it waits for what nobody will give")

    before = signal.signal(signal.SIGALRM, held_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_not_for_long")
def test_an_interrupt_at_any_moment_of_quiet_fallbacks_holds_nobody_up(monkeypatch):
    """And the warnings are on after the next visit, be it another thread's."""
    seen = []
    monkeypatch.setattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", seen.append)

    def visit():
        with quiet_fallbacks():
            pass

    counter = _At()
    counter.during(visit)
    for moment in range(1, counter.count + 1):
        with pytest.raises(KeyboardInterrupt):
            _At(moment).during(visit)
        other = threading.Thread(target=visit)
        other.start()
        other.join()
        assert seen[-1], moment
    assert counter.count > 20


@pytest.fixture
def _threads_take_turns_quickly():
    """By default a thread waits for 5 ms to be let in: longer than a step takes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _interrupted(step, after):
    """Whether Ctrl-C, sent by another thread some seconds after the start, came while in ``step``."""
    gate, caught = threading.Lock(), False  # an interrupt while a thread is started can leave its locks in disorder

    def send():
        with gate:
            time.sleep(after)
            os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    gate.acquire()
    sender.start()
    try:
        gate.release()
        try:
            step()
        except KeyboardInterrupt:
            caught = True
        sender.join()
        time.sleep(1e-3)
    except KeyboardInterrupt:
        sender.join()
    return caught


@both
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python drops one in a finalizer
@pytest.mark.usefixtures("_threads_take_turns_quickly")
def test_a_run_with_interrupts_at_random_moments_is_the_run_without(kind):
    """Each interrupted step that did not happen is made again."""
    model, optimizer = _start(kind, refresh_every=3)
    took = []
    for step in range(40):
        _backward(model, optimizer, step)
        started = time.perf_counter()
        optimizer.step()
        took.append(time.perf_counter() - started)
    other, again = _start(kind, refresh_every=3)
    rng, interrupts = random.Random(0), 0
    for step in range(40):
        _backward(other, again, step)
        window = took[step]
        while again._steps == step:
            interrupts += _interrupted(again.step, rng.uniform(0, window))
            window *= 1.2  # what an interrupt has undone is to be made anew, which may take longer than the step took
    assert _all_of(model, optimizer) == _all_of(other, again)
    assert interrupts > 3


@both
def test_a_scaled_gradient_is_unscaled_once(kind):
    """An interrupted step under a GradScaler leaves the scale in the gradients, for the next attempt to take out."""
    start = _start(kind)
    _backward(*start, 0, scale=2.0**10)
    start[1].grad_scale, start[1].found_inf = torch.tensor(2.0**10), torch.tensor(0.0)
    gradients = []
    for line in (None, *range(20, 900, 80)):
        model, optimizer = _stepped(*start)
        optimizer.grad_scale, optimizer.found_inf = start[1].grad_scale, start[1].found_inf
        if line:
            with pytest.raises(KeyboardInterrupt):
                _At(line).during(optimizer.step)
        if not optimizer._steps:
            optimizer.step()
        gradients.append([_all_of(model, optimizer), *(p.grad.tolist() for p in model.parameters())])
    assert all(found == gradients[0] for found in gradients)


class Failing(nn.Module):
    """Fails when it is asked to, in the middle of its forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.error = nn.Linear(5, 6), nn.Linear(6, 3), None

    def forward(self, x):
        h = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(h.tanh())


@both
def test_an_error_in_the_model_is_survived(kind):
    """It was training well without, so the last good estimate goes on."""
    torch.manual_seed(0)
    model = Failing()
    optimizer = kind(model, nn.MSELoss())
    model.error = ZeroDivisionError("not yet")
    with pytest.raises(ValueError, match="not yet"):
        optimizer.refresh(torch.ones(4, 5))
    assert not optimizer.state
    model.error = None
    for step in range(4):
        _backward(model, optimizer, step)
        if step == 2:
            model.error = ZeroDivisionError("not now")
            with pytest.warns(RuntimeWarning, match="not now"):
                optimizer.step()
            assert optimizer._curvature._shadow is None  # it may have been left in the middle of a pass
            model.error = None
        else:
            optimizer.step()
    assert optimizer.report().failures == 1
    assert [optimizer.state[p]["refreshes"] for p in model.parameters()] == [3] * 4
    assert [optimizer.state[p]["step"] for p in model.parameters()] == [4] * 4


# --- the transaction itself ---


def _failing(commits):
    order = []
    with contextlib.suppress(ZeroDivisionError), Transaction() as transaction:
        transaction.on_failure(lambda: order.append("first"))
        transaction.on_failure(lambda: order.append("second"))
        if commits:
            transaction.commit()
        raise ZeroDivisionError
    return order


def test_undone_latest_first_unless_committed():
    assert _failing(commits=False) == ["second", "first"]
    assert _failing(commits=True) == []


def test_an_interrupt_waits_for_the_commit_to_end():
    reached = []

    def commit():
        with Transaction() as transaction:
            transaction.commit()
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        commit()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_the_users_handler_stays(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Transaction() as transaction:
            transaction.commit()
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@both
def test_steps_in_other_threads(kind):
    """Where no signal handler may be set."""
    pairs = [_start(kind) for _ in range(3)]

    def train(model, optimizer):
        for step in range(12):
            _backward(model, optimizer, step)
            optimizer.step()

    threads = [threading.Thread(target=train, args=pair) for pair in pairs[1:]]
    for thread in threads:
        thread.start()
    train(*pairs[0])
    for thread in threads:
        thread.join()
    assert _all_of(*pairs[0]) == _all_of(*pairs[1]) == _all_of(*pairs[2])
