"""What bad input gets: a ValueError or TypeError that names the argument, its value and the mend."""

import copy
import math

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
]


@pytest.mark.parametrize("row", FUNCTION_ROWS, ids=[str(i) for i in range(len(FUNCTION_ROWS))])
def test_functions(row):
    call, error, match = row
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        call()
    assert isinstance(caught.value, error)


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
        model = copy.deepcopy(MODEL)
        with pytest.raises((ValueError, TypeError), match=match):
            kind(model, CE, **options)
        assert not model._forward_hooks


@pytest.mark.parametrize("kind", BOTH)
def test_constructor_refuses_models_and_likelihoods(kind):
    for model, likelihood, match in (
        (MODEL.parameters(), CE, "model="),
        (_frozen(), CE, "no trainable parameter"),
        (nn.LazyLinear(3), CE, "not initialized"),
        (MODEL, nn.TripletMarginLoss(), "TripletMarginLoss"),
        (MODEL, None, "likelihood=None"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            kind(model, likelihood)


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
    ):
        with pytest.raises(error, match=match):
            optimizer.refresh(*inputs)
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


@pytest.mark.parametrize("kind", BOTH)
def test_state_of_another_model_or_optimizer_is_refused_and_nothing_changes(kind):
    optimizer = _trained(kind, copy.deepcopy(MODEL))
    before = copy.deepcopy(optimizer.state_dict())
    wider = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    other = {fishopt.FisherAdam: fishopt.DiagonalNGD, fishopt.DiagonalNGD: fishopt.FisherAdam}[kind]
    plain = torch.optim.AdamW(MODEL.parameters())
    for state, match in (
        (_trained(kind, wider).state_dict(), r"another model.*\(5, 4\).*\(3, 4\)"),
        (_trained(kind, nn.Linear(4, 3)).state_dict(), "another model"),
        (_trained(other, copy.deepcopy(MODEL)).state_dict(), other.__name__),
        (plain.state_dict(), "'fishopt'"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert str(after["fishopt"]["steps"]) == str(before["fishopt"]["steps"])
    for key, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(after["state"][key][name]), torch.as_tensor(value))


@pytest.mark.parametrize("kind", BOTH)
def test_add_param_group_refuses_and_changes_nothing(kind):
    model = copy.deepcopy(MODEL)
    optimizer = kind(model, CE, params=[{"params": model[0].parameters()}])
    for group, match in (
        ({"params": [torch.zeros(2)]}, "not a parameter"),
        ({"params": model[2].parameters(), "lr": -1.0}, "lr=-1.0"),
        ({"params": model[2].parameters(), "estimator": "I3"}, "estimator='I3'"),
        ({"params": model[0].parameters()}, "more than one"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", BOTH)
def test_sparse_gradients_are_refused_by_name(kind):
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = kind(model, CE)
    model(X)
    model[0].weight.grad = torch.zeros(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match=r"0\.weight.*sparse"):
        optimizer.step()
