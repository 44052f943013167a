"""Whatever network comes in agrees with brute force, or a ValueError says why it cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fishopt
from tests.fuzz_setup import fuzz, slow_ways

WIDTH = 4


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Twice(nn.Module):
    """A shared layer, through an attribute and an alias of it."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.other = self.one

    def forward(self, x):
        return self.other(torch.sigmoid(self.one(x)))


class AsImage(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.reshape(len(x), 1, 2, 2)).flatten(1)[:, :WIDTH]


class AsSequence(nn.Module):
    """Two steps of width two; recurrent layers, attention and one-dimensional convolutions live here."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        sequence = x.reshape(len(x), 2, 2)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(sequence, sequence, sequence, need_weights=False)[0].flatten(1)
        out = self.layer(sequence)
        return (out[0] if isinstance(out, tuple) else out).flatten(1)


class Looked(nn.Module):
    """An embedding of the signs of two features."""

    def __init__(self, padding):
        super().__init__()
        self.table = nn.Embedding(2, 2, padding_idx=0 if padding else None)

    def forward(self, x):
        return self.table((x[:, :2] > 0).long()).flatten(1) * x


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.gain = nn.Parameter(torch.tensor(0.8))

    def forward(self, x):
        return self.gain * functional.softplus(functional.linear(x, self.weight)) - x


def _statistics(norm):
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm


BLOCKS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "elu in place": lambda: nn.ELU(inplace=True),
    "leaky": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardtanh": nn.Hardtanh,
    "prelu": lambda: nn.PReLU(WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "batch norm": lambda: _statistics(nn.BatchNorm1d(WIDTH)),
    "conv2d": lambda: AsImage(nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1)),
    "deep conv2d": lambda: AsImage(
        nn.Conv2d(1, 2, 1), _statistics(nn.BatchNorm2d(2)), nn.Tanh(), nn.Conv2d(2, 2, 1, groups=2), nn.Flatten()
    ),
    "conv1d": lambda: AsSequence(nn.Conv1d(2, 2, 1)),
    "lstm": lambda: AsSequence(nn.LSTM(2, 2, batch_first=True)),
    "gru": lambda: AsSequence(nn.GRU(2, 2, batch_first=True)),
    "attention": lambda: AsSequence(nn.MultiheadAttention(2, 1, batch_first=True)),
    "sequence": lambda: AsSequence(nn.Linear(2, 2)),
    "embedding": lambda: Looked(padding=False),
    "padded": lambda: Looked(padding=True),
    "twice": Twice,
    "functional": Functional,
}


@st.composite
def _trees(draw, depth=2):
    """A list of blocks' names; a nested list is a residual block."""
    leaf = st.sampled_from(list(BLOCKS))
    one = leaf if depth == 0 else st.one_of(leaf, leaf, leaf, _trees(depth=depth - 1))
    return draw(st.lists(one, min_size=1, max_size=3))


def _built(tree):
    return nn.Sequential(*(BLOCKS[one]() if isinstance(one, str) else Residual(_built(one)) for one in tree))


def _network(tree, outputs, seed, frozen):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), _built(tree), nn.Linear(WIDTH, outputs)).double()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != frozen)
    return model


def _scores(model, x, column):
    """The gradient of ``column @ h`` for one input, by autograd."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        h = model(x[None])[0]
        found = torch.autograd.grad(column @ h, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def _root(family: str, h: Tensor) -> Tensor:
    """The columns of a root of I(h|x), one input's, as rows."""
    if family == "categorical":
        p = h.softmax(-1)
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        return (vectors * values.clamp_min(0).sqrt()).T
    variances = {"bernoulli": h.sigmoid() * (-h).sigmoid(), "gaussian": torch.ones_like(h), "poisson": h.exp()}
    return torch.diag(variances[family].sqrt())


def _brute_force(model, inputs, family):
    """The exact Fisher diagonal, and for a categorical the variance of squared scores over all labels."""
    model.eval()
    fisher, variance = {}, {}
    for x in inputs:
        h = model(x[None])[0].detach()
        for column in _root(family, h):
            for name, score in _scores(model, x, column).items():
                fisher[name] = fisher.get(name, 0) + score.square() / len(inputs)
        if family == "categorical":
            p = h.softmax(-1)
            squares = [_scores(model, x, p - label) for label in torch.eye(len(p), dtype=p.dtype)]
            for name in fisher:
                q = torch.stack([one[name].square() for one in squares])
                mean = torch.tensordot(p, q, dims=1)
                new = torch.tensordot(p, (q - mean).square(), dims=1) / len(inputs)
                variance[name] = variance.get(name, 0) + new
    return fisher, variance


def _close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@given(
    _trees(),
    st.sampled_from(["categorical", "bernoulli", "gaussian", "poisson"]),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([None, 0, 1, 2]),
)
@fuzz(60)
def test_module_trees(tree, family, outputs, count, seed, frozen):
    model = _network(tree, outputs, seed, frozen)
    inputs = torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with slow_ways():
        try:
            expected, variance = _brute_force(model, inputs, family)
        except RuntimeError:  # autograd's own, such as for a ReLU in place behind a tanh
            with pytest.raises(ValueError, match="overwrites"):
                fishopt.fisher_diagonal(model, inputs, family)
            return
        if not expected:
            with pytest.raises(ValueError, match="no trainable parameter"):
                fishopt.fisher_diagonal(model, inputs, family)
            return
        _close(fishopt.fisher_diagonal(model, inputs, family, estimator="exact"), expected)
        if family == "categorical":
            _close(fishopt.label_variance(model, inputs, family, estimator="I1"), variance)
        for estimator in ("I1", "I2", "hutchinson"):
            found = fishopt.fisher_diagonal(model, inputs, family, estimator=estimator)
            assert all(value.isfinite().all() for value in found.values())
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in expected))
        assert [choice.group for choice in fishopt.select_estimators(model, inputs, family)] == layers
