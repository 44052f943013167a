"""The wrapper of the package schedule-free, the real one: our optimizers train in it, and go on in it when resumed."""

import copy

import pytest
import schedulefree
import torch
from torch import nn

import fishopt
from tests.libraries_setup import FAST, LOSSES, batches, both, mean_loss, network, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Free:
    """An optimizer in a ScheduleFreeWrapper, without momentum of its own."""

    def __init__(self, kind, family="ce"):
        own = {"betas": (0.0, 0.95)} if kind is fishopt.FisherAdam else {"momentum": 0.0}
        self.model, self.loss_fn, self.family = network(), LOSSES[family](), family
        self.base = kind(self.model, self.loss_fn, **{**FAST[kind], **own})
        self.optimizer = schedulefree.ScheduleFreeWrapper(self.base, momentum=0.9)

    def fit(self, epochs, closure=False):
        self.optimizer.train()
        for _ in range(epochs):
            for x, y in batches(self.family):

                def evaluate(x=x, y=y):
                    self.optimizer.zero_grad()
                    loss = self.loss_fn(self.model(x), y)
                    loss.backward()
                    return loss

                if closure:
                    assert self.optimizer.step(evaluate).requires_grad
                else:
                    evaluate()
                    self.optimizer.step()
        self.optimizer.eval()
        return self


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
def test_schedule_free_trains(kind, family, closure):
    run = Free(kind, family).fit(10, closure)
    assert mean_loss(run.model, family) < 0.7 * mean_loss(network(), family)
    moved = weights(run.model).clone()
    run.optimizer.train()
    assert not torch.equal(weights(run.model), moved)
    run.optimizer.eval()
    torch.testing.assert_close(weights(run.model), moved)
    if closure:
        assert torch.equal(moved, weights(Free(kind, family).fit(10).model))


@both
@pytest.mark.parametrize("family", LOSSES)
def test_schedule_free_resumes_bit_for_bit(kind, family):
    run = Free(kind, family).fit(3)
    state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    other = Free(kind, family).fit(1)
    other.model.load_state_dict(state[0])
    other.optimizer.load_state_dict(state[1])
    assert torch.equal(weights(run.fit(3).model), weights(other.fit(3).model))
    assert run.base.report().rows == other.base.report().rows


@both
def test_schedule_free_averages_what_the_optimizer_steps(kind):
    """By the paper's three sequences, y, z and x, in a plain loop around an optimizer of z."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    run = Free(kind)
    run.optimizer.train()
    (x, y) = next(iter(batches()))
    for _ in range(3):
        run.optimizer.zero_grad()
        loss_fn(run.model(x), y).backward()
        run.optimizer.step()
    run.optimizer.eval()
    own = {"betas": (0.0, 0.95)} if kind is fishopt.FisherAdam else {"momentum": 0.0}
    optimizer = kind(model, loss_fn, **{**FAST[kind], **own})
    z = [p.detach().clone() for p in model.parameters()]
    average = [p.clone() for p in z]
    for step in range(3):
        with torch.no_grad():
            for p, a, b in zip(model.parameters(), average, z, strict=True):
                p.copy_(0.9 * a + 0.1 * b)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        with torch.no_grad():
            for p, b in zip(model.parameters(), z, strict=True):
                p.copy_(b)
        optimizer.step()
        z = [p.detach().clone() for p in model.parameters()]
        average = [a + (b - a) / (step + 1) for a, b in zip(average, z, strict=True)]
    torch.testing.assert_close(weights(run.model), torch.cat([a.flatten() for a in average]), rtol=1e-4, atol=1e-5)
