"""What bad input gets from functions: a ValueError or TypeError that names the argument, its value and the mend."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fishopt
from tests.bad_input_setup import (
    CE,
    IN_PLACE,
    MODEL,
    Lambda,
    Sparse,
    X,
    Y,
    _frozen,
    _in_inference_mode,
    _same,
    _scripted,
    _sparse_weight,
    _with_lock,
)


def _closure_model():
    model = nn.Sequential(nn.Linear(4, 3))
    layer = model[0]
    model.forward = lambda x: layer(x)
    return model


def _with_nan():
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


def _at_positions(h):
    return h[:, None].repeat(1, 4, 1)


def _nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.nested.nested_tensor([X[0], X[1]])


def _quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


OVERWRITING = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.ReLU(inplace=True))
IGNORING = torch.tensor([0, 1, -100, 1, 2])


def fisher(model=MODEL, inputs=X, likelihood=CE, **options):
    return fishopt.fisher_diagonal(model, inputs, likelihood, **options)


FUNCTION_ROWS = [
    (lambda: fisher(estimator="I3"), ValueError, "estimator='I3'.*'I1'"),
    (lambda: fisher(estimator=None), ValueError, "estimator=None"),
    (lambda: fisher(likelihood="laplace"), ValueError, "likelihood='laplace'.*poisson"),
    (lambda: fisher(likelihood=nn.L1Loss()), ValueError, "L1Loss"),
    (lambda: fisher(likelihood=7), TypeError, "likelihood=7"),
    (lambda: fisher(samples=0), ValueError, "samples=0"),
    (lambda: fisher(samples=1.5), ValueError, "samples=1.5"),
    (lambda: fisher(samples=True), ValueError, "samples=True"),
    (lambda: fisher(generator=3), TypeError, "generator=3"),
    (lambda: fisher(model=MODEL.parameters()), TypeError, "model="),
    (lambda: fisher(model=_frozen()), ValueError, "no trainable parameter"),
    (lambda: fisher(model=nn.ReLU()), ValueError, "no trainable parameter"),
    (lambda: fisher(model=nn.LazyLinear(3)), ValueError, "not initialized"),
    (lambda: fisher(model=nn.Linear(4, 3, dtype=torch.complex64)), TypeError, "weight.*complex"),
    (lambda: fisher(model=Sparse(), inputs=torch.zeros(2, dtype=torch.long)), TypeError, "table.*sparse"),
    (
        lambda: fisher(model=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))),
        ValueError,
        "'1'.*couples",
    ),
    (lambda: fisher(model=_closure_model()), ValueError, "past its modules"),
    (lambda: fisher(model=Lambda(torch.detach)), ValueError, "does not depend"),
    (lambda: fisher(model=Lambda(lambda h: (h, h))), ValueError, "output is a tuple"),
    (lambda: fisher(model=Lambda(lambda h: None)), ValueError, "output is a NoneType"),
    (lambda: fisher(model=Lambda(torch.sum)), ValueError, r"output has shape \(\)"),
    (lambda: fisher(model=Lambda(lambda h: h.flatten())), ValueError, "output has shape.*Categorical"),
    (lambda: fisher(model=Lambda(lambda h: h.flatten()), likelihood="gaussian"), ValueError, "15 rows for 5 inputs"),
    (lambda: fisher(model=nn.Linear(4, 1)), ValueError, r"\(5, 1\).*Bernoulli"),
    (lambda: fisher(inputs=torch.zeros(0, 4)), ValueError, "inputs is empty"),
    (lambda: fisher(inputs=()), ValueError, "inputs=.*empty"),
    (lambda: fisher(inputs=[[1.0, 2.0]]), TypeError, "inputs holds a list"),
    (lambda: fisher(inputs=None), TypeError, "inputs holds a NoneType"),
    (lambda: fisher(inputs=torch.tensor(1.0)), ValueError, "without dimensions"),
    (lambda: fisher(inputs=(X, X[:2])), ValueError, r"\[2, 5\]"),
    (lambda: fisher(inputs=torch.full((2, 4), math.nan)), ValueError, "inputs contains NaN"),
    (lambda: fisher(inputs=torch.full((2, 4), math.inf)), ValueError, "inputs contains NaN or inf"),
    (lambda: fisher(inputs=torch.zeros(2, 7)), ValueError, r"could not be run.*\(2, 7\)"),
    (lambda: fisher(inputs=X.double()), ValueError, "could not be run.*float64"),
    (lambda: fisher(model=Lambda(lambda h: h / 0)), ValueError, "output contains NaN"),
    (lambda: fisher(targets=Y.float()), ValueError, "targets.*empirical"),
    (lambda: fisher(estimator="empirical"), ValueError, "targets=None"),
    (lambda: fisher(estimator="empirical", targets=[0, 1]), TypeError, "targets is a list"),
    (lambda: fisher(estimator="empirical", targets=Y[:2]), ValueError, r"\(2,\) for 5 inputs"),
    (lambda: fisher(estimator="empirical", targets=Y + 1), ValueError, "targets contains 3.*0..2"),
    (lambda: fisher(estimator="empirical", targets=Y - 1), ValueError, "targets contains -1"),
    (lambda: fisher(estimator="empirical", targets=Y[:, None]), ValueError, r"\(5, 1\)"),
    (lambda: fisher(estimator="empirical", targets=Y.float()), ValueError, "class indices"),
    (lambda: fisher(estimator="empirical", targets=torch.ones(5, 3)), ValueError, "sum to 1"),
    (lambda: fisher(estimator="empirical", targets=Y, likelihood="bernoulli"), ValueError, "one label per output"),
    (
        lambda: fisher(estimator="empirical", targets=torch.full((5, 3), 2.0), likelihood="bernoulli"),
        ValueError,
        "outside",
    ),
    (lambda: fisher(estimator="empirical", targets=-torch.ones(5, 3), likelihood="poisson"), ValueError, "negative"),
    (
        lambda: fisher(estimator="empirical", targets=X.new_full((5, 3), math.nan), likelihood="gaussian"),
        ValueError,
        "NaN",
    ),
    (lambda: fisher(likelihood=fishopt.Gaussian("estimated")), ValueError, "estimated.*optimizer"),
    (lambda: fishopt.label_variance(MODEL, X, CE, estimator="empirical"), ValueError, "estimator='empirical'"),
    (lambda: fishopt.variance_bound(MODEL, X, CE, estimator="I1", side="left"), ValueError, "side='left'"),
    (lambda: fishopt.variance_bound(MODEL, X, CE, estimator="best"), ValueError, "estimator='best'"),
    (lambda: fishopt.fisher_bound(MODEL, X, CE, side=0), ValueError, "side=0"),
    (lambda: fishopt.joint_variance(MODEL, X, CE, estimator="I1", samples=-1), ValueError, "samples=-1"),
    (lambda: fishopt.trace_bound(MODEL, X, CE, quantity="I3"), ValueError, "quantity='I3'"),
    (lambda: fishopt.trace_bound(MODEL, X, CE, groups={"a": ["9.weight"]}), ValueError, "9.weight"),
    (lambda: fishopt.empirical_error(MODEL, X, CE, [1, 2]), TypeError, "targets is a list"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, criterion="best"), ValueError, "criterion='best'"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, candidates=()), ValueError, "candidates="),
    (lambda: fishopt.select_estimators(MODEL, X, CE, candidates=None), TypeError, "candidates=None"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, candidates=("I1", "empirical")), ValueError, "empirical"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, groups=3), TypeError, "groups=3"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, groups={}), ValueError, "groups is empty"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, groups={"a": None}), ValueError, "'a'"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, groups={"a": [3]}), ValueError, "holds 3"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, groups={"a": [torch.zeros(2)]}), ValueError, r"shape \(2,\)"),
    (
        lambda: fishopt.select_estimators(MODEL, X, CE, groups={"a": ["0.bias"], "b": ["0.bias"]}),
        ValueError,
        "'a' and in 'b'",
    ),
    (lambda: fisher(estimator=["I1"]), ValueError, r"estimator=\['I1'\].*'I1'"),
    (lambda: fisher(estimator="auto"), ValueError, "estimator='auto'.*'I1'"),
    (lambda: fisher(estimator=torch.ones(2)), ValueError, "estimator=tensor.*'I1'"),
    (lambda: fisher(likelihood=None), TypeError, "likelihood=None.*categorical"),
    (lambda: fisher(likelihood=fishopt.Categorical), TypeError, r"likelihood=Categorical is a class.*Categorical\(\)"),
    (lambda: fisher(likelihood=nn.CrossEntropyLoss), TypeError, "likelihood=CrossEntropyLoss is a class"),
    (lambda: fisher(likelihood=nn.functional.cross_entropy), TypeError, "likelihood=<function.*loss module"),
    (lambda: fisher(likelihood=nn.Linear(2, 2)), ValueError, "likelihood=Linear.*fishopt.Categorical"),
    (lambda: fisher(likelihood=nn.NLLLoss()), ValueError, "likelihood=NLLLoss.*CrossEntropyLoss"),
    (
        lambda: fisher(likelihood=nn.PoissonNLLLoss(log_input=False)),
        ValueError,
        "likelihood=PoissonNLLLoss.*log_input=T",
    ),
    (
        lambda: fisher(likelihood=nn.CrossEntropyLoss(torch.ones(3))),
        ValueError,
        r"likelihood=.*weight=.*Categorical\(\)",
    ),
    (lambda: fisher(likelihood=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))), ValueError, "pos_weight=.*Bernoulli"),
    (lambda: fisher(samples=None), ValueError, "samples=None.*1 or more"),
    (lambda: fisher(samples=math.nan), ValueError, "samples=nan.*1 or more"),
    (lambda: fisher(samples="3"), ValueError, "samples='3'.*1 or more"),
    (lambda: fisher(samples=torch.tensor(2)), ValueError, r"samples=tensor\(2\).*1 or more"),
    (lambda: fisher(generator=True), TypeError, "generator=True.*torch.Generator"),
    (lambda: fisher(generator="cpu"), TypeError, "generator='cpu'.*torch.Generator"),
    (lambda: fisher(model=None), TypeError, "model=None.*Module"),
    (lambda: fisher(model=nn.Linear), TypeError, "model=<class.*Module itself"),
    (lambda: fisher(model=_scripted()), TypeError, "model is a ScriptModule.*nn.Module"),
    (lambda: fisher(model=nn.Sequential(_scripted())), TypeError, "model part '0' is a ScriptModule.*nn.Module"),
    (lambda: fisher(model=nn.Linear(4, 3, device="meta")), ValueError, "'weight' is on the meta device.*to_empty"),
    (lambda: fisher(model=_sparse_weight()), TypeError, "'weight' is sparse.*dense"),
    (lambda: fisher(model=_in_inference_mode()), ValueError, "'weight' was made in inference mode.*outside"),
    (lambda: fisher(model=_with_lock()), TypeError, r"model cannot be copied.*lock.*deepcopy\(model\)"),
    (lambda: fisher(model=_with_nan()), ValueError, "model output contains NaN.*parameters"),
    (lambda: fisher(model=IN_PLACE, inputs=X.clone()), ValueError, "model changes its inputs.*inplace=False"),
    (lambda: fisher(model=OVERWRITING), ValueError, "model overwrites.*inplace=False"),
    (lambda: fisher(model=Lambda(lambda h: {"logits": h})), ValueError, "model output is a dict.*one tensor"),
    (lambda: fisher(model=Lambda(lambda h: h.long())), ValueError, "model output.*int64.*real"),
    (lambda: fisher(model=Lambda(lambda h: h > 0)), ValueError, "model output.*bool.*real"),
    (lambda: fisher(model=Lambda(lambda h: torch.complex(h, h))), ValueError, "model output.*complex64.*real"),
    (lambda: fisher(model=Lambda(lambda h: 1 / 0)), ValueError, r"model could not be run.*\(5, 4\).*division"),
    (lambda: fisher(model=Lambda(lambda h: h[:, :0]), likelihood="gaussian"), ValueError, r"\(5, 0\).*one output"),
    (
        lambda: fishopt.label_variance(nn.Linear(4, 5000), X, CE, estimator="I1"),
        ValueError,
        "5,000 outputs.*4,096.*estimator=",
    ),
    (
        lambda: fisher(model=Lambda(lambda h: h[:, None, None].repeat(1, 2, 2, 1))),
        ValueError,
        r"\(5, 2, 2, 3\).*Categorical\(dim=1\)",
    ),
    (lambda: fisher(likelihood=fishopt.Categorical(dim=5)), ValueError, r"\(5, 3\).*Categorical\(dim=5\).*dim="),
    (lambda: fisher(likelihood=fishopt.Categorical(dim=-2)), ValueError, r"\(5, 3\).*dimension -2.*dim="),
    (lambda: fishopt.Categorical(dim=0), ValueError, "dim=0.*-1 for the last"),
    (lambda: fishopt.Categorical(dim=True), ValueError, "dim=True.*-1 for the last"),
    (lambda: fishopt.Categorical(dim=1.0), ValueError, "dim=1.0.*-1 for the last"),
    (lambda: fishopt.Categorical(ignore_index=None), ValueError, "ignore_index=None.*whole number"),
    (lambda: fishopt.Categorical(ignore_index=True), ValueError, "ignore_index=True.*whole number"),
    *[
        (lambda v=v: fishopt.Gaussian(v), ValueError, "variance=.*pass a positive number or 'estimated'")
        for v in (0, -1, math.nan, math.inf, True, None, "big", torch.ones(2), [1.0])
    ],
    (lambda: fishopt.from_loss("mse"), TypeError, "loss='mse'.*CrossEntropyLoss"),
    (lambda: fisher(inputs=torch.ones(5, 4, dtype=torch.long)), ValueError, "could not be run.*int64"),
    (lambda: fisher(inputs=torch.ones(5, 4, dtype=torch.bool)), ValueError, "could not be run.*bool"),
    (lambda: fisher(inputs=X.to(torch.complex64)), ValueError, "could not be run.*complex64"),
    (lambda: fisher(inputs=X.to_sparse()), TypeError, "inputs holds a sparse tensor.*dense"),
    (lambda: fisher(inputs=_nested()), TypeError, "inputs holds a nested tensor.*dense"),
    (lambda: fisher(inputs=_quantized()), TypeError, "inputs holds.*qint8.*float32"),
    (lambda: fisher(inputs=X.to(torch.float8_e4m3fn)), TypeError, "inputs holds.*float8.*float32"),
    (lambda: fisher(inputs=X.to("meta")), ValueError, "inputs holds.*meta device.*values"),
    (lambda: fisher(inputs=X.numpy()), TypeError, "inputs holds a ndarray.*tensor"),
    (lambda: fisher(inputs="abc"), TypeError, "inputs holds a str.*tensor"),
    (lambda: fisher(inputs={}), ValueError, "inputs={} is empty.*tensor"),
    (lambda: fisher(inputs={"input": 3}), TypeError, "inputs holds a int.*tensor"),
    (lambda: fisher(inputs={"z": X}), ValueError, "could not be run.*'z'"),
    (lambda: fisher(inputs=(X, X)), ValueError, r"could not be run.*\(5, 4\).*\(5, 4\)"),
    # What has no passes of its own runs the model all the same.
    (lambda: fishopt.label_variance(MODEL, X.double(), CE, estimator="exact"), ValueError, "could not be run.*float64"),
    (lambda: fishopt.variance_bound(MODEL, X[:, :2], CE, estimator="exact"), ValueError, r"could not be run.*\(5, 2\)"),
    (lambda: fisher(targets=torch.full((5,), -100)), ValueError, "targets holds nothing but.*some label counts"),
    (lambda: fisher(targets=torch.tensor([0, 9, -100, 1, 2])), ValueError, "targets contains 9.*0..2"),
    (lambda: fisher(targets=IGNORING, likelihood="bernoulli"), ValueError, "targets is for estimator='empirical'"),
    (lambda: fisher(targets=IGNORING, likelihood=fishopt.Categorical(ignore_index=1)), ValueError, "contains -100"),
    (
        lambda: fisher(model=Lambda(_at_positions), targets=torch.ones(5, 3, dtype=torch.long)),
        ValueError,
        r"targets has shape \(5, 3\).*one class index per position, shape \(5, 4\)",
    ),
    (
        lambda: fisher(model=Lambda(_at_positions), targets=torch.full((5, 4), 7)),
        ValueError,
        "targets contains 7.*0..2",
    ),
    (lambda: fisher(estimator="empirical", targets=IGNORING - 1), ValueError, "targets contains -"),
    (lambda: fisher(estimator="empirical", targets=torch.tensor(1)), ValueError, r"targets has shape \(\).*one label"),
    (lambda: fisher(estimator="empirical", targets=Y.to("meta")), ValueError, "targets holds.*meta device"),
    (lambda: fisher(estimator="empirical", targets=Y.to_sparse()), TypeError, "targets holds a sparse tensor.*dense"),
    (lambda: fisher(estimator="empirical", targets=Y.to(torch.complex64)), ValueError, "targets has type.*complex64"),
    (lambda: fisher(estimator="empirical", targets="01201"), TypeError, "targets is a str.*tensor"),
    (lambda: fishopt.label_variance(MODEL, X, CE, estimator=None), ValueError, "estimator=None.*'I1'"),
    (lambda: fishopt.variance_bound(MODEL, X, CE, estimator="I1", tight="no"), TypeError, "tight='no'.*True or False"),
    (lambda: fishopt.fisher_bound(MODEL, X, CE, tight=None), TypeError, "tight=None.*True or False"),
    (lambda: fishopt.input_variance_bound(MODEL, X, CE, tight=torch.ones(2)), TypeError, "tight=tensor.*True or False"),
    (lambda: fishopt.trace_bound(MODEL, X, CE, full_spectrum=2), TypeError, "full_spectrum=2.*True or False"),
    (lambda: fishopt.trace_bound(MODEL, X, CE, side="up"), ValueError, "side='up'.*'lower', 'upper'"),
    (lambda: fishopt.trace_bound(MODEL, X, CE, groups=[3]), TypeError, r"groups\['group 0'\]=3.*list"),
    (lambda: fishopt.trace_bound(MODEL, X, CE, groups="0.weight"), TypeError, "groups='0.weight'.*dict"),
    (lambda: fishopt.joint_variance(MODEL, X, CE, estimator="empirical"), ValueError, "estimator='empirical'.*'I1'"),
    (lambda: fishopt.joint_variance(MODEL, X, CE, estimator="I1", samples=2.0), ValueError, "samples=2.0.*1 or more"),
    (lambda: fishopt.empirical_error(MODEL, X, CE, None), TypeError, "targets is a NoneType.*tensor"),
    (lambda: fishopt.empirical_error(MODEL, X, CE, Y[:2]), ValueError, r"targets has shape \(2,\) for 5 inputs"),
    (lambda: fishopt.empirical_error(MODEL, X, CE, Y + 5), ValueError, "targets contains 5.*0..2"),
    (lambda: fishopt.empirical_error(MODEL, [], CE, Y), ValueError, r"inputs=\[\] is empty.*tensor"),
    (lambda: fishopt.empirical_error(MODEL, X * math.nan, CE, Y), ValueError, "inputs contains NaN.*remove"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, criterion=None), ValueError, "criterion=None.*'bound'"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, candidates="I1I2"), ValueError, "candidates='I1I2'.*'I1'"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, candidates=["I1", 3]), ValueError, "candidates=3.*'I1'"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, groups={"a": 3}), TypeError, r"groups\['a'\]=3.*list"),
    (lambda: fishopt.select_estimators(MODEL, X, CE, groups=torch.ones(2)), TypeError, "groups=tensor.*dict"),
    (
        lambda: fishopt.select_estimators(MODEL, X, CE, groups={"a": ["0.bias", "0.bias"]}),
        ValueError,
        "0.bias.*keep it",
    ),
]


@pytest.mark.parametrize("row", FUNCTION_ROWS, ids=[str(i) for i in range(len(FUNCTION_ROWS))])
def test_functions(row):
    call, error, match = row
    weights, mode = copy.deepcopy(MODEL.state_dict()), MODEL.training
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        call()
    assert isinstance(caught.value, error)
    assert _same(MODEL.state_dict(), weights)
    assert MODEL.training == mode
    assert not any(module._forward_hooks for module in MODEL.modules())
    assert all(p.grad is None for p in MODEL.parameters())


def test_an_array_is_no_variance():
    with pytest.raises(ValueError, match=r"variance=array\(\[0.5, 1. \]\): pass a positive number or 'estimated'"):
        fishopt.Gaussian(np.array([0.5, 1.0]))


def test_the_default_device_is_of_no_effect():
    """Where the model and the inputs are is where all is computed."""
    functions = (
        lambda: fisher(estimator="exact"),
        lambda: fishopt.label_variance(MODEL, X, CE, estimator="I1"),
        lambda: [one.scores for one in fishopt.select_estimators(MODEL, X, CE, criterion="efficiency")],
    )
    expected = [function() for function in functions]
    with torch.device("meta"):
        found = [function() for function in functions]
    assert str(found) == str(expected)
