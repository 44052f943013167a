"""What bad options get from optimizers: an error that names the option and its value, and no trace in the model."""

import copy
import math

import pytest
import torch
from torch import nn

import fishopt
from tests.bad_input_setup import (
    BOTH,
    CE,
    MODEL,
    NAN,
    Sparse,
    _frozen,
    _held,
    _in_inference_mode,
    _same,
    _scripted,
    _sparse_weight,
)

OPTION_ROWS = [
    *[(BOTH, {name: value}, name) for name in ("lr", "weight_decay") for value in (-1e-3, NAN, math.inf, "fast")],
    (BOTH, {"weight_decay": None}, "weight_decay=None"),
    (BOTH, {"params": lambda m: [{"params": m.parameters(), "lr": None}]}, "lr=None.*>= 0"),
    ([fishopt.DiagonalNGD], {"lr": None}, "lr=None"),
    *[(BOTH, {"refresh_every": value}, "refresh_every") for value in (0, -1, 1.5, True, None)],
    *[([fishopt.FisherAdam], {"warmup": value}, "warmup=.*whole number >= 0") for value in (-1, 1.5, True, None)],
    *[(BOTH, {"refresh_inputs": value}, "refresh_inputs") for value in (0, 2.0)],
    (BOTH, {"estimator": "I3"}, "estimator='I3'"),
    (BOTH, {"estimator": ("I1", "I2")}, "estimator="),
    (BOTH, {"criterion": "best"}, "criterion='best'"),
    (BOTH, {"generator": 3}, "generator=3"),
    (BOTH, {"params": []}, "params is empty"),
    (BOTH, {"params": [torch.zeros(3, requires_grad=True)]}, "not a parameter of model"),
    (BOTH, {"params": [{"params": [nn.Parameter(torch.zeros(2))]}]}, "not a parameter of model"),
    (BOTH, {"params": [3]}, "params"),
    *[(BOTH, {"lr": v}, "lr=.*finite number >= 0") for v in (True, 1j, [], torch.ones(2), torch.tensor(NAN), 10**30)],
    *[(BOTH, {"weight_decay": v}, "weight_decay=.*finite number >= 0") for v in (True, torch.tensor(-1.0))],
    *[(BOTH, {"damping": v}, "damping=.*finite number >") for v in (NAN, math.inf, "x", None, True, 10**30)],
    *[(BOTH, {"refresh_every": v}, "refresh_every=.*whole number >= 1") for v in (math.inf, torch.tensor(3), "5")],
    *[(BOTH, {"refresh_inputs": v}, "refresh_inputs=.*whole number >= 1") for v in (True, -1, "all")],
    *[(BOTH, {"estimator": v}, "estimator=.*'auto'") for v in (None, 3, torch.ones(2))],
    *[(BOTH, {"criterion": v}, "criterion=.*'efficiency'") for v in (None, 0)],
    *[(BOTH, {"maximize": v}, "maximize=.*True or False") for v in ("no", None, 1)],
    *[(BOTH, {"output": v}, "output=.*function of the model's output, a key") for v in (1.5, True, ["logits"])],
    (BOTH, {"generator": "cpu"}, "generator='cpu'.*torch.Generator"),
    (BOTH, {"params": 3}, "params is a int.*list"),
    (BOTH, {"params": "0.weight"}, "params is a str.*list"),
    (BOTH, {"params": {"params": []}}, "params is a dict.*list"),
    (BOTH, {"params": set()}, "params is a set.*list"),
    (BOTH, {"params": iter(())}, "params is empty.*leave it out"),
    (BOTH, {"params": [{"params": []}]}, "params is empty.*leave it out"),
    (BOTH, {"params": [{}]}, "params holds a group {}.*'params'"),
    (BOTH, {"params": [{"params": None}]}, "params is a NoneType.*list"),
    (BOTH, {"params": [None]}, "params holds a NoneType.*parameters"),
    (BOTH, {"params": ["0.weight"]}, "params holds a str.*parameters"),
    (BOTH, {"params": lambda m: nn.Sequential(nn.Linear(2, 2))}, "params holds a Linear.*parameters"),
    (BOTH, {"params": torch.ones(2)}, r"params.*\(2,\).*not a parameter of model"),
    (BOTH, {"params": lambda m: [m[0].weight * 1]}, r"params.*\(3, 4\).*not a parameter of model"),
    (BOTH, {"params": lambda m: [m[0].weight, {"params": [m[0].bias]}]}, "params.*groups and parameters"),
    (BOTH, {"params": lambda m: [{"params": [m[0].weight]}, {"params": [m[0].weight]}]}, "more than one"),
    (BOTH, {"params": lambda m: [{"params": m.parameters(), "lr": NAN}]}, "lr=nan.*>= 0"),
    (BOTH, {"params": lambda m: [{"params": m.parameters(), "estimator": "I9"}]}, "estimator='I9'.*'auto'"),
    (BOTH, {"params": lambda m: [{"params": m.parameters(), "maximize": "x"}]}, "maximize='x'.*True or False"),
    *[(BOTH[:1], {"betas": v}, "betas=.*pair") for v in ("ab", None, (0.9,), (0.9, 0.9, 0.9), torch.ones(2))],
    *[(BOTH[:1], {"betas": v}, r"betas\[0\]=.*>= 0 and < 1") for v in ((NAN, 0.9), (True, 0.9), ("a", 0.9))],
    *[(BOTH[:1], {"eps": v}, "eps=.*finite number >= 0") for v in (None, NAN, math.inf)],
    *[(BOTH[:1], {"clip": v}, "clip=.*finite number > 0") for v in (None, NAN, -1.0, True)],
    *[(BOTH[1:], {name: v}, f"{name}=.*< 1") for name in ("momentum", "decay") for v in (NAN, 1.0, -0.1, None, "a")],
    *[(BOTH[1:], {"kl_radius": v}, "kl_radius=.*finite number > 0") for v in (NAN, -1.0, None)],
    (BOTH[:1], {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
    (BOTH[:1], {"betas": (-0.1, 0.9)}, r"betas\[0\]=-0.1"),
    (BOTH[:1], {"betas": 0.9}, "betas=0.9"),
    (BOTH[:1], {"eps": -1e-8}, "eps"),
    (BOTH[:1], {"damping": -1.0}, "damping"),
    (BOTH[:1], {"clip": 0.0}, "clip"),
    (BOTH[1:], {"damping": 0.0}, "damping"),
    (BOTH[1:], {"momentum": 1.0}, "momentum=1.0"),
    (BOTH[1:], {"decay": -0.5}, "decay=-0.5"),
    (BOTH[1:], {"kl_radius": 0}, "kl_radius=0"),
]


@pytest.mark.parametrize("row", OPTION_ROWS, ids=[str(i) for i in range(len(OPTION_ROWS))])
def test_constructors_refuse_and_leave_no_hook(row):
    kinds, options, match = row
    for kind in kinds:
        model, loss_fn = copy.deepcopy(MODEL), nn.CrossEntropyLoss()
        given = {
            name: value(model) if name == "params" and callable(value) else value for name, value in options.items()
        }
        before = torch.get_rng_state()
        with pytest.raises((ValueError, TypeError), match=match):
            kind(model, loss_fn, **given)
        assert not model._forward_hooks
        assert not loss_fn._forward_hooks
        assert _same(model.state_dict(), MODEL.state_dict())
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", BOTH)
def test_constructor_refuses_models_and_likelihoods(kind):
    for model, likelihood, match in (
        (MODEL.parameters(), CE, "model="),
        (_frozen(), CE, "no trainable parameter"),
        (nn.LazyLinear(3), CE, "not initialized"),
        (MODEL, nn.TripletMarginLoss(), "TripletMarginLoss"),
        (MODEL, None, "likelihood=None"),
        (MODEL, fishopt.Categorical, "likelihood=Categorical is a class"),
        (MODEL, nn.CrossEntropyLoss(torch.ones(3)), "likelihood=.*weight="),
        (_scripted(), CE, "model is a ScriptModule.*nn.Module"),
        (nn.Sequential(_scripted()), CE, "model part '0' is a ScriptModule"),
        (nn.Linear(4, 3, device="meta"), CE, "'weight' is on the meta device.*to_empty"),
        (nn.Linear(4, 3, dtype=torch.complex64), CE, "'weight' is complex.*real"),
        (_sparse_weight(), CE, "'weight' is sparse.*dense"),
        (Sparse(), CE, "'table'.*sparse=False"),
        (_in_inference_mode(), CE, "'weight' was made in inference mode"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), CE, "'1'.*couples"),
    ):
        before = torch.get_rng_state()
        with pytest.raises((ValueError, TypeError), match=match):
            kind(model, likelihood)
        assert not getattr(model, "_forward_hooks", ())
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", BOTH)
def test_add_param_group_refuses_and_changes_nothing(kind):
    model = copy.deepcopy(MODEL)
    optimizer = kind(model, CE, params=[{"params": model[0].parameters()}])
    for group, match in (
        ({"params": [torch.zeros(2)]}, "not a parameter"),
        ({"params": model[2].parameters(), "lr": -1.0}, "lr=-1.0"),
        ({"params": model[2].parameters(), "estimator": "I3"}, "estimator='I3'"),
        ({"params": model[0].parameters()}, "more than one"),
        ({"params": model[2].parameters(), "maximize": 1}, "maximize=1.*True or False"),
        ({"params": model[2].parameters(), "lr": NAN}, "lr=nan.*>= 0"),
        ({"params": [model[2].weight * 1]}, r"\(3, 3\).*not a parameter"),
        ({"params": set(model[2].parameters())}, "params is a set.*list"),
        ({"params": model[2]}, "params is a Linear.*list"),
        ({"params": ["2.weight"]}, "params holds a str"),
        ({"params": None}, "params is a NoneType.*list"),
        ({"lr": 0.1}, "params.*'params'"),
        ({}, "params.*'params'"),
        ([model[2].weight], "param_group is a list.*dict"),
        (None, "param_group is a NoneType.*dict"),
    ):
        before = _held(optimizer)
        with pytest.raises((ValueError, TypeError), match=match):
            optimizer.add_param_group(group)
        assert _same(_held(optimizer), before)
