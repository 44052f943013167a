"""I2 and the selection on networks of any kind: a finite choice with its reason, exact values, or a clear refusal."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune, weight_norm

import fishopt
from fishopt.batch import Batch
from fishopt.estimators import Draw, by_structure, estimate
from fishopt.groups import layers
from fishopt.likelihoods import Categorical
from fishopt.passes import CoupledInputsError, Sketch, open_pass
from fishopt.passes.base import NoSecondDerivativesError
from fishopt.passes.shadow import Shadow
from fishopt.selection import CRITERIA, choose
from tests.asserts import assert_close
from tests.test_coverage import arguments, built

SMALL = [
    *(
        "checkpoint_attention",
        "attention_padding",
        "resnet",
        "paddings",
        "frames",
        "lstm",
        "gru_time_first",
        "rnncell_loop",
    ),
    *("packed", "siamese_joined", "siamese_alternating", "scale", "matmul", "einsum", "bilinear", "shared", "unused"),
    *("weight_norm", "orthogonal", "lora", "merged_zero", "old_function", "new_function", "vmap", "checkpoint"),
]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", [*SMALL, "sdpa_mask", "language_model", "lstm_deep", "coupled", "written_in"])
def test_a_finite_choice_and_its_reason(name, criterion):
    network, model = built(name)
    batch = Batch(Shadow(model, network.readout), arguments(network, 4), Categorical())
    candidates = ("I1", "I2", "hutchinson")
    for choice in choose(batch, layers(model), criterion, candidates, exact_up_to=0):
        assert choice.reason
        assert choice.estimator in candidates
        assert not choice.scores or math.isfinite(choice.scores[choice.estimator])


def hessian_diagonal(model, network, inputs, c):
    """By plain autograd, one input and one entry at a time."""
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros(inputs.count, *p.shape, dtype=p.dtype) for name, p in parameters.items()}
    for n in range(inputs.count):
        h = inputs.take(slice(n, n + 1)).call(model)
        h = (h if network.readout is None else network.readout(h)).flatten()
        for name, p in parameters.items():
            (g,) = torch.autograd.grad(h @ c[n], p, create_graph=True, allow_unused=True)
            for i in range(p.numel() if g is not None and g.requires_grad else 0):
                (row,) = torch.autograd.grad(g.flatten()[i], p, retain_graph=True, allow_unused=True)
                found[name][n].view(-1)[i] = 0 if row is None else row.flatten()[i]
    return found


@pytest.mark.parametrize("name", SMALL)
def test_hessian_diagonal(name):
    network, model = built(name)
    shadow, inputs = Shadow(model, network.readout), arguments(network, 2)
    with open_pass(shadow, inputs, shadow.names) as through:
        c = torch.randn(2, through.outputs[0].numel(), dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
            expected = hessian_diagonal(model, network, inputs, c)
        assert_close(through.hessian_diagonal(c, per_input=True), expected)
        generator = torch.Generator().manual_seed(0)
        draws = [
            through.hessian_diagonal(c, per_input=True, sketch=Sketch(generator, exact_up_to=0)) for _ in range(64)
        ]
    scores = []
    for key, value in expected.items():
        drawn = torch.stack([draw[key] for draw in draws])
        error, spread = drawn.mean(0) - value, drawn.std(0) / 8
        certain = spread < 1e-9
        torch.testing.assert_close(error[certain], torch.zeros_like(error[certain]), rtol=0, atol=1e-8)
        scores.append((error / spread)[~certain])
    z = torch.cat(scores)
    # A two-valued draw can agree 64 times by chance; the mean square over all entries shows a bias.
    assert not len(z) or z.square().mean() < 1 + 8 * (2 / len(z)) ** 0.5 + 0.5


@pytest.mark.parametrize("name", ["coupled", "written_in"])
def test_pooled_parameters_have_no_second_derivatives_and_say_so(name):
    network, model = built(name)
    batch = Batch(Shadow(model, network.readout), arguments(network, 4), Categorical())
    pooled = [key for key in batch.names if batch.coverage.is_pooled(key)]
    assert pooled
    with open_pass(batch.shadow, batch.inputs, pooled) as through:
        c = torch.randn(4, through.outputs[0].numel(), dtype=torch.float64)
        with pytest.raises(NoSecondDerivativesError, match="per input"):
            through.hessian_diagonal(c)
        with pytest.raises(CoupledInputsError, match="couples the inputs"):
            through.squared_vjp(c[None], per_input=True)
    plan = by_structure({"I2": batch.names}, batch.structure, batch.coverage)
    found = estimate(batch, plan, Draw(generator=torch.Generator().manual_seed(0)))
    assert all(value.isfinite().all() for value in found.values())


def test_i2_in_one_call_on_any_of_them():
    for name in ("language_model", "gru", "packed", "old_function", "coupled"):
        network, model = built(name)
        inputs = tuple(x.double() if x.is_floating_point() else x for x in network.inputs(4))
        found = fishopt.fisher_diagonal(model, inputs, "gaussian", estimator="I2")
        assert all(value.isfinite().all() for value in found.values()), name


def _chains():
    """Networks whose modules BackPACK knows by class, but not with these settings."""
    below, above = (nn.Conv2d(1, 2, 2), nn.Tanh()), (nn.Flatten(), nn.Tanh())
    yield "divisor", nn.Sequential(*below, nn.AvgPool2d(2, divisor_override=3), *above, nn.Linear(2, 3))
    yield "ceiling", nn.Sequential(*below, nn.AvgPool2d(2, ceil_mode=True), *above, nn.Linear(8, 3))
    pruned = nn.Sequential(nn.Flatten(), nn.Linear(25, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    prune.random_unstructured(pruned[1], "weight", amount=0.5)
    yield "pruned", pruned
    normed = nn.Sequential(nn.Flatten(), nn.Linear(25, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(normed[3])
    yield "normed", normed


@pytest.mark.parametrize("name", ["divisor", "ceiling", "pruned", "normed"])
def test_chains_that_are_not_as_backpack_takes_them(name):
    """As the same network where it is no chain of modules."""
    torch.manual_seed(0)
    side = 4 if name in ("divisor", "ceiling") else 5
    model = dict(_chains())[name]
    x = torch.randn(3, 1, side, side)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x) + 0.0

    for function in (fishopt.label_variance, fishopt.variance_bound):
        found = function(model, x, "categorical", estimator="I2")
        expected = function(Wrapped(), x, "categorical", estimator="I2")
        assert_close(
            found, {key.removeprefix("inner."): value for key, value in expected.items()}, rtol=1e-3, atol=1e-7
        )
    assert fishopt.select_estimators(model, x, "categorical")
