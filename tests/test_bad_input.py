"""What bad input gets: a ValueError or TypeError that names the argument, its value and the mend."""

import copy
import math
import threading
import warnings

import pytest
import torch
from torch import nn

import fishopt

MODEL = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])
CE = nn.CrossEntropyLoss()


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)

    def forward(self, x):
        return self.table(x)


class Lambda(nn.Module):
    """A forward given from outside, around one linear layer."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def _closure_model():
    model = nn.Sequential(nn.Linear(4, 3))
    layer = model[0]
    model.forward = lambda x: layer(x)
    return model


def _frozen():
    return nn.Linear(4, 3).requires_grad_(False)


def _in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(4, 3)


def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(4, 3))


def _with_nan():
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    return model


def _sparse_weight():
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    return model


def _with_lock():
    model = Lambda(torch.tanh)
    model.guard = {"inner": [threading.Lock()]}
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


IN_PLACE = nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 3))
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
    (lambda: fisher(targets=Y), ValueError, "targets.*empirical"),
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


def _same(a, b):
    """Whether two nestings are equal, tensors by every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _held(optimizer):
    """All that a call that is refused may not change."""
    model = optimizer._model
    hooks = [len(module._forward_hooks) for module in model.modules()]
    grads = [p.grad for p in model.parameters()]
    state = {**optimizer.state_dict(), "defaults": dict(optimizer.defaults)}
    return copy.deepcopy([model.state_dict(), grads, state, hooks, torch.get_rng_state()])


BOTH = [fishopt.FisherAdam, fishopt.DiagonalNGD]
NAN = math.nan
OPTION_ROWS = [
    *[(BOTH, {name: value}, name) for name in ("lr", "weight_decay") for value in (-1e-3, NAN, math.inf, "fast", None)],
    *[(BOTH, {"refresh_every": value}, "refresh_every") for value in (0, -1, 1.5, True, None)],
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
    *[(BOTH, {"refresh_inputs": v}, "refresh_inputs=.*whole number >= 1") for v in (None, True, -1, "all")],
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
def test_two_optimizers_do_not_share_a_state(kind):
    optimizer = _trained(kind, copy.deepcopy(MODEL))
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(optimizer)


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


def _trained(kind, model):
    optimizer = kind(model, CE)
    CE(model(X), Y).backward()
    optimizer.step()
    return optimizer


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


@pytest.mark.parametrize("kind", BOTH)
def test_sparse_gradients_are_refused_by_name(kind):
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = kind(model, CE)
    model(X)
    model[0].weight.grad = torch.zeros(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match=r"0\.weight.*sparse"):
        optimizer.step()
