"""Three routes to a Hessian diagonal: which parameters take which, and that each is right."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishopt
from fishopt.batch import Batch
from fishopt.passes import Arguments, Shadow, Sketch
from fishopt.variance import mean_label_variance
from tests.asserts import assert_close
from tests.engines import functional, is_ruled, traced


class Custom(nn.Module):
    """Two layers with something in between and something on top."""

    def __init__(self, above, width=3, outputs=None):
        super().__init__()
        self.below = nn.Linear(3, 4)
        self.inner = nn.Linear(4, 4)
        self.top = nn.Linear(outputs or 4, 2)
        self.above = above

    def forward(self, x):
        return self.top(self.above(self.inner(torch.tanh(self.below(x)))))


def _norm():
    norm = nn.BatchNorm1d(4)
    norm.running_var.uniform_(0.5, 2)
    return norm.eval()


# What lies above ``inner``, the width it puts out, and whether the Hessian in inner's output is a diagonal matrix.
ABOVE = {
    "sigmoid": (torch.sigmoid, 4, True),
    "relu_then_tanh": (lambda z: torch.tanh(torch.relu(z)), 4, True),
    "scaled": (lambda z: torch.tanh(2 * z / 3 + 1), 4, True),
    "softplus_and_skip": (lambda z: F.softplus(z) + z, 4, True),
    "gelu": (F.gelu, 4, True),
    "silu": (F.silu, 4, True),
    "square": (lambda z: z**2, 4, True),
    "elu_then_relu": (lambda z: torch.relu(F.elu(z)), 4, True),
    "max_pool": (lambda z: torch.tanh(F.max_pool1d(z[:, None], 3, 1)[:, 0]), 2, True),
    "two_of_it": (lambda z: torch.cat([torch.tanh(z), torch.sigmoid(z)], 1), 8, True),
    "average_on_top": (lambda z: F.avg_pool1d(torch.tanh(z)[:, None], 2)[:, 0], 2, True),
    "part": (lambda z: torch.tanh(z[:, 1:3]), 2, True),
    "average_below": (lambda z: torch.tanh(F.avg_pool1d(z[:, None], 2)[:, 0]), 2, False),
    "sum_below": (lambda z: torch.tanh(z[:, :2] + z[:, 2:]), 2, False),
    "twice": (lambda z: torch.tanh(torch.sigmoid(z)), 4, False),
    "softmax": (lambda z: z.softmax(1), 4, False),
    "product": (lambda z: z * torch.tanh(z), 4, False),
    "product_of_parts": (lambda z: z[:, :2] * torch.sigmoid(z[:, 2:]), 2, False),
    "layer_norm": (lambda z: F.layer_norm(z, (4,)), 4, False),
    "group_norm": (lambda z: F.group_norm(z, 2), 4, False),
    "instance_norm": (lambda z: F.instance_norm(z[:, None])[:, 0], 4, False),
    "reciprocal_of_sum": (lambda z: 1 / (1 + z.square().sum(1, keepdim=True)).expand(-1, 4), 4, False),
    "divided": (lambda z: torch.ones_like(z) / (3 + z.sum(1, keepdim=True)), 4, False),
    "outer": (lambda z: torch.tanh(z[:, :, None] * z[:, None, :]).flatten(1), 16, False),
}


@pytest.mark.parametrize("name", ABOVE)
def test_where_the_closed_form_is_taken_it_is_exact(name):
    above, width, diagonal = ABOVE[name]
    torch.manual_seed(0)
    model = Custom(above, outputs=width).double()
    x = torch.randn(3, 3).double()
    shadow = Shadow(model)
    assert is_ruled(shadow, (x,), shadow.names)
    claimed = shadow.structure(Arguments((x,))).diagonal
    assert ("inner.weight" in claimed) == ("inner.bias" in claimed)
    assert claimed <= {"inner.weight", "inner.bias"}
    assert diagonal or not claimed  # a closed form that is not there would be wrong; one not seen is only slow
    if diagonal and name != "square":
        assert claimed, "the closed form was not seen"
    c = torch.randn(3, 2).double()
    with traced(shadow, (x,), shadow.names) as fast, functional(shadow, (x,), shadow.names) as slow:
        assert_close(fast.hessian_diagonal(c, per_input=True), slow.hessian_diagonal(c, per_input=True))


def test_gated_layers_do_not_share_a_closed_form():
    """Either half alone is smooth in single entries, but their product mixes the two."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.top = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.top(torch.tanh(self.left(x)) * torch.sigmoid(self.right(x)))

    torch.manual_seed(0)
    shadow = Shadow(Gated().double())
    x, c = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    with traced(shadow, (x,), shadow.names) as fast, functional(shadow, (x,), shadow.names) as slow:
        assert_close(fast.hessian_diagonal(c), slow.hessian_diagonal(c))


class Fed(nn.Module):
    """Two modules that feed one smooth function: each has a diagonal Hessian, the two together have not."""

    def __init__(self, join):
        super().__init__()
        self.left, self.right, self.top, self.join = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2), join

    def forward(self, x):
        return self.top(torch.tanh(self.join(self.left(x), self.right(x))))


JOINED = {
    "sum": lambda: Fed(lambda a, b: a + b),
    "difference": lambda: Fed(lambda a, b: a - b),
    "batch_norm": lambda: nn.Sequential(nn.Linear(3, 4), _norm(), nn.Sigmoid(), nn.Linear(4, 2)),
    "conv_batch_norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), _norm(), nn.SiLU(), nn.Flatten(), nn.Linear(8, 2)
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_modules_that_feed_one_smooth_function_are_kept_apart(name):
    torch.manual_seed(0)
    shadow = Shadow(JOINED[name]().double())
    x, c = torch.randn(3, 3).double(), torch.randn(3, 2).double()
    with traced(shadow, (x,), shadow.names) as fast, functional(shadow, (x,), shadow.names) as slow:
        assert len({n.rpartition(".")[0] for n in shadow.structure(Arguments((x,))).diagonal}) == 2
        assert_close(fast.hessian_diagonal(c), slow.hessian_diagonal(c))
        weights = torch.rand(1, 3).double()
        assert_close(fast.hessian_square(c[None], weights), slow.hessian_square(c[None], weights))


def _deep(kind):
    torch.manual_seed(1)
    if kind == "conv":
        model = nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 1, 2), nn.Tanh(), nn.Conv1d(1, 2, 2), nn.Sigmoid(), nn.Flatten(),
            nn.Linear(2, 2),
        )  # fmt: skip
    else:
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 3), nn.Tanh())
        model.append(nn.Linear(3, 2))
    return model.double(), torch.randn(2, 3).double()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("engine", [traced, functional])
def test_the_sketch_over_all_signs(engine, kind, monkeypatch):
    """Its mean is the exact value, of all layers that share the probes."""
    model, x = _deep(kind)
    shadow = Shadow(model)
    with torch.no_grad(), traced(shadow, (x,), shadow.names) as probe:
        settled = shadow.structure(Arguments((x,))).diagonal | shadow.structure(Arguments((x,))).piecewise
        deep = [name for name in shadow.names if name not in settled]
        units = sum(probe._contacts[i].shapes[0][1:].numel() for i in probe._of(deep))
    if engine is functional:
        deep = deep[:2]
        units = sum(shadow.parameters[name].numel() for name in deep)
    c = torch.randn(2, 2).double()
    exact = functional(shadow, (x,), deep).hessian_diagonal(c, per_input=True)
    weights = torch.rand(1, 2).double()
    sketch = Sketch(exact_up_to=0)
    found = []
    for pattern in itertools.product((-1.0, 1.0), repeat=units):

        def drawn(shape, like, generator, pattern=pattern, taken=[0]):  # noqa: B006 - counts through the pattern
            size = math.prod(shape[1:])
            part = [pattern[(taken[0] + i) % units] for i in range(size)]
            taken[0] += size
            return torch.tensor(part).to(like).reshape(shape[1:]).expand(tuple(shape))

        monkeypatch.setattr(f"fishopt.passes.{engine.__name__}.signs", drawn)
        with engine(shadow, (x,), deep) as through:
            found.append(through.hessian_diagonal(c, per_input=True, sketch=sketch))
            squares = through.hessian_square(c[None], weights, sketch=sketch)
        expected = {name: torch.tensordot(weights[0], r.square(), dims=1) for name, r in found[-1].items()}
        assert_close(squares, expected)
    for name in deep:
        torch.testing.assert_close(torch.stack([one[name] for one in found]).mean(0), exact[name])
    assert max(float(torch.stack([one[name] for one in found]).var(0).max()) for name in deep) > 0


def test_the_sketchs_variance_in_closed_form():
    """For a linear layer: ``a_i^4`` times the squares of the other entries in the unit's row of the Hessian."""
    model, x = _deep("linear")
    shadow = Shadow(model)
    c = torch.randn(2, 2).double()
    names = ["0.weight"]

    def above(z):
        return (model[1:](z) * c[n]).sum()

    expected = torch.zeros(2, 3).double()
    for n in range(2):
        hessian = torch.autograd.functional.hessian(above, model[0](x[n]))
        others = hessian.square() - torch.diag(hessian.diag().square())
        expected += torch.outer(others.sum(1), x[n] ** 4)
    sketch = Sketch(torch.Generator().manual_seed(0), exact_up_to=0)
    with traced(shadow, (x,), names) as through:
        exact = through.hessian_diagonal(c)["0.weight"]
        runs = torch.stack([through.hessian_diagonal(c, sketch=sketch)["0.weight"] for _ in range(400)])
    # Two units, so the row has one other entry and every draw is off by the same amount: the spread is exact.
    deviations = (runs - exact).square().mean(0)
    torch.testing.assert_close(deviations, expected, rtol=0.25, atol=1e-12)
    assert ((runs.mean(0) - exact) / (expected / 400).sqrt()).abs().max() < 5


def test_selection_counts_the_sketchs_own_variance():
    """The mean of the square of a sketch of mean zero is V2 plus what the sketch adds."""
    model, x = _deep("linear")
    batch = Batch.of(model, x, "categorical")
    exact = mean_label_variance(batch, "I2")
    sketch = Sketch(torch.Generator().manual_seed(0), exact_up_to=0)
    sketched = [mean_label_variance(batch, "I2", sketch=sketch) for _ in range(100)]
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.stack([one[name] for one in sketched]).mean(0).sum() > 1.01 * exact[name].sum()
    for name in ("4.weight", "4.bias"):  # one smooth function above: no sketch, no noise
        torch.testing.assert_close(sketched[0][name], exact[name])


def test_the_last_two_layers_are_never_sketched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.Sigmoid(), nn.Linear(300, 400), nn.Sigmoid(), nn.Linear(400, 3))
    x = torch.randn(2, 4)
    costs = traced(Shadow(model), (x,), tuple(dict(model.named_parameters())))
    assert costs.hessian_cost("0.weight") > 1000 > costs.hessian_cost("0.weight", Sketch())
    assert costs.hessian_cost("2.weight") == costs.hessian_cost("2.weight", Sketch()) < 10
    runs = [
        fishopt.fisher_diagonal(model, x, "gaussian", estimator="I2", generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert_close(*runs, rtol=0, atol=0)


def test_i2_on_a_smooth_convolutional_network():
    """Where BackPACK's DiagHessian has no memory for its factors."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    found = fishopt.fisher_diagonal(model, x, "categorical", estimator="I2", generator=generator)
    exact = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    torch.testing.assert_close(found["6.weight"], exact["6.weight"])
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not torch.equal(found["0.weight"], exact["0.weight"])
