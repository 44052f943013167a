"""What the copy that curvature is computed on shares with the user's network: nothing that either may change alone."""

from collections import deque

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import fishopt
from fishopt.likelihoods import Categorical
from fishopt.passes import Arguments, Shadow
from tests.asserts import assert_close

LOSS = nn.CrossEntropyLoss()
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Every(prune.BasePruningMethod):
    """A method of pruning as users write them."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


class Keeping(nn.Module):
    """A network that keeps tensors as plain attributes, and changes them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.temperature = torch.tensor(1.0)
        self.scales = [torch.tensor(1.0), 2.0]
        self.calls = torch.zeros(())
        self.sums = {"h": torch.zeros(3)}
        self.weight_too = self.last.weight

    def forward(self, x):
        h = self.last(self.first(x).tanh()) * self.scales[0] / self.temperature
        self.calls += 1
        self.sums["h"].add_(h.detach().sum(0))
        return h + 0 * self.weight_too.sum()


def _trained(model, steps=3, **options):
    torch.manual_seed(0)
    optimizer = fishopt.FisherAdam(model, LOSS, generator=torch.Generator().manual_seed(0), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(X), Y).backward()
        optimizer.step()
    return optimizer


def _gap(model, optimizer):
    """By how much the optimizer's copy is off."""
    shadow = optimizer._curvature._shadow
    shadow.sync()
    with torch.no_grad():
        return float((shadow.run(Arguments((X,))) - model(X)).abs().max())


def _pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    Every.apply(model[0], "weight")
    return model


def test_pruning_by_a_method_of_the_users_own():
    model, plain = _pruned(), _pruned()
    prune.remove(plain[0], "weight")
    found = fishopt.fisher_diagonal(model, X, LOSS, estimator="exact")
    expected = fishopt.fisher_diagonal(plain, X, LOSS, estimator="exact")
    torch.testing.assert_close(found["0.weight_orig"], expected["0.weight"] * model[0].weight_mask)
    assert _gap(model, _trained(model)) < 1e-6


def test_what_a_forward_changes_is_left_alone():
    model = Keeping()
    fishopt.fisher_diagonal(model, X, LOSS)
    fishopt.select_estimators(model, X, LOSS)
    assert model.calls == 0
    assert not model.sums["h"].any()
    _trained(model)
    assert model.calls == 3


@pytest.mark.parametrize("how", ["replaced", "in a list", "filled"])
def test_tensors_that_are_replaced_in_training_are_followed(how):
    model = Keeping()
    optimizer = _trained(model)
    assert _gap(model, optimizer) < 1e-6
    shadow = optimizer._curvature._shadow
    if how == "replaced":
        model.temperature = torch.tensor(5.0)
    elif how == "in a list":
        model.scales[0] = torch.tensor(0.2)
    else:
        model.temperature.fill_(5.0)
    assert _gap(model, optimizer) < 1e-6
    assert shadow.module.weight_too is shadow.module.last.weight
    assert shadow.is_current()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_is_renormalised_by_the_users_forward_alone(kind):
    torch.manual_seed(0)
    table = kind(6, 4, max_norm=0.5)
    model = nn.Sequential(table, nn.Flatten(), nn.LazyLinear(3))
    tokens = torch.randint(0, 6, (8, 2))
    with torch.no_grad():
        model(tokens[:1])
        table.weight.mul_(3)
    before = table.weight.detach().clone()
    found = fishopt.fisher_diagonal(model, tokens, LOSS, estimator="exact")
    assert torch.equal(table.weight, before)
    with torch.no_grad():
        model(tokens)
    assert_close(fishopt.fisher_diagonal(model, tokens, LOSS, estimator="exact"), found, rtol=1e-5, atol=1e-9)
    optimizer = fishopt.FisherAdam(model, LOSS)
    LOSS(model(tokens), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = LOSS(model(tokens), Y)
    fishopt.fisher_diagonal(model, tokens, LOSS)
    loss.backward()  # nothing that it needs was changed


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_forward_takes_many_more_rows_than_there_are(count):
    rows = []

    class Watched(nn.Linear):
        def forward(self, x):
            rows.append(len(x))
            return super().forward(x)

    fishopt.fisher_diagonal(nn.Sequential(Watched(4, 3)), X[:count], LOSS)
    assert max(rows) <= max(count, 4)  # four by the check of the ways


def test_outputs_may_be_wider_than_parameters():
    """A network that returns its logits in float64."""

    class Wide(nn.Sequential):
        def forward(self, x):
            return super().forward(x).double()

    def build(kind):
        torch.manual_seed(0)
        return kind(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    plain, wide = build(nn.Sequential), build(Wide)
    for function in (fishopt.label_variance, fishopt.variance_bound):
        for estimator in ("I1", "I2", "hutchinson"):
            found = function(wide, X, LOSS, estimator=estimator)
            assert_close(found, function(plain, X, LOSS, estimator=estimator), rtol=1e-4, atol=1e-9)
            assert all(value.dtype == torch.float32 for value in found.values())
    assert_close(fishopt.input_variance_bound(wide, X, LOSS), fishopt.input_variance_bound(plain, X, LOSS), rtol=1e-4)
    fishopt.empirical_error(wide, X, LOSS, Y)
    chosen = [one.estimator for one in fishopt.select_estimators(wide, X, LOSS)]
    assert chosen == [one.estimator for one in fishopt.select_estimators(plain, X, LOSS)]
    for kind in (fishopt.FisherAdam, fishopt.DiagonalNGD):
        optimizer = kind(wide, LOSS)
        LOSS(wide(X), Y).backward()
        optimizer.step()


def test_columns_bound_the_inputs_of_a_chunk(monkeypatch):
    """There may be a column for each output of each input: T^2 numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 20))
    calls = (
        lambda: fishopt.fisher_diagonal(model, X, LOSS, estimator="exact"),
        lambda: fishopt.label_variance(model, X, LOSS, estimator="I1"),
        lambda: fishopt.variance_bound(model, X, LOSS, estimator="hutchinson"),
        lambda: fishopt.input_variance_bound(model, X, LOSS),
    )
    seen = []
    monkeypatch.setattr(Categorical, "factor", _noting(Categorical.factor, seen))
    whole = [call() for call in calls]
    assert max(seen) == len(X)
    seen.clear()
    monkeypatch.setattr("fishopt.batch.MAX_ELEMENTS", 3 * 20**2)
    for call, expected in zip(calls, whole, strict=True):
        assert_close(call(), expected, rtol=1e-4, atol=1e-9)
    assert max(seen) <= 3


def _noting(factor, seen):
    def noted(self, h):
        seen.append(len(h))
        return factor(self, h)

    return noted


def test_a_shadow_has_parameters_of_its_own_where_the_forward_changes_them():
    table = nn.Embedding(6, 4, max_norm=0.5)
    shadow = Shadow(nn.Sequential(table, nn.Linear(4, 3)))
    assert shadow.parameters["0.weight"].data_ptr() != table.weight.data_ptr()
    assert shadow.parameters["1.weight"].data_ptr() == shadow._originals["1.weight"].data_ptr()


class Telling(nn.Module):
    """Writes what another module reads, into what both keep."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.told = {"dict": {}, "list": [], "deque": deque(maxlen=1), "tensor": torch.zeros(4), "buffer": self.scale}[
            how
        ]

    def forward(self, x):
        h = self.linear(x).tanh()
        if self.how == "dict":
            self.told["h"] = h
        elif self.how in ("list", "deque"):
            self.told.clear()
            self.told.append(h)
        else:
            with torch.no_grad():
                (self.told if self.how == "tensor" else self.scale).fill_(3.0)
        return h


class Told(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.last = Telling(how), nn.Linear(4, 3)
        self.told = self.first.told

    def forward(self, x):
        h = self.first(x)
        return self.last(h * (self.told["h"] if self.first.how == "dict" else self.told[-1]))


@pytest.mark.parametrize("how", ["dict", "list", "deque", "tensor", "buffer"])
def test_what_modules_share_they_share_in_the_copy(how):
    torch.manual_seed(0)
    model = Told(how).double()
    x = X.double()
    if how in ("tensor", "buffer"):  # which `double` has made others of
        model.first.told = model.told = model.first.scale if how == "buffer" else torch.zeros(4).double()
    LOSS(model(x), Y).backward()  # what they keep holds activations from here on
    found = fishopt.fisher_diagonal(model, x, LOSS, estimator="exact")
    grads = []
    for row in x:
        h = model(row[None])
        own = [torch.autograd.grad(h[0, k], list(model.parameters()), retain_graph=True) for k in range(3)]
        probability = h.softmax(-1)[0]
        factor = torch.diag(probability) - probability[:, None] * probability
        stacked = [torch.stack(parts) for parts in zip(*own, strict=True)]
        grads.append([torch.einsum("k...,kl,l...->...", g, factor, g) for g in stacked])
    means = [sum(parts) / len(x) for parts in zip(*grads, strict=True)]
    assert_close(found, dict(zip(dict(model.named_parameters()), means, strict=True)))
    optimizer = fishopt.FisherAdam(model, LOSS)
    for _ in range(3):
        optimizer.zero_grad()
        LOSS(model(x), Y).backward()
        optimizer.step()
    shadow = optimizer._curvature._shadow
    shadow.sync()
    assert shadow.module.told is shadow.module.first.told
    if how == "buffer":
        assert shadow.module.told is shadow.module.first.scale
    with torch.no_grad():
        torch.testing.assert_close(shadow.run(Arguments((x,))), model(x))


def test_a_large_vocabulary_is_looked_through_once(monkeypatch):
    model = nn.Linear(4, 3)
    model.words = {str(i): i for i in range(1000)}
    model.cache = torch.zeros(3)
    shadow = Shadow(model)
    shadow.sync()
    cache, looked = shadow.module.cache, []
    monkeypatch.setattr("fishopt.passes.plain.tree_leaves", lambda x: looked.append(x) or tree_leaves(x))
    shadow.sync()
    assert model.words not in looked
    assert shadow.module.cache is cache  # nor is a tensor copied that nobody has changed
    model.cache.fill_(2.0)
    shadow.sync()
    assert shadow.module.cache.eq(2.0).all()


def test_inputs_that_are_coupled_stay_together(monkeypatch):
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 20)

        def forward(self, x):
            h = self.a(x).tanh()
            return self.b(h - h.mean(0))

    torch.manual_seed(0)
    model = Coupled()
    whole = [fishopt.fisher_diagonal(model, X, LOSS, estimator=which, generator=_seeded()) for which in ("exact", "I1")]
    monkeypatch.setattr("fishopt.batch.MAX_ELEMENTS", 3 * 20**2)
    monkeypatch.setattr("fishopt.batch.MAX_ACTIVATIONS", 60)
    for which, expected in zip(("exact", "I1"), whole, strict=True):
        assert_close(fishopt.fisher_diagonal(model, X, LOSS, estimator=which, generator=_seeded()), expected)


def _seeded():
    return torch.Generator().manual_seed(3)
