"""The measurement of variance-aware damping: the standard error that it goes by is right."""

import math

import pytest
import torch
from torch import nn

import fishopt
from benchmarks.caution import Cautious, spread


def test_the_variance_of_an_average_is_known_without_bias():
    """Of independent estimates: the mean over many runs is what the weights of the average make of one's variance."""
    decay, counts, runs, size = 0.8, 12, 4000, 5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(runs, counts, size, dtype=torch.float64, generator=generator)
    found = []
    for run in noise:
        state = {"fisher": torch.zeros(size, dtype=torch.float64)}
        for count, new in enumerate(run):
            told = spread(3.0 + 0.5 * new, state, decay)
            state["fisher"].lerp_(3.0 + 0.5 * new, 1 - decay)
            state["refreshes"] = count + 1
        found.append(told)
    weights = torch.tensor([(1 - decay) * decay**k for k in range(counts)]) / (1 - decay**counts)
    expected = 0.25 * size * float(weights.square().sum())
    told = torch.tensor(found)
    z = (told.mean() - expected) / (told.std() / math.sqrt(runs))
    assert abs(float(z)) < 4
    with pytest.raises(AssertionError):
        assert abs(float((told.mean() * 1.05 - expected) / (told.std() / math.sqrt(runs)))) < 4


def _trained(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    kind = Cautious if options.pop("ours", True) else fishopt.FisherAdam
    optimizer = kind(model, nn.CrossEntropyLoss(), damping=0.1, **options)
    for _ in range(4):
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def test_without_caution_it_is_fisher_adam():
    for ours, theirs in zip(_trained()[0].parameters(), _trained(ours=False)[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_caution_adds_the_error_and_shrinking_moves_to_the_mean():
    model, optimizer = _trained(caution=2.0, eps=0.0)
    p = model[0].weight
    state = optimizer.state[p]
    averages = {q: optimizer.state[q]["fisher"].clamp_min(0) / (1 - 0.95**4) for q in model[0].parameters()}
    layer = torch.cat([a.flatten() for a in averages.values()]).mean()
    scaled = (averages[p] + 2.0 * state["error"]).sqrt() + 0.1 * layer.sqrt()
    assert state["error"] > 0
    torch.testing.assert_close(state["preconditioner"], scaled.square() / optimizer._moment.batch_size)
    shrunk, plain = _trained(shrink=True)[1], _trained()[1]
    largest = [float(next(iter(o.state.values()))["preconditioner"].max()) for o in (shrunk, plain)]
    assert largest[0] < largest[1]
