"""What a state that does not fit gets: loading is all or nothing, and two optimizers do not share one."""

import copy

import pytest
import torch
from torch import nn

import fishopt
from tests.bad_input_setup import BOTH, CE, MODEL, NAN, X, Y, _held, _same, _trained


@pytest.mark.parametrize("kind", BOTH)
def test_two_optimizers_do_not_share_a_state(kind):
    optimizer = _trained(kind, copy.deepcopy(MODEL))
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(optimizer)


def _others(kind):
    wider = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    other = {fishopt.FisherAdam: fishopt.DiagonalNGD, fishopt.DiagonalNGD: fishopt.FisherAdam}[kind]
    model = copy.deepcopy(MODEL)
    grouped = kind(model, CE, params=[{"params": layer.parameters()} for layer in (model[0], model[2])])
    return [
        (_trained(kind, wider).state_dict(), r"another model.*\(5, 4\).*\(3, 4\)"),
        (_trained(kind, nn.Linear(4, 3)).state_dict(), "another model"),
        (grouped.state_dict(), "other parameter groups.*2, 2 parameters.*4 here"),
        (_trained(other, copy.deepcopy(MODEL)).state_dict(), other.__name__),
        (torch.optim.AdamW(MODEL.parameters()).state_dict(), "'fishopt'"),
        ({}, "'fishopt'.*state_dict"),
        (None, "state_dict is a NoneType"),
        ([], "state_dict is a list"),
        ("checkpoint.pt", "state_dict is a str"),
    ]


OWN = ("optimizer", "names", "shapes", "steps", "is_fresh", "moment", "seconds", "curvature")
CURVATURE = ("generator", "failures", "seconds", "next_selection", "noise", "choices", "history")
KEPT = ("step", "refreshes", "exp_avg", "fisher", "preconditioner")
MISSING = [
    *[(key,) for key in ("state", "param_groups", "fishopt")],
    *[("fishopt", key) for key in OWN],
    *[("fishopt", "curvature", key) for key in CURVATURE],
    *[("state", 0, key) for key in KEPT],
    ("param_groups", 0, "params"),
]
JUNK = [
    *[(key,) for key in ("state", "param_groups", "fishopt")],
    *[("fishopt", key) for key in OWN],
    *[("fishopt", "curvature", key) for key in CURVATURE if key != "history"],
    *[("state", 0), ("param_groups", 0)],
    *[("state", 0, key) for key in KEPT],
    *[("param_groups", 0, key) for key in ("params", "lr", "estimator", "maximize", "weight_decay")],
]
WRONG = [
    (("fishopt", "steps"), -1, "steps=-1.*>= 0"),
    (("fishopt", "steps"), 1.5, "steps=1.5.*whole number"),
    (("fishopt", "seconds"), NAN, "seconds=nan"),
    (("fishopt", "curvature", "choices"), [{"estimator": "I9"}], "estimator='I9'.*'I1'"),
    (("fishopt", "curvature", "failures"), [0, -1], "failures=-1"),
    (("param_groups",), [], "parameter groups"),
    (("param_groups", 0, "params"), [0, 1], "parameter group"),
    (("param_groups", 0, "lr"), -1.0, "lr=-1.0.*>= 0"),
    (("param_groups", 0, "estimator"), "I9", "estimator='I9'.*'auto'"),
    (("state", 0, "step"), -1, "'0.weight': step=-1"),
    *[
        (("state", 0, key), torch.zeros(7, 7), rf"'0.weight': {key} of shape \(7, 7\).*\(3, 4\)")
        for key in ("exp_avg", "fisher", "preconditioner")
    ],
]


def _damaged(state, path, value=None):
    state = copy.deepcopy(state)
    *parents, last = path
    inner = state
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return state


def _refuses(optimizer, state, match):
    before, held = _held(optimizer), optimizer.param_groups
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.load_state_dict(state)
    assert _same(_held(optimizer), before)
    assert optimizer.param_groups is held


@pytest.mark.parametrize("kind", BOTH)
def test_loading_is_all_or_nothing(kind):
    """The state of another model or optimizer, and a damaged one; training goes on as if there had been no attempt."""
    model, optimizer = (pair := copy.deepcopy((m := copy.deepcopy(MODEL), _trained(kind, m))))
    good = _trained(kind, copy.deepcopy(MODEL)).state_dict()
    for state, match in _others(kind):
        _refuses(optimizer, state, match)
    for path in MISSING:
        match = "'fishopt'" if path == ("fishopt",) else f"lacks '{path[-1]}'.*damaged"
        damaged = _damaged(good, path)
        if path == ("fishopt",):  # and its copy
            damaged = _damaged(damaged, ("param_groups", 0, "fishopt"))
        _refuses(optimizer, damaged, match)
    for path in JUNK:
        _refuses(optimizer, _damaged(good, path, "junk"), "state.dict|lr=|estimator=|maximize=|weight_decay=")
    for path, value, match in WRONG:
        _refuses(optimizer, _damaged(good, path, value), match)
    if kind is fishopt.DiagonalNGD:
        _refuses(optimizer, _damaged(good, ("state", 0, "peak"), "junk"), "'0.weight': peak=")
    untouched, other = copy.deepcopy(pair)
    for trained, by in ((model, optimizer), (untouched, other)):
        by.zero_grad()
        CE(trained(X), Y).backward()
        by.step()
    assert _same(model.state_dict(), untouched.state_dict())
    optimizer.load_state_dict(good)
    assert _same(optimizer.state_dict(), good)


@pytest.mark.parametrize("kind", BOTH)
def test_an_option_that_a_checkpoint_lacks_stays_as_it_is(kind):
    good = _trained(kind, copy.deepcopy(MODEL)).state_dict()
    optimizer = kind(copy.deepcopy(MODEL), CE, damping=0.25)
    optimizer.load_state_dict(_damaged(good, ("param_groups", 0, "damping")))
    assert optimizer.param_groups[0]["damping"] == 0.25
