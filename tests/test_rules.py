"""Every module with a rule, in all its options, against torch.func: no per-input gradient is taken on trust."""

import pytest
import torch
from backpack import backpack, extend
from torch import nn

from fishopt.passes import Shadow, gradients
from fishopt.passes.backpack import sum_grad_squared
from fishopt.passes.traced import TracedPass
from tests.asserts import assert_close
from tests.engines import functional, is_ruled, traced

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
    x = torch.randn(inputs, *shape)
    # Smooth above the module, so that its second derivatives do not vanish.
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten())
    model.append(nn.Linear(model(x).shape[1], 2))
    return model.to(dtype), x.to(dtype)


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
    with traced(shadow, (x.float(),), shadow.names) as through:
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
