"""Any network: derivatives per input by brute force, by the way that is expected of each parameter."""

import copy
from dataclasses import dataclass

import pytest
import torch

from fishopt.batch import Batch
from fishopt.estimators import Draw, by_structure, estimate
from fishopt.likelihoods import Categorical
from fishopt.passes import Arguments, Shadow, coverage_of, open_pass
from tests.asserts import assert_close
from tests.networks import NETWORKS

PER_INPUT = [name for name, network in NETWORKS.items() if "pooled" not in network.ways.values()]


def arguments(network, count):
    *parts, last = network.inputs(count)
    args, kwargs = (parts, last) if isinstance(last, dict) else ([*parts, last], {})
    return Arguments(args, kwargs).map(lambda x: x.double() if x.is_floating_point() else x)


def built(name):
    torch.manual_seed(len(name))
    network = NETWORKS[name]
    return network, network.build().double()


@dataclass
class Jacobians:
    """By plain autograd, one output of one input at a time."""

    h: torch.Tensor
    first: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model, network, inputs):
        model = copy.deepcopy(model).eval()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        outputs, rows = [], {name: [] for name in trained}
        for n in range(inputs.count):
            h = inputs.take(slice(n, n + 1)).call(model)
            h = (h if network.readout is None else network.readout(h)).flatten()
            outputs.append(h.detach())
            found = {name: [] for name in trained}
            for one in h:
                model.zero_grad()
                one.backward(retain_graph=True)  # reentrant checkpoints know nothing else
                for name, p in trained.items():
                    found[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
            for name, gradients in found.items():
                rows[name].append(torch.stack(gradients))
        return cls(torch.stack(outputs), {name: torch.stack(found) for name, found in rows.items()})

    def squared(self, columns):
        """``[N, *shape]``."""
        return {name: torch.einsum("kna,na...->kn...", columns, j).square().sum(0) for name, j in self.first.items()}

    def summed(self, columns):
        return {name: value.sum(0) for name, value in self.squared(columns).items()}


def expected_ways(network, names):
    return {name: next(way for start, way in network.ways.items() if name.startswith(start)) for name in names}


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("name", PER_INPUT)
def test_first_derivatives_by_the_expected_way(name):
    """On batches of other sizes, and of other inputs, than the coverage was tried on."""
    network, model = built(name)
    shadow = Shadow(model, network.readout)
    ways = coverage_of(shadow, arguments(network, 4)).ways
    assert ways == expected_ways(network, ways)
    for count in (1, 3, 6):
        inputs = arguments(network, count)
        brute = Jacobians.of(model, network, inputs)
        columns = torch.randn(3, *brute.h.shape).double()
        with open_pass(shadow, inputs, shadow.names) as through:
            torch.testing.assert_close(through.outputs.reshape(brute.h.shape), brute.h)
            assert_close(through.squared_vjp(columns, per_input=True), brute.squared(columns))
            assert_close(through.squared_vjp(columns), brute.summed(columns))
            assert_close(through.squared_vjp(columns[:1]), brute.summed(columns[:1]))
            weights = torch.randn(1, count).double()
            fourth = {k: torch.einsum("n,n...->...", weights[0], v.square()) for k, v in brute.squared(columns).items()}
            assert_close(through.fourth_vjp(columns[None], weights), fourth)
            sums = through.quartic_sums(columns, torch.ones(3, count).double(), weights.expand(3, -1))
            assert_close({k: v[0] for k, v in sums.items()}, brute.summed(columns))
        assert coverage_of(shadow, inputs).ways == ways


@pytest.mark.parametrize("name", PER_INPUT)
def test_exact_value_and_mean_of_squared_scores(name):
    """Both are the mean over labels, enumerated, of the squared scores."""
    network, model = built(name)
    inputs = arguments(network, 3)
    brute = Jacobians.of(model, network, inputs)
    sigma = brute.h.softmax(-1)
    scores = sigma - torch.eye(sigma.shape[1]).double()[:, None]
    columns = scores * (sigma.T[..., None] / 3).sqrt()
    before = copy.deepcopy(model.state_dict())
    batch = Batch(Shadow(model, network.readout), inputs, Categorical())
    found = estimate(batch, by_structure({"exact": batch.names}, batch.structure, batch.coverage), Draw())
    assert_close({name: found[name] for name in batch.names}, brute.summed(columns))
    with open_pass(batch.shadow, inputs, batch.names) as through:
        assert_close(through.squared_vjp(columns), brute.summed(columns))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", PER_INPUT)
def test_vjps_and_their_inner_products(name, monkeypatch):
    """The latter also where gradients are formed for one input at a time."""
    network, model = built(name)
    inputs = arguments(network, 3)
    jacobians = Jacobians.of(model, network, inputs)
    columns = torch.randn(2, *jacobians.h.shape, dtype=torch.float64)
    shadow = Shadow(model, network.readout)
    with open_pass(shadow, inputs, shadow.names) as through:
        found, grams = through.vjp(columns), [through.gram(columns)]
        monkeypatch.setattr("fishopt.passes.gradients.MAX_GRAM_ELEMENTS", 1)
        grams.append(through.gram(columns))
    expected = {n: torch.einsum("kna,na...->kn...", columns, j) for n, j in jacobians.first.items()}
    assert_close(found, expected)
    rows = torch.cat([g.reshape(2, 3, -1) for g in expected.values()], dim=2)
    for gram in grams:
        torch.testing.assert_close(gram, torch.einsum("knp,lmp->knlm", rows, rows), rtol=1e-8, atol=1e-10)
