"""Parameters in bfloat16 and float16, and models moved to another precision in training."""

import copy
import io

import pytest
import torch
from torch import nn

import fishopt
from benchmarks.cost.inside import without_refreshes
from fishopt.optim import buckets
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Estimate, Moment

both = pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
low = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
FAST = {
    fishopt.FisherAdam: {"lr": 0.05, "clip": 0.5, "weight_decay": 0.1},
    fishopt.DiagonalNGD: {"lr": 0.1, "kl_radius": 1e-3, "weight_decay": 0.1},
}
SHAPES = {"vector": (7,), "matrix": (65, 130), "scalar": (), "empty": (0,), "conv": (4, 6, 3, 3)}


class Bag(nn.Module):
    """Parameters without a network."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))

    def forward(self, x):
        return x


@pytest.fixture
def _estimates_are_given(monkeypatch):
    """In float32, another one at each step."""

    def refresh(self, units, wanted, record, training, step):
        generator = torch.Generator().manual_seed(step)
        parameters = self._model.named_parameters()
        return Estimate(
            {n: torch.rand(p.shape, generator=generator) * 1e-3 for n, p in parameters}, Moment(4, 1.0, 1.0)
        )

    monkeypatch.setattr(Curvature, "refresh", refresh)


def _step(model, optimizer, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        grad = (scale * torch.randn(p.shape, generator=generator)).to(torch.bfloat16)
        p.grad = grad.to(p.dtype).contiguous(
            memory_format=torch.channels_last if p.ndim == 4 and step % 2 else torch.contiguous_format
        )
    optimizer.refresh(torch.zeros(1))
    optimizer.step()


@both
@low
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.usefixtures("_estimates_are_given")
def test_a_step_is_float32s_rounded_once(monkeypatch, kind, dtype, maximize):
    """A twin in float32, which starts each step from the rounded parameters, bit for bit; whatever the buckets."""
    monkeypatch.setattr(buckets, "ROUNDED", 2**10)
    model, twin = Bag(dtype), Bag()
    optimizers = [kind(m, "categorical", maximize=maximize, **FAST[kind]) for m in (model, twin)]
    for step in range(6):
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(p)
        _step(model, optimizers[0], step)
        _step(twin, optimizers[1], step)
        assert all(torch.equal(p, q.to(dtype)) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for name, value in optimizers[1].state[q].items():
            assert torch.equal(torch.as_tensor(optimizers[0].state[p][name]), torch.as_tensor(value))
    assert len(optimizers[0]._sorting.buckets) > len(optimizers[1]._sorting.buckets)


@both
@low
@pytest.mark.usefixtures("_estimates_are_given")
def test_loading_does_not_round_the_state(kind, dtype):
    """Torch's own loading casts all of it to the parameter's dtype."""
    model = Bag(dtype)
    optimizer = kind(model, "categorical", **FAST[kind])
    for step in range(3):
        _step(model, optimizer, step)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    other = Bag(dtype)
    resumed = kind(other, "categorical", **FAST[kind])
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        _step(model, optimizer, step)
        _step(other, resumed, step)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@both
@low
@pytest.mark.usefixtures("_estimates_are_given")
def test_a_state_rounded_by_an_earlier_version_is_taken_up(kind, dtype):
    model = Bag(dtype)
    optimizer = kind(model, "categorical", **FAST[kind])
    _step(model, optimizer, 0)
    state = optimizer.state_dict()
    for kept in state["state"].values():
        kept.update({name: value.to(dtype) for name, value in kept.items() if isinstance(value, torch.Tensor)})
    optimizer.load_state_dict(state)
    _step(model, optimizer, 1)
    assert {optimizer.state[p]["exp_avg"].dtype for p in model.parameters()} == {torch.float32}


# --- models that are moved ---

MOVES = {
    "to float64": lambda m: m.double(),
    "to bfloat16": lambda m: m.bfloat16(),
    "there and back": lambda m: m.double().float(),
    "in part": lambda m: setattr(m.matrix, "data", m.matrix.data.double()),
}


@both
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.usefixtures("_estimates_are_given")
def test_the_state_follows_a_moved_model(kind, move, refreshed):
    """As a new optimizer with the same state, on a model that was built so."""
    model = Bag()
    optimizer = kind(model, "categorical", refresh_every=10**6, **FAST[kind])
    without_refreshes(optimizer)
    for step in range(3):
        _step(model, optimizer, step)
    other = copy.deepcopy(model)
    MOVES[move](model)
    MOVES[move](other)
    built = kind(other, "categorical", refresh_every=10**6, **FAST[kind])
    built.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for m, o in ((model, optimizer), (other, built)):
            o._is_fresh = True  # none is due
            if refreshed:
                o.refresh(torch.zeros(1))
            for p in m.parameters():
                p.grad = torch.full_like(p, 0.1 * step)
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        kept = optimizer.state[p]
        wanted = torch.promote_types(p.dtype, torch.float32)
        assert {v.dtype for v in kept.values() if isinstance(v, torch.Tensor)} == {wanted}


@both
def test_training_goes_on_in_another_precision(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(32, 6)
    optimizer = kind(model, nn.CrossEntropyLoss(), lr=1e-2)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        for _ in range(12):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(dtype)), x[:, :3].argmax(1))
            loss.backward()
            optimizer.step()
    assert loss < 1
    assert optimizer.report().failures == 0
