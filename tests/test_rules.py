"""Every module with a rule, in all its options, against torch.func: no per-input gradient is taken on trust."""

import math

import pytest
import torch
from backpack import backpack, extend
from torch import nn

from fishopt.passes import Shadow, gradients
from fishopt.passes.backpack import sum_grad_squared
from fishopt.passes.traced import TracedPass
from tests.asserts import assert_close
from tests.engines import functional, is_ruled, traced
from tests.networks import Net, parameter

OPTIONS = [{}, {"bias": False}, {"stride": 2}, {"padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2}]
MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear_no_bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "sequence": (lambda: nn.Linear(4, 3), (5, 4)),
    "grid": (lambda: nn.Linear(3, 2), (2, 4, 3)),
    "batch_norm_1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "batch_norm_sequence": (lambda: nn.BatchNorm1d(3), (3, 5)),
    "batch_norm_2d": (lambda: nn.BatchNorm2d(3), (3, 2, 2)),
    "batch_norm_3d": (lambda: nn.BatchNorm3d(2), (2, 2, 1, 2)),
    "uneven": (lambda: nn.Conv2d(2, 2, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (2, 4, 5)),
    "uneven_3d": (lambda: nn.Conv3d(1, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2)), (1, 2, 3, 4)),
    "output_padding": (
        lambda: nn.ConvTranspose2d(2, 4, 2, stride=3, padding=1, output_padding=2, groups=2),
        (2, 3, 3),
    ),
    "depthwise": (lambda: nn.Conv2d(4, 8, 2, groups=4), (4, 3, 3)),
}


def _index(*shape):
    """Tokens that come again, and some of the padding."""
    return lambda n: torch.arange(n * math.prod(shape)).reshape(n, *shape).square() % 5


def _with(forward, *shape):
    return lambda: Net(forward, p=parameter(*shape))


MODULES |= {
    "layer_norm": (lambda: nn.LayerNorm(4), (4,)),
    "layer_norm_sequence": (lambda: nn.LayerNorm(4, eps=0.1), (3, 4)),
    "layer_norm_dims": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer_norm_no_bias": (lambda: nn.LayerNorm((3, 4), bias=False), (3, 4)),
    "rms_norm": (lambda: nn.RMSNorm(4), (4,)),
    "rms_norm_dims": (lambda: nn.RMSNorm((3, 4), eps=0.1), (2, 3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4,)),
    "group_norm_2d": (lambda: nn.GroupNorm(2, 4, eps=0.1), (4, 2, 3)),
    "group_norm_instances": (lambda: nn.GroupNorm(4, 4), (4, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), _index()),
    "embedding_sequence": (lambda: nn.Embedding(5, 3), _index(4)),
    "embedding_grid": (lambda: nn.Embedding(5, 3), _index(2, 3)),
    "embedding_padding": (lambda: nn.Embedding(5, 3, padding_idx=1), _index(4)),
    "embedding_padding_from_the_end": (
        _with(lambda m, x: nn.functional.embedding(x, m.p, padding_idx=-1), 5, 3),
        _index(4),
    ),
    "prelu": (lambda: nn.PReLU(), (4,)),
    "prelu_channels": (lambda: nn.PReLU(4), (4, 3)),
    "matmul": (_with(lambda m, x: x @ m.p, 4, 3), (4,)),
    "matmul_sequence": (_with(lambda m, x: torch.matmul(x, m.p), 4, 3), (5, 4)),
    "mm": (_with(lambda m, x: x.mm(m.p), 4, 3), (4,)),
    "addmm_input": (_with(lambda m, x: torch.addmm(m.p, x, torch.ones(4, 3).to(x)), 3), (4,)),
    "addmm_matrix": (_with(lambda m, x: torch.ones(3).to(x).addmm(x, m.p), 4, 3), (4,)),
    "add": (_with(lambda m, x: x + m.p, 4), (4,)),
    "add_from_the_left": (_with(lambda m, x: torch.add(m.p, x, alpha=-2), 4), (3, 4)),
    "add_alpha": (_with(lambda m, x: x.add(m.p, alpha=3), 1, 3, 1), (3, 4)),
    "add_scalar": (_with(lambda m, x: x + m.p), (3, 4)),
    "add_widens": (_with(lambda m, x: x + m.p, 1, 3, 4), (1, 4)),
    "add_in_place": (_with(lambda m, x: torch.tanh(x).add_(m.p, alpha=2), 4), (3, 4)),
    "sub": (_with(lambda m, x: x - m.p, 3, 1), (3, 4)),
    "sub_from": (_with(lambda m, x: torch.sub(m.p, x, alpha=2), 4), (3, 4)),
    "sub_alpha": (_with(lambda m, x: torch.sub(x, m.p, alpha=2), 4), (3, 4)),
    "mul": (_with(lambda m, x: x * m.p, 4), (3, 4)),
    "mul_from_the_left": (_with(lambda m, x: m.p * x, 3, 1), (3, 4)),
    "mul_scalar": (_with(lambda m, x: torch.mul(x, m.p)), (3, 4)),
    "mul_widens": (_with(lambda m, x: x * m.p, 1, 3, 4), (1, 4)),
    "mul_in_place": (_with(lambda m, x: torch.tanh(x).mul_(m.p), 1, 4), (3, 4)),
    "expand": (_with(lambda m, x: m.p.expand(len(x), 3, 4), 1, 1, 4), (4,)),
    "broadcast_to": (_with(lambda m, x: torch.broadcast_to(m.p, (len(x), 3, 4)), 3, 1), (4,)),
    "repeat": (_with(lambda m, x: m.p.repeat(len(x), 1, 1), 3, 4), (4,)),
}
for _axes, _size in ((1, (6,)), (2, (5, 4)), (3, (3, 4, 3))):
    for _kind in (getattr(nn, f"Conv{_axes}d"), getattr(nn, f"ConvTranspose{_axes}d")):
        for _i, _options in enumerate(OPTIONS):
            MODULES[f"{_kind.__name__}-{_i}"] = (
                lambda kind=_kind, options=_options: kind(2, 4, 2, **options),
                (2, *_size),
            )


def _problem(name, inputs=3, dtype=torch.float64):
    torch.manual_seed(0)
    build, shape = MODULES[name]
    module = build()
    if hasattr(module, "running_mean"):
        module.running_mean.uniform_(-1, 1)
        module.running_var.uniform_(0.5, 2)
    x = shape(inputs) if callable(shape) else torch.randn(inputs, *shape)
    x = x.to(dtype) if x.is_floating_point() else x
    # Smooth above the module, so that its second derivatives do not vanish.
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten())
    model = model.to(dtype)
    model.append(nn.Linear(model(x).shape[1], 2, dtype=dtype))
    return model, x


@pytest.mark.parametrize("elements", [1, 2**20], ids=["one_at_a_time", "together"])
@pytest.mark.parametrize("name", MODULES)
def test_rules(name, elements, monkeypatch):
    monkeypatch.setattr(gradients, "MAX_ELEMENTS", elements)
    model, x = _problem(name)
    shadow = Shadow(model)
    assert is_ruled(shadow, (x,), shadow.names)
    columns, weights = torch.randn(4, 3, 2).double(), torch.randn(2, 3).double()
    with traced(shadow, (x,), shadow.names) as fast, functional(shadow, (x,), shadow.names) as slow:
        for per_input in (False, True):
            assert_close(fast.squared_vjp(columns, per_input=per_input), slow.squared_vjp(columns, per_input=per_input))
            assert_close(
                fast.squared_vjp(columns[:1], per_input=per_input), slow.squared_vjp(columns[:1], per_input=per_input)
            )
            # The closed form: the module is followed by one smooth function and an affine layer.
            assert_close(
                fast.hessian_diagonal(columns[0], names=shadow.names[:-2], per_input=per_input),
                slow.hessian_diagonal(columns[0], names=shadow.names[:-2], per_input=per_input),
            )
        # The graph does not tell it of every module; the rules have to know it all the same.
        vars(fast)["_diagonal"] = frozenset(shadow.names[:-2])
        assert_close(
            fast.hessian_diagonal(columns[0], names=shadow.names[:-2], per_input=True),
            slow.hessian_diagonal(columns[0], names=shadow.names[:-2], per_input=True),
        )
        groups = columns.reshape(2, 2, 3, 2)
        assert_close(fast.fourth_vjp(groups, weights), slow.fourth_vjp(groups, weights))
        assert_close(
            fast.hessian_square(columns[:2], weights, names=shadow.names[:-2]),
            slow.hessian_square(columns[:2], weights, names=shadow.names[:-2]),
        )


@pytest.mark.parametrize("name", MODULES)
def test_rules_in_float32(name):
    model, x = _problem(name)
    columns = torch.randn(2, 3, 2).double()
    shadow = Shadow(model)
    with traced(shadow, (x,), shadow.names) as through:
        expected = through.squared_vjp(columns)
    shadow = Shadow(model.float())
    x = x.float() if x.is_floating_point() else x
    with traced(shadow, (x,), shadow.names) as through:
        found = through.squared_vjp(columns.float())
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-4 * float(value.max()))


@pytest.mark.parametrize("columns_at_once", [1, 3, 10])
def test_columns_in_any_number_at_a_time(columns_at_once, monkeypatch):
    """Batched by vmap, one by one, or in part: the same sums."""
    model, x = _problem("Conv2d-0")
    shadow = Shadow(model)
    columns = torch.randn(7, 3, 2).double()
    with traced(shadow, (x,), shadow.names) as through:
        expected = through.squared_vjp(columns)
        monkeypatch.setattr(TracedPass, "_columns_at_once", lambda *_: columns_at_once)
        assert_close(through.squared_vjp(columns), expected)
        monkeypatch.setattr("fishopt.passes.backward.BATCHED_UP_TO", 0)
        assert_close(through.squared_vjp(columns), expected)


def test_no_per_input_gradient_of_the_whole_batch_is_formed(monkeypatch):
    """The largest tensor of a convolution's rule is far below N times its weight."""
    monkeypatch.setattr(gradients, "MAX_ELEMENTS", 2**10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32 * 4, 2))
    x = torch.randn(64, 3, 4, 4)
    shadow = Shadow(model)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            largest.append(found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    with traced(shadow, (x,), shadow.names) as through, Sizes():
        through.squared_vjp(torch.randn(1, 64, 2))
    assert 0 < max(largest) < 64 * model[0].weight.numel() / 4


@pytest.mark.filterwarnings("ignore:Full backward hook")  # BackPACK's, where the input needs no gradient
def test_rules_inside_backpack():
    model, x = _problem("Conv2d-3")
    c = torch.randn(3, 2).double()
    shadow = Shadow(model)
    with traced(shadow, (x,), shadow.names) as through:
        expected = through.squared_vjp(c[None])
    extend(model)
    with backpack(sum_grad_squared()):
        (model(x) * c).sum().backward()
    assert_close({name: p.sum_grad_squared for name, p in model.named_parameters()}, expected)
