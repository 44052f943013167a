"""What bad models and inputs get in training: refused by name at a step or a refresh, before anything has happened."""

import copy

import pytest
import torch
from torch import nn

from tests.bad_input_setup import (
    BOTH,
    CE,
    IN_PLACE,
    MODEL,
    NAN,
    Lambda,
    X,
    Y,
    _held,
    _same,
    _trained,
    _with_lock,
)

MODELS_AT_THE_FIRST_STEP = [
    (_with_lock, "model cannot be copied.*lock"),
    (lambda: copy.deepcopy(IN_PLACE), "model changes its inputs.*inplace=False"),
    (lambda: Lambda(lambda h: (h,)), "model output is a tuple.*one tensor"),
    (lambda: Lambda(lambda h: h[:, :1]), r"\(2, 1\).*Bernoulli"),  # of two of the inputs
]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("row", MODELS_AT_THE_FIRST_STEP, ids=["lock", "in place", "tuple", "one column"])
def test_models_are_refused_at_the_first_step_and_stay_as_they_are(kind, row):
    build, match = row
    model = build()
    optimizer = kind(model, CE)
    output = model(X.clone())
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    before = _held(optimizer)
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.step()
    after = _held(optimizer)
    assert _same(after[:2], before[:2])
    assert not optimizer.state
    assert _same(after[3:], before[3:])


@pytest.mark.parametrize("kind", BOTH)
def test_unusual_models_that_work(kind):
    """Quantities of data parallel models, of models that share memory, and with parts that are not trained."""
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = nn.Parameter(tied[0].weight.data)
    part = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.ReLU(inplace=True), nn.Linear(4, 3))
    first = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    for model in (nn.DataParallel(copy.deepcopy(MODEL)), tied, part, first):
        optimizer = kind(model, CE)
        before = copy.deepcopy(model.state_dict())
        CE(model(X.clone()), Y).backward()
        optimizer.step()
        assert not _same(model.state_dict(), before)
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", BOTH)
def test_step_before_any_forward_names_refresh(kind):
    model = copy.deepcopy(MODEL)
    optimizer = kind(model, CE)
    with pytest.raises(ValueError, match="refresh"):
        optimizer.step()
    CE(model(X), Y).backward()
    optimizer.step()


class Constant(nn.Linear):
    """Called with a number."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, count):
        return super().forward(torch.ones(count, 4))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, factor=None):
        return self.layer(x) if factor is None else factor * self.layer(x)


@pytest.mark.parametrize("kind", BOTH)
def test_arguments_without_rows_name_refresh(kind):
    model = Scaled()
    optimizer = kind(model, CE)
    CE(model(x=X), Y).backward()
    optimizer.step()
    CE(model(X, factor=2.0), Y).backward()
    optimizer.step()
    model = Constant()
    optimizer = kind(model, CE)
    model(3).sum().backward()
    with pytest.raises(ValueError, match=r"row for each input.*refresh"):
        optimizer.step()


@pytest.mark.parametrize("kind", BOTH)
def test_refresh_refuses_bad_inputs(kind):
    optimizer = kind(copy.deepcopy(MODEL), CE)
    for inputs, error, match in (
        ((torch.full((2, 4), NAN),), ValueError, "NaN"),
        ((torch.zeros(0, 4),), ValueError, "empty"),
        ((), ValueError, "empty"),
        (("text",), TypeError, "inputs holds a str"),
        (([X],), TypeError, "inputs holds a list.*tensor"),
        ((X.numpy(),), TypeError, "inputs holds a ndarray.*tensor"),
        ((torch.tensor(1.0),), ValueError, "without dimensions.*row"),
        ((X, X[:2]), ValueError, r"rows \[2, 5\].*one row per input"),
        ((X, X), ValueError, "could not be run"),
        ((torch.zeros(2, 7),), ValueError, r"could not be run.*\(2, 7\)"),
        ((torch.ones(2, 4, dtype=torch.long),), ValueError, "could not be run.*int64"),
        ((X.to("meta"),), ValueError, "inputs holds.*meta device"),
        ((X.to_sparse(),), TypeError, "inputs holds a sparse tensor"),
        ((X / 0,), ValueError, "inputs contains NaN or infinite"),
    ):
        before = _held(optimizer)
        with pytest.raises(error, match=match):
            optimizer.refresh(*inputs)
        after = _held(optimizer)
        assert _same(after[:2], before[:2])
        assert _same(after[4], before[4])
        assert _same(after[2]["fishopt"]["curvature"]["generator"], before[2]["fishopt"]["curvature"]["generator"])
    assert not optimizer.state


@pytest.mark.parametrize("kind", BOTH)
def test_outputs_that_do_not_fit_are_refused_at_the_first_step(kind):
    model = nn.Linear(4, 1)
    optimizer = kind(model, CE)
    model(X).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="Categorical"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    assert not optimizer.state


@pytest.mark.parametrize("kind", BOTH)
def test_closures(kind):
    """No function is refused; what one raises is the user's, and nothing has happened by then."""
    optimizer = _trained(kind, copy.deepcopy(MODEL))

    def failing():
        raise KeyError("data")

    for closure, error, match in (
        (3, TypeError, "closure=3.*function"),
        ("loss", TypeError, "closure='loss'.*function"),
        (failing, KeyError, "data"),
    ):
        before = _held(optimizer)
        with pytest.raises(error, match=match):
            optimizer.step(closure)
        assert _same(_held(optimizer), before)


@pytest.mark.parametrize("kind", BOTH)
def test_sparse_gradients_are_refused_by_name(kind):
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = kind(model, CE)
    model(X)
    model[0].weight.grad = torch.zeros(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match=r"0\.weight.*sparse"):
        optimizer.step()
