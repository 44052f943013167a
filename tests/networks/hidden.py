"""What hides calls: functions of autograd, checkpoints, transforms, scripts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.networks.shared import Family, Net, PreNorm, normal, parameter, scaled

HIDDEN = Family()
add = HIDDEN.add


class OldProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class NewProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


for _name, _function in {"old_function": OldProduct, "new_function": NewProduct}.items():
    add(
        _name,
        lambda f=_function: Net(lambda m, x: m.a(torch.tanh(f.apply(x, m.w))), w=parameter(4, 5), a=nn.Linear(5, 3)),
        normal(4),
        {"w": "rows" if _function is OldProduct else "network", "a": "rule"},
    )


for _reentrant in (False, True):
    add(
        f"checkpoint{'_reentrant' if _reentrant else ''}",
        lambda reentrant=_reentrant: Net(
            lambda m, x: m.b(checkpoint(m.block, m.a(x), use_reentrant=reentrant)),
            a=nn.Linear(4, 4),
            block=nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            b=nn.Linear(4, 3),
        ),
        normal(4),
    )
    add(
        f"checkpoint_attention{'_reentrant' if _reentrant else ''}",
        lambda reentrant=_reentrant: Net(
            lambda m, x: m.b(checkpoint(m.block, m.a(x), use_reentrant=reentrant).flatten(1)),
            a=nn.Linear(4, 4),
            block=PreNorm(scaled),
            b=nn.Linear(12, 3),
        ),
        normal(3, 4),
    )
add(
    "vmap",
    lambda: Net(
        lambda m, x: m.a(torch.vmap(lambda row: torch.tanh(m.w @ row))(x)), w=parameter(5, 4), a=nn.Linear(5, 3)
    ),
    normal(4),
    {"w": "network", "a": "rule"},
)
add(
    "func_grad",
    lambda: Net(
        lambda m, x: m.a(torch.func.grad(lambda z: torch.tanh(m.inner(z)).sum())(x)),
        inner=nn.Linear(4, 5),
        a=nn.Linear(4, 3),
    ),
    normal(4),
    {"inner.bias": "network", "inner": "network", "a": "rule"},
)


def _scaled_tanh(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w) * 2


add(
    "scripted_function",
    lambda: Net(
        lambda m, x: m.b(torch.jit.script(_scaled_tanh)(m.a(x), m.w)),
        a=nn.Linear(4, 4),
        w=parameter(4, 4),
        b=nn.Linear(4, 3),
    ),
    normal(4),
    {"w": "network", "": "rule"},
)
