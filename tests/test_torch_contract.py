"""The checks of torch's own optimizer suite, on `OptimizerInfo` entries for ours.

torch.testing ships the entries' classes and inputs that must fail, but not its test_optim.py, whose checks these are:

| torch's check | here |
|---|---|
| optim_infos_do_not_specify_global_cliquey_kwargs | ported: test_infos_leave_the_implementation_alone |
| errors | ported: test_torchs_error_inputs, test_error_inputs; a bare tensor and partly named parameters are accepted |
| forloop_goes_right_direction, with_lrsched, non-contiguous | ported: test_goes_in_the_right_direction |
| param_group_with_lrscheduler_goes_right_direction | ported: test_groups_with_a_scheduler_go_in_the_right_direction |
| param_groups_lr, param_groups_weight_decay | ported: test_groups_have_their_own_lr, ..._weight_decay |
| tensor_lr | ported: test_a_tensor_lr_is_a_number |
| maximize (part of the inputs) | ported: test_maximize_is_minimizing_the_negated_loss |
| step_is_noop_when_params_have_no_grad | ported: test_no_gradients_no_step, which holds frozen parameters too |
| step_is_noop_for_zero_grads | ported: test_zero_gradients_leave_all_but_the_decay |
| foreach_matches_forloop, mixed_device_dtype | ported, on one device: test_agrees_with_a_loop_over_parameters |
| set_default_dtype_works_with_foreach | ported: test_another_default_dtype |
| non_empty_state | ported: test_state_is_not_empty |
| state_dict_deterministic | ported: test_state_dict_is_deterministic |
| save_load_equality_with_weights_only | ported: test_saved_is_loaded |
| load_nontensor_step | ported: test_a_step_count_saved_as_a_tensor_loads (ours is a plain int) |
| can_load_older_state_dict | elsewhere: tests/data holds checkpoints of 0.1.0, for the tests of checkpoints |
| can_load_from_to_named_state_dict | not applicable: the model names parameters, and checkpoints hold these |
| deepcopy_copies_all_public_attrs | ported: test_deepcopy_copies_public_attributes; more in test_copies.py |
| adamw_serialization | ported: test_pickles |
| optimizer_can_be_printed | ported: test_prints |
| step_pre_hook, step_post_hook, step_all_hooks | ported: test_step_hooks |
| state_dict_(pre/post)_hook | ported: test_state_dict_hooks |
| load_state_dict_(pre/post)_hook, and_prepend | ported: test_load_state_dict_hooks |
| complex, complex_2d | not applicable, no score is complex: test_complex_parameters_are_refused |
| rosenbrock_sparse, sparse inputs | not applicable, the diagonal is dense: test_sparse_gradients_are_refused |
| add_param_group, closures (in other checks) | ported: test_a_group_can_be_added, test_the_closures_loss_is_returned |
| fused_* | not applicable: no such argument, the kernel is chosen by dtype and layout (test_update_fused.py) |
| grad_scaling_autocast_fused_optimizers | not applicable, like fused; a GradScaler in test_optim_interface.py |
| foreach_large_tensor | not applicable on a CPU: it needs 2^31 entries; sizes up to 3e5 in test_update*.py |
| peak_memory_foreach | not applicable on a CPU, whose allocator does not count; benchmarks/ measure it |
| capturable, cudagraphs, cpu_load_state_dict | not applicable: a graph cannot hold a refresh's decisions |
| differentiable | not applicable: steps are made without a graph, as preconditioners have no derivative here |
| defaults_changed_to_foreach | not applicable: there is one implementation, over lists of tensors |
| multigpu, state_dict_with_cuda_params | not applicable without a GPU; a moved model in test_precision.py |
| LBFGS's, Muon's and SparseAdam's own | not applicable |
"""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

import fishopt
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Estimate, Moment

# Torch's helpers forbid the whole process to set torch.backends' flags; undone for the tests beside these.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


def _inputs(**own):
    shared = {
        "default": {},
        "non-default lr": {"lr": 1e-2},
        "tensor lr": {"lr": torch.tensor(0.01)},
        "weight decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
        "maximize, weight decay": {"maximize": True, "weight_decay": 0.1},
        "estimator": {"estimator": "exact"},
        "refreshed always": {"refresh_every": 1, "refresh_inputs": 3},
    }
    listed = [OptimizerInput(None, kwargs, desc) for desc, kwargs in {**shared, **own}.items()]
    return lambda device, dtype=None: copy.deepcopy(listed)


def _errors(*rows):
    shared = [
        ({"lr": -1e-2}, r"lr=-0\.01"),
        ({"lr": torch.tensor([1e-3, 1e-3])}, r"lr=tensor\(\["),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"estimator": "I3"}, "estimator='I3'"),
    ]
    return lambda device, dtype: [
        ErrorOptimizerInput(OptimizerInput(None, kwargs, regex), error_type=ValueError, error_regex=regex)
        for kwargs, regex in (*shared, *rows)
    ]


SCHEDULERS = (
    [],
    [lambda o: StepLR(o, gamma=0.9, step_size=10)],
    [lambda o: StepLR(o, gamma=0.9, step_size=10), ReduceLROnPlateau],
    [lambda o: ExponentialLR(o, 0.99), lambda o: LinearLR(o, 0.4, total_iters=4), lambda o: ConstantLR(o, 0.8)],
)
SHARED = {
    "scheduler_inputs": SCHEDULERS,
    "supported_impls": (),
    "not_og_supported_flags": (),
    "supports_complex": False,
    "supports_multiple_devices": False,
}
INFOS = [
    OptimizerInfo(
        fishopt.FisherAdam,
        optim_inputs_func=_inputs(
            **{
                "no clip": {"clip": math.inf},
                "betas": {"betas": (0.5, 0.5), "damping": 0.1},
                "schedule free": {"schedule_free": True},
            }
        ),
        optim_error_inputs_func=_errors(
            ({"betas": (1.0, 0.0)}, r"betas\[0\]=1\.0"),
            ({"eps": -1e-8}, "eps=-1e-08"),
            ({"clip": 0}, "clip=0"),
        ),
        **SHARED,
    ),
    OptimizerInfo(
        fishopt.DiagonalNGD,
        optim_inputs_func=_inputs(
            **{"no momentum": {"momentum": 0.0}, "wide": {"kl_radius": math.inf, "damping": 1.0, "decay": 0.0}}
        ),
        optim_error_inputs_func=_errors(
            ({"momentum": 1.0}, r"momentum=1\.0"),
            ({"damping": 0}, "damping=0"),
            ({"kl_radius": -1.0}, r"kl_radius=-1\.0"),
        ),
        **SHARED,
    ),
]
each = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
configured = pytest.mark.parametrize(
    ("info", "config"),
    [(info, config) for info in INFOS for config in info.optim_inputs_func("cpu")],
    ids=lambda x: x.name if isinstance(x, OptimizerInfo) else x.desc,
)


# --- the adapter: torch's checks have parameters and a loss, ours need a model in between ---

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
LOSS = nn.MSELoss()


def _linear(contiguous=True, dtype=torch.float32):
    """Torch's own problem, ``(weight x + bias)^2``, as a model and its targets."""
    torch.manual_seed(0)
    model = nn.Linear(5, 10, dtype=dtype)
    if not contiguous:
        for p in model.parameters():
            p.data = torch.stack([p.data] * 2, dim=-1)[..., 0]
            assert not p.is_contiguous()
    return model


class Owner(nn.Module):
    """Any parameters, each of which the output depends on."""

    def __init__(self, params):
        super().__init__()
        self.all = nn.ParameterList(params)

    def forward(self, x):
        return x[:, :1] * sum((p**2).sum() for p in self.all)


def _closure(model, optimizer, sign=1.0):
    def closure():
        optimizer.zero_grad()
        out = model(X.to(next(model.parameters()).dtype))
        loss = sign * LOSS(out, torch.zeros_like(out))
        loss.backward()
        return loss

    return closure


def _build(info, config=None, model=None, **options):
    model = model or _linear()
    return model, info.optim_cls(model, LOSS, **{**copy.deepcopy(config.kwargs if config else {}), **options})


def _train(model, optimizer, steps=3, sign=1.0):
    for _ in range(steps):
        loss = optimizer.step(_closure(model, optimizer, sign))
    return float(loss.detach())


def _estimate(model, optimizer):
    """A refresh, for the next step to be without one."""
    _closure(model, optimizer)()
    optimizer.refresh(X)


def _weights(model):
    return [p.detach().clone() for p in model.parameters()]


def _same(one, other):
    return all(map(torch.equal, one, other))


@pytest.fixture
def _estimates_are_given(monkeypatch):
    def refresh(self, units, wanted, record, training, step):
        return Estimate({name: _fisher(name, p, step) for name, p in self._model.named_parameters()}, MOMENT)

    monkeypatch.setattr(Curvature, "refresh", refresh)


MOMENT = Moment(4, 1.0, 1.0)


def _fisher(name, p, step):
    generator = torch.Generator().manual_seed(100 * step + sum(map(ord, name)))
    return torch.rand(p.shape, generator=generator, dtype=torch.float64).to(torch.promote_types(p.dtype, torch.float32))


# --- entries and errors ---


@configured
def test_infos_leave_the_implementation_alone(info, config):
    assert not {"foreach", "fused", "differentiable", "capturable"} & config.kwargs.keys()
    for flag in ("foreach", "fused", "differentiable", "capturable"):
        with pytest.raises(TypeError, match=flag):
            _build(info, config, **{flag: True})


@each
def test_error_inputs(info):
    for row in info.optim_error_inputs_func("cpu", torch.float32):
        with pytest.raises(row.error_type, match=row.error_regex):
            _build(info, row.optimizer_error_input)


ACCEPTED = ("invalid param type", "all optimizer params should be", "all optimizer param groups should be")
"""Of torch's inputs that must fail: one tensor is a list of one; names are the model's, others are not looked at."""


@each
def test_torchs_error_inputs(info):
    for row in get_error_inputs_for_all_optims("cpu", torch.float32):
        given = row.optimizer_error_input
        model = Owner(_tensors(given.params)) if given.params is not None else _linear()
        if given.desc.startswith(ACCEPTED):
            optimizer = info.optim_cls(model, LOSS, params=given.params, **given.kwargs)
            assert [p for g in optimizer.param_groups for p in g["params"]] == list(model.parameters())
            continue
        regex = "lr=tensor" if "lr" in given.kwargs else row.error_regex
        with pytest.raises(row.error_type, match=regex):
            info.optim_cls(model, LOSS, params=given.params, **given.kwargs)
        assert not model._forward_hooks


def _tensors(params):
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, dict):
        return _tensors(params["params"])
    found = [p for item in params if not isinstance(item, str) for p in _tensors(item)]
    return list(dict.fromkeys(found))


@each
def test_parameters_of_other_kinds_are_refused(info):
    for params, match in (
        ([], "empty"),
        ([3], r"params|Tensor"),
        ([nn.Parameter(torch.zeros(3))], "not a parameter of model"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            _build(info, params=params)


@each
def test_complex_parameters_are_refused(info):
    with pytest.raises(TypeError, match=r"'all\.0' is complex"):
        _build(info, model=Owner([nn.Parameter(torch.randn(2, dtype=torch.complex64))]))


@each
def test_sparse_gradients_are_refused(info):
    model, optimizer = _build(info)
    _train(model, optimizer, 1)
    before = _weights(model)
    model.weight.grad = model.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="'weight' is sparse"):
        optimizer.step()
    assert _same(before, model.parameters())


# --- direction ---


@configured
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction(info, config, contiguous):
    for constructors in info.scheduler_inputs if contiguous else [[]]:
        model, optimizer = _build(info, config, _linear(contiguous))
        schedulers = [make(optimizer) for make in constructors]
        losses = []
        for _ in range(8):
            losses.append(_train(model, optimizer, 1))
            for scheduler in schedulers:
                scheduler.step(losses[-1]) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        assert (losses[-1] > losses[0]) == config.kwargs.get("maximize", False)


@each
def test_groups_with_a_scheduler_go_in_the_right_direction(info):
    for constructors in info.scheduler_inputs:
        model = _linear()
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-2}]
        _, optimizer = _build(info, model=model, params=groups, lr=1e-3)
        schedulers = [make(optimizer) for make in constructors]
        start, rates = _train(model, optimizer, 1), [group["lr"] for group in optimizer.param_groups]
        for _ in range(8):
            loss = _train(model, optimizer, 1)
            for scheduler in schedulers:
                scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        assert loss < start
        assert rates[1] == 10 * rates[0]


@each
def test_groups_have_their_own_lr(info):
    model = _linear()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.0}]
    _, optimizer = _build(info, model=model, params=groups, lr=1e-2)
    weight, bias = _weights(model)
    _train(model, optimizer)
    assert not torch.equal(weight, model.weight)
    assert torch.equal(bias, model.bias)


@each
def test_groups_have_their_own_weight_decay(info):
    """Decoupled: with zero gradients, the decay is all there is."""
    model = _linear()
    groups = [{"params": [model.weight], "weight_decay": 0.5}, {"params": [model.bias], "weight_decay": 0.0}]
    _, optimizer = _build(info, model=model, params=groups, lr=0.1)
    _estimate(model, optimizer)
    weight, bias = _weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * 0.95, rtol=1e-6, atol=0)
    assert torch.equal(bias, model.bias)


@each
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("decayed", [False, True])
def test_a_tensor_lr_is_a_number(info, shape, decayed):
    """A number that float32 holds, so that nothing is rounded; stepped by a scheduler as well."""
    ends = []
    for lr in (2.0**-7, torch.full(shape, 2.0**-7)):
        model, optimizer = _build(info, lr=lr, weight_decay=0.1)
        for _ in range(5):
            _train(model, optimizer, 1)
            if decayed:
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
        ends.append(_weights(model))
    assert _same(*ends)


@configured
def test_maximize_is_minimizing_the_negated_loss(info, config):
    """Bit for bit, as the estimates are the same: MSE's residuals come in squares."""
    ends = []
    for maximize in (False, True):
        model, optimizer = _build(info, config, maximize=maximize)
        _train(model, optimizer, 5, sign=-1.0 if maximize else 1.0)
        ends.append(_weights(model))
    assert _same(*ends)


# --- nothing to do ---


@configured
def test_no_gradients_no_step(info, config):
    """Not even a decay; a frozen parameter's is None as well."""
    model, optimizer = _build(info, config)
    _estimate(model, optimizer)
    before = _weights(model)
    for p in model.parameters():
        p.grad = None
    optimizer.step()
    assert _same(before, model.parameters())
    model.bias.requires_grad_(False)
    _train(model, optimizer)
    assert torch.equal(before[1], model.bias)
    assert not torch.equal(before[0], model.weight)


@configured
def test_zero_gradients_leave_all_but_the_decay(info, config):
    model, optimizer = _build(info, config)
    _estimate(model, optimizer)
    group = optimizer.param_groups[0]
    kept = 1 - float(group["lr"]) * group["weight_decay"]
    before = [kept * p for p in _weights(model)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(_weights(model), before, rtol=1e-6, atol=0)


# --- lists of tensors against a loop over parameters, by the docstrings' formulas ---


class Loop:
    """One parameter at a time, in float64, or rounded to a parameter's own dtype after each step."""

    def __init__(self, optimizer, names):
        self.optimizer, self.names, self.t, self.peak = optimizer, names, 0, 0.0
        self.m = {p: torch.zeros(p.shape, dtype=torch.float64) for p in names}
        self.f = {p: torch.zeros_like(m) for p, m in self.m.items()}
        self.values = {p: p.detach().double() for p in names}
        self.z, self.x = dict(self.values), dict(self.values)

    def step(self, decay):
        self.t += 1
        for p, name in self.names.items():
            self.f[p].lerp_(_fisher(name, p, self.t - 1).double(), 1 - decay)
        fisher = {p: f / (1 - decay**self.t) for p, f in self.f.items()}
        mean = float(sum(f.sum() for f in fisher.values()) / sum(max(f.numel(), 1) for f in fisher.values()))
        self.peak = max(self.peak, mean)
        groups = [(p, group) for group in self.optimizer.param_groups for p in group["params"]]
        is_adam = isinstance(self.optimizer, fishopt.FisherAdam)
        steps = (self.adam if is_adam else self.ngd)(groups, fisher, mean)
        for (p, group), step in zip(groups, steps, strict=True):
            moved = self.values[p] * float(group["lr"]) * group["weight_decay"] + step
            value = self.between(p, group, moved) if group.get("schedule_free") else self.values[p] - moved
            self.values[p] = value.to(p.dtype).double()

    def between(self, p, group, moved):
        self.z[p] = self.z[p] - moved
        self.x[p] = self.x[p] + (self.z[p] - self.x[p]) / self.t
        y = self.z[p].lerp(self.x[p], group["betas"][0])
        for kept in (self.z, self.x):  # what y loses in rounding they lose with it
            kept[p] = kept[p] + (y.to(p.dtype).double() - y)
        return y

    def average(self, p, group, beta):
        beta = 0.0 if group.get("schedule_free") else beta
        self.m[p].lerp_(p.grad.double() * (-1 if group["maximize"] else 1), 1 - beta)
        return self.m[p] / (1 - beta**self.t)

    def adam(self, groups, fisher, mean):
        for p, group in groups:
            rms = math.sqrt(mean / MOMENT.batch_size)
            denominator = (fisher[p] / MOMENT.batch_size).sqrt() + group["damping"] * rms + group["eps"]
            update = self.average(p, group, group["betas"][0]) / denominator
            if update.numel():
                update /= max(1.0, float(update.square().mean().sqrt()) / group["clip"])
            yield group["lr"] * update

    def ngd(self, groups, fisher, mean):
        damped = {p: fisher[p] + group["damping"] * self.peak for p, group in groups}
        steps = [group["lr"] * self.average(p, group, group["momentum"]) / damped[p] for p, group in groups]
        divergence = sum(float((d.square() * damped[p]).sum()) for d, (p, _) in zip(steps, groups, strict=True)) / 2
        scale = min(1.0, math.sqrt(groups[0][1]["kl_radius"] / max(divergence, 1e-300)))
        return [scale * d for d in steps]


def _odd_parameters(dtypes):
    """Of every size and layout."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (7,), (), (0,), (2, 3, 4, 4), (5, 6)]
    for dtype in dtypes:
        for shape in shapes:
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if len(shape) == 4:
                value = value.to(memory_format=torch.channels_last)
            p = nn.Parameter(value)
            if shape == (5, 6):
                p.data = torch.stack([value] * 2, dim=-1)[..., 0]
            yield p


@configured
@pytest.mark.parametrize("dtypes", ["float64", "float32", "mixed"])
@pytest.mark.usefixtures("_estimates_are_given")
def test_agrees_with_a_loop_over_parameters(info, config, dtypes):
    kinds = [torch.float32, torch.float64, torch.bfloat16] if dtypes == "mixed" else [getattr(torch, dtypes)]
    params = list(_odd_parameters(kinds))
    model = Owner(params)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.01, "weight_decay": 0.2, "maximize": True}]
    options = {"refresh_every": 1, "estimator": "I1", "lr": 0.05}
    if info.optim_cls is fishopt.DiagonalNGD:
        options["kl_radius"] = config.kwargs.get("kl_radius", 1e-2)
    _, optimizer = _build(info, config, model, **{"params": groups, **options})
    loop = Loop(optimizer, {p: name for name, p in model.named_parameters()})
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        model(X)
        loop.step(optimizer._decay(optimizer.param_groups[0]))
        optimizer.step()
    for p in params:
        # Beside others in float32, float64 is scaled by what these add to the mean and to the divergence.
        rtol, atol = (1e-10, 1e-12) if dtypes == "float64" else (2e-5, 1e-6)
        if p.dtype == torch.bfloat16:
            rtol, atol = 2.0**-7, 1e-3  # a value between two may be rounded to the other one
        torch.testing.assert_close(p.detach().double(), loop.values[p], rtol=rtol, atol=atol)


@each
def test_another_default_dtype(info):
    """A model in float32 is none the wiser; one built under it trains in float64."""
    ends = []
    for dtype in (torch.float32, torch.float64):
        model, optimizer = _build(info)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            _train(model, optimizer, 5)
            wide = Owner([nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(2.0))])
            start = _train(wide, other := _build(info, model=wide)[1], 1)
            assert _train(wide, other, 5) < start
            assert other.state[wide.all[0]]["fisher"].dtype == dtype
        finally:
            torch.set_default_dtype(before)
        ends.append(_weights(model))
    assert _same(*ends)


# --- state ---


@each
def test_state_is_not_empty(info):
    model, optimizer = _build(info)
    assert not optimizer.state
    _train(model, optimizer, 1)
    for p in model.parameters():
        assert {"step", "exp_avg", "fisher", "preconditioner", "refreshes"} <= optimizer.state[p].keys()
        assert optimizer.state[p]["step"] == 1


@configured
def test_state_dict_is_deterministic(info, config):
    """Loaded in the middle into another on an equal model, which then does the same; saving changes nothing."""
    model, optimizer = _build(info, config)
    _train(model, optimizer)
    first = copy.deepcopy(optimizer.state_dict())
    assert str(first) == str(optimizer.state_dict())
    other, loaded = _build(info, config, copy.deepcopy(model))
    loaded.load_state_dict(first)
    assert str(loaded.state_dict()) == str(first)
    _train(model, optimizer)
    _train(other, loaded)
    assert _same(model.parameters(), other.parameters())
    # Groups' settings come with the state, and what an older file lacks stays away.
    for group in first["param_groups"]:
        group["lr"] = 0.125
        del group["maximize"]
    loaded.load_state_dict(first)
    assert loaded.param_groups[0]["lr"] == 0.125


@configured
def test_saved_is_loaded(info, config):
    model, optimizer = _build(info, config)
    _train(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert str(torch.load(file, weights_only=True)) == str(optimizer.state_dict())


@each
def test_a_step_count_saved_as_a_tensor_loads(info):
    model, optimizer = _build(info)
    _train(model, optimizer)
    other, loaded = copy.deepcopy((model, optimizer))
    state = copy.deepcopy(optimizer.state_dict())
    for kept in state["state"].values():
        kept["step"] = torch.tensor(float(kept["step"]))
    loaded.load_state_dict(state)
    _train(model, optimizer)
    _train(other, loaded)
    torch.testing.assert_close(_weights(model), _weights(other), rtol=1e-6, atol=0)


@configured
def test_deepcopy_copies_public_attributes(info, config):
    model, optimizer = _build(info, config)
    _train(model, optimizer)
    copied = copy.deepcopy(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(copied) if not name.startswith("_")} == public
    assert str(copied.state_dict()["param_groups"]) == str(optimizer.state_dict()["param_groups"])


@configured
def test_pickles(info, config):
    pair = _build(info, config)
    _train(*pair)
    other = pickle.loads(pickle.dumps(pair))
    _train(*pair)
    _train(*other)
    assert _same(pair[0].parameters(), other[0].parameters())


@configured
def test_prints(info, config):
    text = repr(_build(info, config)[1])
    assert text.startswith(info.name)
    assert "Parameter Group 0" in text
    assert all(key in text for key in config.kwargs if key not in {"refresh_every", "refresh_inputs"})


@each
def test_a_group_can_be_added(info):
    model = _linear()
    _, optimizer = _build(info, model=model, params=[model.weight])
    _train(model, optimizer)
    bias = model.bias.detach().clone()
    optimizer.add_param_group({"params": [model.bias]})
    assert optimizer.param_groups[1]["lr"] == optimizer.defaults["lr"]
    _train(model, optimizer)
    assert not torch.equal(bias, model.bias)


@each
def test_the_closures_loss_is_returned(info):
    model, optimizer = _build(info)
    seen = []

    def closure():
        assert torch.is_grad_enabled()
        seen.append(_closure(model, optimizer)())
        return seen[-1]

    assert optimizer.step(closure) is seen[0]
    assert len(seen) == 1
    _closure(model, optimizer)()
    assert optimizer.step() is None


# --- hooks ---


@each
def test_step_hooks(info):
    """The optimizer's own inside of the global ones, each called once, before and after the parameters move."""
    model, optimizer = _build(info)
    calls, start = [], _weights(model)

    def note(name):
        return lambda opt, args, kwargs: calls.append((name, opt is optimizer, _same(start, model.parameters())))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    closure = _closure(model, optimizer)
    closure()
    optimizer.step()
    order = [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    assert sorted(calls) == sorted((name, True, unmoved) for name, unmoved in order)
    assert [unmoved for _, _, unmoved in calls] == [True, True, False, False]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() is not None
    handle.remove()


@each
def test_state_dict_hooks(info):
    model, optimizer = _build(info)
    _train(model, optimizer, 1)
    seen = []
    pre = optimizer.register_state_dict_pre_hook(seen.append)
    post = optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    assert optimizer.state_dict()["note"] == 1
    assert seen == [optimizer]
    pre.remove()
    post.remove()
    assert "note" not in optimizer.state_dict()
    assert len(seen) == 1


@each
def test_load_state_dict_hooks(info):
    model, optimizer = _build(info)
    _train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    order = []

    def set_lr(lr):
        def hook(opt, given):
            order.append(lr)
            given["param_groups"] = [{**group, "lr": lr} for group in given["param_groups"]]
            return given

        return hook

    optimizer.register_load_state_dict_pre_hook(set_lr(0.002))
    optimizer.register_load_state_dict_pre_hook(set_lr(0.001), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: order.append(opt.param_groups[0]["lr"]))
    optimizer.load_state_dict(state)
    assert order == [0.001, 0.002, 0.002]
    assert state["param_groups"][0]["lr"] == optimizer.defaults["lr"]
