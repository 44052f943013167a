"""Parameters wherever they are: outside of layers, shared, unused."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.networks.shared import Family, Net, normal, parameter, two

PARAMETERS = Family()
add = PARAMETERS.add

add("scale", lambda: Net(lambda m, x: m.a(x * m.s) * m.t, s=parameter(4), t=parameter(), a=nn.Linear(4, 3)), normal(4))
add(
    "matmul",
    lambda: Net(lambda m, x: torch.tanh(x @ m.w) @ m.v + m.b, w=parameter(4, 5), v=parameter(5, 3), b=parameter(3)),
    normal(4),
)
add("matmul_sequence", lambda: Net(lambda m, x: torch.tanh(x @ m.w).mean(1), w=parameter(4, 3)), normal(5, 4))
add("weight_first", lambda: Net(lambda m, x: torch.tanh(m.w @ x).sum(-1), w=parameter(3, 4)), normal(4, 2), "call")
add("weight_first_transposed", lambda: Net(lambda m, x: torch.tanh(m.w @ x.T).T, w=parameter(3, 4)), normal(4), "call")
add("addmm", lambda: Net(lambda m, x: torch.addmm(m.b, x, m.w), b=parameter(3), w=parameter(4, 3)), normal(4))
add(
    "addmm_scaled",
    lambda: Net(
        lambda m, x: torch.tanh(torch.addmm(m.b, x, m.w, beta=2, alpha=0.5)), b=parameter(3), w=parameter(4, 3)
    ),
    normal(4),
    "call",
)
add(
    "einsum",
    lambda: Net(lambda m, x: torch.tanh(torch.einsum("nld,dhe->nlhe", x, m.w)).sum((1, 2)), w=parameter(4, 2, 3)),
    normal(5, 4),
    "call",
)
add("bilinear", lambda: Net(lambda m, a, b: torch.tanh(m.bilinear(a, b)), bilinear=nn.Bilinear(4, 4, 3)), two, "call")
add(
    "functional",
    lambda: Net(
        lambda m, x: functional.linear(functional.layer_norm(x, (4,), m.g, m.b), m.w),
        g=parameter(4),
        b=parameter(4),
        w=parameter(3, 4),
    ),
    normal(4),
)
add(
    "repeated_token",
    lambda: Net(
        lambda m, x: m.a(torch.cat([m.q.repeat(len(x), 1, 1) * x, x], 1).flatten(1)),
        q=parameter(1, 2, 4),
        a=nn.Linear(16, 3),
    ),
    normal(2, 4),
)
add(
    "squared_token",  # what is computed from an expanded parameter is data, and the numbers of what comes later shift
    lambda: Net(
        lambda m, x: (m.q.expand(len(x), -1).square().sin() * x) @ m.w.t(),
        q=parameter(4),
        w=parameter(4, 4),
    ),
    normal(4),
)
add(
    "queries",
    lambda: Net(
        lambda m, x: m.mha(m.q.unsqueeze(0).expand(len(x), -1, -1), x, x)[0].flatten(1),
        q=parameter(2, 4),
        mha=nn.MultiheadAttention(4, 1, batch_first=True),
    ),
    normal(3, 4),
)
add(
    "buffer",
    lambda: Net(lambda m, x: m.a((x - m.mean) / m.std), a=nn.Linear(4, 3), mean=torch.randn(4), std=torch.rand(4) + 1),
    normal(4),
)
add(
    "shared",
    lambda: Net(
        lambda m, x: m.parts[1](torch.tanh(m.parts[0](torch.tanh(m.parts[0](x))))),
        parts=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)]),
    ),
    normal(4),
)


def _listed() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


add("listed_twice", _listed, normal(4))
add(
    "unused",
    lambda: Net(lambda m, x: m.a(x), a=nn.Linear(4, 3), auxiliary=nn.Linear(4, 2), free=parameter(2)),
    normal(4),
    {"a.": "rule", "": "none"},
)
add(
    "token_into_linear",
    lambda: Net(
        lambda m, x: m.head(torch.tanh(m.up(m.token.expand(len(x), -1)) + x)),
        token=parameter(4),
        up=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    ),
    normal(4),
)
