"""Whatever is passed to optimizers and functions works, or a ValueError or TypeError says what does not fit."""

from __future__ import annotations

import math
import re

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fishopt
from tests.fuzz_setup import fuzz, slow_ways

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])


def _tried(call):
    """What it returns, or the message with which it refuses."""
    try:
        return call(), ""
    except (ValueError, TypeError) as error:
        return None, str(error)


# --- constructors ---

NUMBERS = st.sampled_from([0, 0.0, 1e-8, 0.1, 0.5, 0.9, 0.999, 1, 1.0, 3.0, 1e4, -1e-3, math.nan, math.inf, -math.inf])
JUNK = st.sampled_from([None, True, "fast", "", [], (0.1,), 1j, torch.ones(2), torch.tensor(0.1), object(), 10**30])
NUMBER = NUMBERS | NUMBERS | JUNK
ESTIMATOR = st.sampled_from(["auto", "I1", "I2", "exact", "hutchinson", "empirical"]) | st.sampled_from(["I3", None, 3])
PARAMS = st.sampled_from(["all", "some", "named", "groups", "own", "empty", "other", "twice", "mixed", "set", "frozen"])
SHARED = {
    "lr": NUMBER,
    "weight_decay": NUMBER,
    "damping": NUMBER,
    "estimator": ESTIMATOR,
    "criterion": st.sampled_from(["efficiency", "bound", "exact", "best", None]),
    "refresh_every": st.sampled_from([1, 2, 1000]) | NUMBER,
    "refresh_inputs": st.sampled_from([1, 3, 1000]) | NUMBER,
    "maximize": st.booleans() | JUNK,
    "output": st.sampled_from([None, lambda h: h, 1.5, True, [0]]),
    "generator": st.sampled_from([None, torch.Generator(), 3, "cpu"]),
    "params": PARAMS,
}
OPTIONS = {
    fishopt.FisherAdam: SHARED | {"betas": st.tuples(NUMBER, NUMBER) | NUMBER, "eps": NUMBER, "clip": NUMBER},
    fishopt.DiagonalNGD: SHARED | {"momentum": NUMBER, "decay": NUMBER, "kl_radius": NUMBER},
}
LOSSES = {
    "categorical": (nn.CrossEntropyLoss(), Y),
    "bernoulli": (nn.BCEWithLogitsLoss(), (X[:, :3] > 0).float()),
    "gaussian": (nn.MSELoss(), X[:, 1:]),
    "poisson": (nn.PoissonNLLLoss(), (X[:, :3] > 0).float()),
}


def _params(kind, model):
    first, *rest = model.parameters()
    return {
        "all": [first, *rest],
        "some": [first],
        "named": model.named_parameters(),
        "groups": [{"params": rest, "lr": 1e-3}, {"params": first, "estimator": "exact"}],
        "own": [{"params": rest, "lr": math.nan}],
        "empty": [{"params": []}],
        "other": [nn.Parameter(torch.zeros(3))],
        "twice": [{"params": first}, {"params": [first, *rest]}],
        "mixed": [first, {"params": rest}],
        "set": {first},
        "frozen": [first.requires_grad_(False)],
    }[kind]


@st.composite
def _constructions(draw):
    kind = draw(st.sampled_from(list(OPTIONS)))
    names = draw(st.lists(st.sampled_from(list(OPTIONS[kind])), max_size=4, unique=True))
    return kind, draw(st.sampled_from(list(LOSSES))), {name: draw(OPTIONS[kind][name]) for name in names}


@given(_constructions())
@fuzz(150)
def test_constructors(construction):
    kind, family, options = construction
    loss_fn, targets = LOSSES[family]
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    if "params" in options:
        options["params"] = _params(options["params"], model)
    before = torch.get_rng_state()
    with slow_ways():
        optimizer, message = _tried(lambda: kind(model, loss_fn, **options))
        if optimizer is None:
            names = [*options, "lr", "parameter group"]
            assert any(re.search(rf"\b{name}\b", message) for name in names), message
            assert not model._forward_hooks
            assert not loss_fn._forward_hooks
            assert torch.equal(torch.get_rng_state(), before)
            return
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(model(X), targets).backward()
            optimizer.step()
    rate = options.get("lr")
    assert (rate is not None and float(rate) > 1) or all(p.isfinite().all() for p in model.parameters())


# --- functions ---

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
CALLS = {
    "fisher_diagonal": ("I1", "I2", "exact", "hutchinson", "empirical"),
    "label_variance": ("I1", "I2", "exact", "hutchinson"),
    "variance_bound": ("I1", "I2", "exact", "hutchinson"),
    "joint_variance": ("I1", "I2", "exact", "hutchinson"),
    "fisher_bound": (None,),
    "input_variance_bound": (None,),
    "trace_bound": (None,),
    "select_estimators": (None,),
}


class Several(nn.Module):
    """Adds up what linear layers make of each of several inputs, and shapes the sum."""

    def __init__(self, inputs, shape):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, math.prod(shape)) for _ in range(inputs))
        self.shape = shape

    def forward(self, *inputs):
        total = sum(layer(x.flatten(1)) for layer, x in zip(self.layers, inputs, strict=True))
        return total.tanh().reshape(len(total), *self.shape)


LIKELIHOOD = st.sampled_from(
    ["categorical", "bernoulli", "gaussian", "poisson", *(loss for loss, _ in LOSSES.values())]
)


@given(
    st.sampled_from([(name, estimator) for name, listed in CALLS.items() for estimator in listed]),
    LIKELIHOOD | st.sampled_from([fishopt.Categorical(dim=1), fishopt.Gaussian(0.3)]),
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES[:4]),
)
@fuzz(200)
def test_functions(call, likelihood, shape, inputs, count, dtype, model_dtype):
    name, estimator = call
    torch.manual_seed(0)
    model = Several(inputs, tuple(shape)).to(model_dtype)
    batch = tuple((3 * torch.randn(count, 3)).to(dtype) for _ in range(inputs))
    options = {} if estimator is None else {"estimator": estimator}
    if estimator == "empirical":
        options["targets"] = torch.zeros(count, *shape)
    with slow_ways():
        found, message = _tried(lambda: getattr(fishopt, name)(model, batch, likelihood, **options))
    if found is None:
        assert re.search("inputs|targets|model|likelihood|estimator", message), message
        return
    if name == "select_estimators":
        assert [choice.group for choice in found] == [f"layers.{i}" for i in range(inputs)]
        return
    for part in found if name == "joint_variance" else (found,):
        assert all(value.isfinite().all() for value in part.values())
        if name != "trace_bound":
            assert {k: v.shape for k, v in part.items()} == {k: p.shape for k, p in model.named_parameters()}
