"""Both passes give the two primitives by definition, alone and together."""

import copy

import pytest
import torch
from torch import nn

import fishopt
from fishopt.passes import Arguments, Shadow, open_pass
from tests.asserts import assert_close
from tests.cases import CASES, Case
from tests.engines import functional, is_ruled, traced
from tests.reference import derivatives

CATEGORICAL = [case for case in CASES if case.family == "categorical"]
HOOKABLE = {
    "linear",
    "sigmoid",
    "relu",
    "elu",
    "softplus",
    "smooth_end",
    "conv_relu",
    "conv_sigmoid",
    "conv_groups",
    "two_inputs",
    "batch_norm",
    "repeated",
}


def _columns(n, t, k=2):
    return torch.randn(k, n, t, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("engine", [traced, functional])
@pytest.mark.parametrize("case", CATEGORICAL, ids=str)
def test_primitives_by_definition(case, engine):
    model, inputs, _ = case.build()
    shadow = Shadow(model)
    if engine is traced and not is_ruled(shadow, inputs, shadow.names):
        assert case.network not in HOOKABLE
        return
    d = derivatives(model, inputs)
    columns = _columns(*d.h.shape)
    squared = torch.einsum("kna,nap->knp", columns, d.first).square().sum(0)
    curvature = torch.einsum("na,nap->np", columns[0], d.second)
    with engine(shadow, inputs, shadow.names) as through:
        torch.testing.assert_close(through.outputs.reshape(d.h.shape), d.h)
        assert_close(through.squared_vjp(columns, per_input=True), d.by_name(squared))
        assert_close(through.squared_vjp(columns), d.by_name(squared.sum(0)))
        assert_close(through.hessian_diagonal(columns[0], per_input=True), d.by_name(curvature))
        assert_close(through.hessian_diagonal(columns[0]), d.by_name(curvature.sum(0)))


@pytest.mark.parametrize("case", CATEGORICAL, ids=str)
def test_some_names_only(case):
    model, inputs, _ = case.build()
    shadow = Shadow(model)
    wanted = shadow.names[-1:]
    d = derivatives(model, inputs)
    columns = _columns(*d.h.shape)
    squared = torch.einsum("kna,nap->knp", columns, d.first).square().sum((0, 1))
    with open_pass(shadow, Arguments(inputs), wanted) as through:
        found = through.squared_vjp(columns)
    assert_close(found, {name: v for name, v in d.by_name(squared).items() if name in wanted})


@pytest.mark.parametrize("case", CATEGORICAL, ids=str)
def test_structure_matches_second_derivatives(case):
    """What is called structurally zero is zero; affine parameters have a constant Jacobian in themselves."""
    model, inputs, _ = case.build()
    structure = Shadow(model).structure(Arguments(inputs))
    d = derivatives(model, inputs)
    flat = d.second.abs().amax((0, 1)) > 1e-12
    curved = {name for name, part in d.by_name(flat).items() if part.any()}
    assert not curved & structure.piecewise
    assert structure.affine <= structure.piecewise
    moved = (d.first.abs() > 1e-12).any(0).sum(0) > 1
    crowded = {name for name, part in d.by_name(moved).items() if part.any()}
    assert not crowded & structure.separable


def test_structure_is_found_in_any_forward():
    expected = {
        "relu": ({"4.weight", "4.bias"}, 6),
        "residual": ({"head.weight"}, 4),
        "sigmoid": ({"4.weight", "4.bias"}, 2),
        "two_inputs": ({"head.weight", "head.bias", "right.weight", "right.bias"}, 4),
        "tied": ({"head.weight", "head.bias"}, 2),
        "smooth_end": (set(), 0),
    }
    for network, (affine, piecewise) in expected.items():
        model, inputs, _ = Case(network, "categorical").build()
        structure = Shadow(model).structure(Arguments(inputs))
        assert affine <= structure.affine, network
        assert len(structure.piecewise) == piecewise + ("shared.bias" in structure.piecewise), network


def test_float32_agrees_with_the_reference():
    for case in CATEGORICAL:
        model, inputs, _ = case.build()
        d = derivatives(model, inputs)
        columns = _columns(*d.h.shape)
        squared = torch.einsum("kna,nap->knp", columns, d.first).square().sum((0, 1))
        model, inputs = model.float(), tuple(x.float() for x in inputs)
        shadow = Shadow(model)
        with open_pass(shadow, Arguments(inputs), shadow.names) as through:
            found = through.squared_vjp(columns.float())
        for name, value in d.by_name(squared).items():
            torch.testing.assert_close(
                found[name].double(), value, rtol=1e-4, atol=1e-4 * float(value.abs().max() + 1e-3)
            )


def test_shadow_shares_storage_and_notices_when_it_breaks():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    shadow = Shadow(model)
    assert shadow.is_current()
    with torch.no_grad():
        model[0].weight.mul_(2)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert shadow.is_current()
    assert torch.equal(shadow.module[0].weight, model[0].weight)
    model[0].weight.data = model[0].weight.data.clone()
    assert not shadow.is_current()
    shadow = Shadow(model)
    model[1] = nn.Identity()
    assert not shadow.is_current()
    shadow = Shadow(model)
    model.double()
    assert not shadow.is_current()


def test_shadow_leaves_hooks_behind_and_weight_norm_in_place():
    seen = []
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.ReLU(inplace=True)).double()
    model.register_forward_hook(lambda *args: seen.append(args))
    x = torch.randn(4, 3, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model[0].weight_g.mul_(3)
    shadow = Shadow(model)
    out = shadow.module(x)
    assert len(seen) == 1
    torch.testing.assert_close(out, model(x))


def test_no_memory_is_held_after_a_pass():
    model, inputs, _ = Case("sigmoid", "categorical").build()
    shadow = Shadow(model)
    with open_pass(shadow, Arguments(inputs), shadow.names) as through:
        through.squared_vjp(_columns(3, 3))
    left = [k for m in shadow.extended.modules() for k in vars(m) if k.startswith(("input", "output"))]
    assert left == []
    assert all(p.grad is None for p in shadow.extended.parameters())


class InPlace(nn.Module):
    """The block of a residual network as torchvision writes it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        out = self.conv(x)
        out += x
        return self.head(torch.relu_(out).flatten(1))


class Recurrent(nn.Module):
    """No batching rule, and no forward mode."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.flatten(2).mT)[0][:, -1]


REFUSED = {
    "in_place": InPlace,
    "channels_last": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(2, 3)
    ).to(memory_format=torch.channels_last),
    "pooling_option": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2, padding=1), nn.Sigmoid(), nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Flatten(),
        nn.Linear(8, 3),
    ),
    "recurrent": Recurrent,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_engine_refuses_goes_another_way(name):
    """Squares of gradients and second derivatives, each entry by autograd on one input at a time."""
    torch.manual_seed(0)
    model = REFUSED[name]().double()
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    if name == "recurrent":
        x = torch.randn(2, 2, 3, dtype=torch.float64)
    if name == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    shadow = Shadow(model)
    c = _columns(2, 3, 1)
    with open_pass(shadow, Arguments((x,)), shadow.names) as through:
        squared, curvature = through.squared_vjp(c), through.hessian_diagonal(c[0])
    parameters = dict(model.named_parameters())
    for name_, p in parameters.items():
        expected = torch.zeros_like(p)
        second = torch.zeros_like(p)
        for n in range(2):
            scalar = (model(x[n : n + 1]).flatten() * c[0, n]).sum()
            (g,) = torch.autograd.grad(scalar, p, create_graph=True)
            expected += g.detach().square()
            for i in range(p.numel()):
                if g.requires_grad:
                    (row,) = torch.autograd.grad(g.flatten()[i], p, retain_graph=True, allow_unused=True)
                    second.view(-1)[i] += 0 if row is None else row.flatten()[i]
        torch.testing.assert_close(squared[name_], expected)
        torch.testing.assert_close(curvature[name_], second)


class Siamese(nn.Module):
    """A module fed two of everything at once: its first dimension is not the inputs'."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.encoder(torch.stack([x, x.flip(1)])).unbind()
        return a * b


class Broadcast(nn.Module):
    """A last layer whose one bias moves every output."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Mul(torch.autograd.Function):
    """Cubes; named as torch names its own, linear, multiplication."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return Mul.apply(self.layer(x))


@pytest.mark.parametrize("inputs", [2, 3, 5])
@pytest.mark.parametrize("build", [Siamese, Broadcast])
def test_structures_that_only_look_simple(build, inputs):
    torch.manual_seed(0)
    model = build().double()
    x = torch.randn(inputs, 4, dtype=torch.float64)
    d = derivatives(model, (x,))
    sigma = d.h.softmax(-1)
    covariance = torch.diag_embed(sigma) - sigma[:, :, None] * sigma[:, None, :]
    expected = torch.einsum("nap,nab,nbp->p", d.first, covariance, d.first) / inputs
    found = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    assert_close(found, d.by_name(expected))


def test_a_users_own_function_is_not_taken_for_torchs():
    structure = Shadow(Cubed()).structure(Arguments((torch.randn(2, 4),)))
    assert not structure.piecewise


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_reparametrised_weights(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    found = fishopt.fisher_diagonal(model, x, "gaussian", estimator="exact")
    for name, p in model.named_parameters():
        rows = [torch.autograd.grad(h, p, retain_graph=True)[0] for h in model(x).flatten()]
        torch.testing.assert_close(found[name], sum(row.square() for row in rows) / 3)


class InPlaceOnSequences(nn.Module):
    """A linear layer's output on sequences is a view; changed in place, it is no longer what the hook saw."""

    def __init__(self, change):
        super().__init__()
        self.first, self.layer, self.top = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(8, 3)
        self.change = change

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.top(self.change(self.layer(h), h).flatten(1))


@pytest.mark.parametrize(
    "change",
    [lambda z, h: z.add_(h), lambda z, h: z.sigmoid_(), lambda z, h: z.mul_(2)],
    ids=["skip", "sigmoid", "scale"],
)
def test_changes_in_place_are_followed_or_seen(change):
    torch.manual_seed(0)
    model = InPlaceOnSequences(change).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    d = derivatives(model, (x,))
    expected = torch.einsum("nap,nap->p", d.first, d.first) / 3
    assert_close(fishopt.fisher_diagonal(model, x, "gaussian", estimator="exact"), d.by_name(expected))


def test_many_columns_are_not_held_at_once(monkeypatch):
    """A thousand outputs: the cotangents at all modules, for all columns and inputs, would not fit."""
    model, inputs, _ = Case("sigmoid", "categorical").build()
    shadow = Shadow(model)
    columns, weights = _columns(3, 3, 8)[None], torch.rand(1, 3, dtype=torch.float64)
    held = []
    with traced(shadow, inputs, shadow.names) as through:
        expected = through.fourth_vjp(columns, weights)
        vjp = through._vjp
        monkeypatch.setattr(through, "_vjp", lambda c, *rest: held.append(len(c)) or vjp(c, *rest))
        for name in ("SMALL", "MAX_GRADIENTS"):
            monkeypatch.setattr(f"fishopt.passes.backward.{name}", 1)
        assert_close(through.fourth_vjp(columns, weights), expected)
    assert max(held) == 3
