"""What the checks of torch's optimizer suite share: `OptimizerInfo` entries for ours, and a model for each."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInfo, OptimizerInput

import fishopt

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
                "schedule free": {"schedule_free": True, "warmup": 0},
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
