"""Schedule-free averaging: its formulas, and which of y and x the parameters hold when."""

import contextlib
import copy
import functools
import gc
import io
import math
import pickle
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fishopt
from fishopt.optim import averaging, buckets
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Estimate, Moment
from fishopt.optim.fused import has_nesterov
from tests.ranks import gathered, worlds

LOSS = nn.CrossEntropyLoss()
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.ones(6, 3).tril()).argmax(1)


def _network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def _start(model=None, **options):
    model = model or _network()
    options = {"schedule_free": True, "lr": 0.02, "generator": torch.Generator().manual_seed(7), **options}
    return model, fishopt.FisherAdam(model, LOSS, **options)


def _backward(model, optimizer, step):
    rows = torch.arange(step * 16, (step + 1) * 16) % 64
    optimizer.zero_grad()
    loss = LOSS(model(X[rows].to(next(model.parameters()).dtype)).float(), Y[rows])
    loss.backward()
    return loss


def _train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        _backward(model, optimizer, step)
        optimizer.step()


def _evaluate(model):
    was = model.training
    model.eval()
    with torch.no_grad():
        out = model(X.to(next(model.parameters()).dtype))
    model.train(was)
    return out


def _values(model):
    return [p.detach().clone() for p in model.parameters()]


def _same(one, other):
    return all(map(torch.equal, one, other))


def _through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the formulas ---

SHAPES = {"vector": (7,), "matrix": (5, 9), "scalar": (), "empty": (0,), "conv": (4, 6, 3, 3), "large": (300, 1001)}


class Bag(nn.Module):
    """Parameters without a network."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if name == "conv":
                value = value.to(memory_format=torch.channels_last)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return x


@pytest.fixture
def _estimates_are_given(monkeypatch):
    def refresh(self, units, wanted, record, training, step):
        generator = torch.Generator().manual_seed(step)
        found = {
            name: torch.empty_like(p).copy_(torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.1)
            for name, p in self._model.named_parameters()
        }
        return Estimate(found, Moment(4, 1.0, 1.0))

    monkeypatch.setattr(Curvature, "refresh", refresh)


def _sampled(x, order):
    """As documented for ``clip``: of every so many blocks of 64 entries, in the order of memory, the first."""
    every = max((min(x.numel() // 2**13, 62) - 1) | 1, 1)
    x = torch.empty_like(order, dtype=x.dtype).copy_(x)
    return x if every == 1 else x.flatten()[: x.numel() // 64 * 64].view(-1, 64)[::every]


def _offset(state):
    """z - x"""
    return -state["exp_avg"].double() / state.get("stretch", 1.0)


class Reference:
    """The paper's three sequences, in float64, one parameter at a time."""

    def __init__(self, model):
        self.x = {p: p.detach().double().clone() for p in model.parameters()}
        self.y, self.z = dict(self.x), dict(self.x)
        self.weights = {p: [] for p in self.x}

    def step(self, optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group, optimizer.state[p]["preconditioner"])

    def move(self, p, group, factor):
        lr, beta = float(group["lr"]), group["betas"][0]
        direction = p.grad.double() * (-1 if group["maximize"] else 1) * factor.double()
        if p.numel():
            direction /= max(1.0, float(_sampled(direction, factor).square().mean().sqrt()) / group["clip"])
        self.z[p] = self.z[p] - lr * (direction + group["weight_decay"] * self.y[p])
        largest = max([lr, *(rate for rate, _ in self.weights[p])])
        self.weights[p].append((lr, largest**2))
        total = sum(weight for _, weight in self.weights[p])
        share = largest**2 / total if total else 0.0
        self.x[p] = (1 - share) * self.x[p] + share * self.z[p]
        self.y[p] = (1 - beta) * self.z[p] + beta * self.x[p]

    def check(self, optimizer, rtol, atol):
        betas = {p: group["betas"][0] for group in optimizer.param_groups for p in group["params"]}
        close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol)
        for p, beta in betas.items():
            close(p.detach().double(), self.y[p])
            close(p.detach().double() + beta * _offset(optimizer.state[p]), self.z[p])
        optimizer.eval()
        for p in betas:
            close(p.detach().double(), self.x[p])
        optimizer.train()


def _warmup(step):
    return 0.05 * min(step, 4) / 4


def _decay(step):
    return 0.05 / (1 + step)


OPTIONS = {
    "defaults": {},
    "no decay": {"weight_decay": 0.0},
    "clipped": {"clip": 0.1},
    "not clipped": {"clip": math.inf},
    "all at z": {"betas": (0.0, 0.9)},
    "near x": {"betas": (0.98, 0.9)},
    "maximize": {"maximize": True, "weight_decay": 0.2},
    "warmup from zero": {"rate": _warmup},
    "decaying lr": {"rate": _decay},
    "tensor lr": {"lr": torch.tensor(0.05)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.usefixtures("_estimates_are_given")
def test_it_is_its_formulas(monkeypatch, what, dtype):
    monkeypatch.setattr(buckets, "PART", 2**16)  # the large one goes in five parts
    options = dict(OPTIONS[what])
    rate = options.pop("rate", None)
    model, optimizer = _start(Bag(dtype), refresh_every=3, **{"lr": 0.05, "weight_decay": 0.1, **options})
    reference = Reference(model)
    for step in range(14):
        generator = torch.Generator().manual_seed(100 + step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
    reference.check(optimizer, *((1e-11, 1e-12) if dtype == torch.float64 else (2e-5, 4e-6)))


@pytest.mark.parametrize("without", [(), (0, 1, 2, 3, 4), (5, 6, 10), tuple(range(20))])
@pytest.mark.usefixtures("_estimates_are_given")
def test_the_kernel_and_the_formula_take_over_from_each_other(monkeypatch, without):
    calls, kernel = [], torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **kwargs: (calls.append(1), kernel(*args, **kwargs)))
    model, optimizer = _start(Bag(torch.float32), lr=0.05, weight_decay=0.1, clip=0.5)
    reference = Reference(model)
    for step in range(20):
        monkeypatch.setattr(averaging, "has_nesterov", lambda device, step=step: step not in without)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
    reference.check(optimizer, 2e-5, 4e-6)
    with_kernel = {*range(1, 20)} - {*without}  # the first step starts the average, by the formula
    assert bool(calls) == bool(with_kernel)
    assert len(calls) >= len(with_kernel)


@pytest.mark.usefixtures("_estimates_are_given")
def test_a_parameter_that_lies_otherwise_in_memory_for_a_while():
    """It takes the formula then, and has another stretch than the others when it is back among them."""
    model, optimizer = _start(Bag(torch.float32), lr=0.05)
    reference = Reference(model)
    for step in range(12):
        lies = model.matrix.detach().t().contiguous().t() if 4 <= step < 8 else model.matrix.detach().contiguous()
        model.matrix.data = lies
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
    assert optimizer.state[model.matrix]["stretch"] != optimizer.state[model.vector]["stretch"]
    reference.check(optimizer, 2e-5, 4e-6)


def test_a_kernel_that_does_something_else_is_not_used(monkeypatch):
    has_nesterov.cache_clear()
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **kwargs: None)
    assert not has_nesterov("cpu")
    has_nesterov.cache_clear()
    monkeypatch.delattr(torch, "_fused_sgd_")
    assert not has_nesterov("cpu")
    has_nesterov.cache_clear()
    monkeypatch.undo()
    assert has_nesterov("cpu")


def _groups(model):
    return [
        {"params": [model.vector, model.matrix], "lr": 0.1, "betas": (0.5, 0.9), "schedule_free": True},
        {"params": [model.conv], "maximize": True, "clip": 0.2, "schedule_free": True},
        {"params": [model.large, model.scalar, model.empty]},
    ]


@pytest.mark.usefixtures("_estimates_are_given")
def test_groups_and_parameters_that_join_late():
    """Each has its own options and, from its first step on, its own sum of weights."""
    model, other = Bag(), Bag()
    _, optimizer = _start(model, params=_groups(model), schedule_free=False)
    _, plain = _start(other, params=[{**group, "schedule_free": False} for group in _groups(other)])
    reference = Reference(model)
    for step in range(9):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        if step < 4:
            model.matrix.grad = None
        elif step < 8:  # as many steps in the end, of other weights
            model.vector.grad = None
            optimizer.param_groups[0]["lr"] = 0.2
        for one in (optimizer, plain):
            one.refresh(torch.zeros(1))
        reference.step(optimizer)
        optimizer.step()
        plain.step()
    optimizer.param_groups.pop()
    reference.check(optimizer, 1e-11, 1e-12)
    assert [optimizer.state[p]["averaged"] for p in (model.vector, model.matrix, model.conv)] == [2, 5, 9]
    assert torch.equal(model.large, other.large)
    assert torch.equal(model.scalar, other.scalar)


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
    assert {*optimizer.state[model[0].weight]} == {"step", "refreshes", "exp_avg", "fisher", "preconditioner"}


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


# --- copies, checkpoints, wrappers ---

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


def test_bad_options_are_refused():
    with pytest.raises(TypeError, match="schedule_free=1"):
        _start(schedule_free=1)


def test_a_group_added_later_is_watched():
    model = _network()
    _, optimizer = _start(model, params=[*model[0].parameters()], schedule_free=False)
    optimizer.add_param_group({"params": model[2].parameters(), "schedule_free": True})
    _train(model, optimizer, 5)
    y = _values(model)
    _evaluate(model)
    assert [torch.equal(p, old) for p, old in zip(model.parameters(), y, strict=True)] == [True, True, False, False]


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
        for line in range(1, 200, 2):
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
