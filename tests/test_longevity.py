"""Long runs: killed and resumed, for thousands of steps, in two threads, and gone when nobody needs them."""

import copy
import gc
import random
import sys
import threading
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from backpack.context import CTX
from torch import nn

import fishopt
from fishopt.passes.batching import quiet_fallbacks
from tests import soak

both = pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])


# --- killed and resumed ---


def test_a_killed_run_is_the_run_that_nobody_touched(tmp_path):
    """The small version of `make soak`."""
    context, rng, name = soak.starter(), random.Random(0), "DiagonalNGD, dropout, BatchNorm, squared loss"
    alone, killed = tmp_path / "alone.pt", tmp_path / "killed.pt"
    soak.train_apart(context, name, 100, alone, 100)
    assert soak.interrupted(context, name, 100, killed, rng, kills=3, every=5) == 3
    a, b = (torch.load(path, weights_only=True) for path in (alone, killed))
    assert list(soak.differences(a, b)) == []
    b["optimizer"]["state"][2]["exp_avg"][3] += 1e-7
    assert list(soak.differences(a, b)) == ["/optimizer/state/2/exp_avg"]


# --- memory ---


class Token:
    """Lives as long as what it hooks on to."""

    alive: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self):
        self.alive.add(self)

    def __call__(self, gradient):
        return None


class Marked(nn.Sequential):
    """Tells how many graphs of training forwards are alive."""

    def forward(self, x):
        h = super().forward(x)
        if self.training and h.requires_grad:
            h.register_hook(Token())
        return h


def _mlp():
    return Marked(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _live():
    """Tensors, graphs, and blocks of Python's memory."""
    gc.collect()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    return tensors, len(Token.alive), sys.getallocatedblocks()


class Life:
    """Training as it goes, for so many steps: evaluation, graphs that are kept for a while, forgotten backwards."""

    def __init__(self, kind, loss):
        torch.manual_seed(0)
        self.model, self.loss = _mlp(), loss
        self.optimizer = kind(self.model, loss, refresh_every=4, refresh_inputs=4)
        self.x, self.y = torch.randn(8, 6), torch.randint(0, 3, (8,))
        if isinstance(loss, nn.MSELoss):
            self.y = nn.functional.one_hot(self.y, 3).float()

    def steps(self, count):
        kept = None
        for step in range(count):
            if step % 3:  # else gradients of two steps add up
                self.optimizer.zero_grad()
            loss = self.loss(self.model(self.x), self.y)
            if step % 17:  # else there is no backward
                loss.backward(retain_graph=step % 5 == 0)
            kept = loss if step % 5 == 0 else kept
            if step % 7 == 0:
                self.model(self.x)
            if step % 11 == 0:
                with torch.no_grad():
                    self.model(self.x)
            if step % 13:
                self.optimizer.step()


@both
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])
def test_memory_does_not_grow(kind, loss):
    """One tensor or graph for each step, or each refresh, would be seen hundreds of times."""
    life = Life(kind, loss)
    life.steps(400)
    before = _live()
    life.steps(1600)
    after = _live()
    # A refresh every fourth step; the history of choices grows with the logarithm of steps.
    assert [b - a <= most for a, b, most in zip(before, after, (2, 1, 300), strict=True)] == [True] * 3
    assert len(life.optimizer.report().history) < 10


# --- threads ---


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x.unflatten(1, (2, 3)))[0][:, -1])


NETWORKS = {"mlp": _mlp, "attention": soak._attentive, "lstm": Recurrent}


def _trained(kind, network, steps=25):
    model = NETWORKS[network]()
    source = torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5, generator=source)
    model.eval()  # dropout draws from the one generator of all threads
    optimizer = kind(model, nn.CrossEntropyLoss(), refresh_every=2, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        x = torch.randn(8, 6, generator=source)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture
def _threads_take_turns_quickly():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _together(*functions):
    """What they return, each run by its own thread; the first error of any of them."""
    found, errors, start = [None] * len(functions), [], threading.Barrier(len(functions))

    def run(i):
        start.wait()
        try:
            found[i] = functions[i]()
        except BaseException as error:  # noqa: BLE001 - handed on
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


@pytest.mark.usefixtures("_threads_take_turns_quickly")
@pytest.mark.parametrize("networks", [("mlp", "attention"), ("lstm", "attention"), ("lstm", "mlp")])
@pytest.mark.filterwarnings("default:the curvature of:RuntimeWarning")
def test_two_threads_train_as_one_after_the_other(networks):
    kinds = (fishopt.FisherAdam, fishopt.DiagonalNGD)
    jobs = [
        lambda kind=kind, network=network: _trained(kind, network)
        for kind, network in zip(kinds, networks, strict=True)
    ]
    alone = [job() for job in jobs]
    for _ in range(3):
        for a, b in zip(alone, _together(*jobs), strict=True):
            assert all(map(torch.equal, a, b))


@pytest.mark.usefixtures("_threads_take_turns_quickly")
def test_estimates_in_threads_leave_warnings_and_backpack_as_they_were():
    """I2's exact diagonal goes through BackPACK, whose context is global, as is the list of filters."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)),
        torch.randn(4, 4),
    )

    def job():
        source = torch.Generator().manual_seed(0)
        return [
            fishopt.fisher_diagonal(copy.deepcopy(model), x, "categorical", estimator="I2", generator=source)[
                "0.weight"
            ]
            for _ in range(6)
        ]

    before, handles, alone = list(warnings.filters), len(CTX.hook_handles), job()
    for _ in range(3):
        for found in _together(job, job, job):
            assert all(map(torch.equal, alone, found))
    assert warnings.filters == before
    assert len(CTX.hook_handles) == handles


def test_vmaps_warnings_are_off_until_the_last_thread_leaves(monkeypatch):
    """Torch has one switch for all."""
    seen = []
    monkeypatch.setattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", seen.append)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with quiet_fallbacks():
            inside.set()
            leave.wait()

    def visit():
        inside.wait()
        with quiet_fallbacks():
            pass
        leave.set()

    _together(stay, visit)
    assert seen == [False, False, False, True]


# --- gone ---


def _train(model, optimizer, loss, steps):
    for _ in range(steps):
        x = torch.randn(8, 6)
        y = x[:, :3] if isinstance(loss, nn.MSELoss) else x[:, :3].argmax(1)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


@both
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["ce", "mse"])
@pytest.mark.filterwarnings("default:the curvature of:RuntimeWarning")
def test_what_is_deleted_is_gone_without_the_garbage_collector(kind, network, loss):
    """The optimizer with its state and its copy of the model, then the model."""
    _train(*_pair(kind, network, loss), loss, 1)  # what torch keeps from a first time on
    model, optimizer = _pair(kind, network, loss)
    gc.collect()
    gc.disable()
    try:
        _train(model, optimizer, loss, 12)
        shadow = optimizer._curvature._shadow
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        owned = [weakref.ref(x) for x in (optimizer, *states, *shadow.parameters.values(), *shadow.module.modules())]
        parameters = [weakref.ref(p) for p in model.parameters()]
        del shadow, states, optimizer
        assert not [ref() for ref in owned if ref() is not None]
        assert not loss._forward_hooks
        del model
        assert not [ref() for ref in parameters if ref() is not None]
    finally:
        gc.enable()


def _pair(kind, network, loss):
    model = NETWORKS[network]()
    return model, kind(model, loss)
