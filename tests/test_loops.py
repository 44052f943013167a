"""Training loops as people write them: each one trains, and equals the plain loop where it should compute the same."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fishopt
from tests.loops_setup import BATCH, FAST, LOSSES, N, Run, assert_same, both

pytestmark = pytest.mark.usefixtures("one_thread")


@both
@pytest.mark.parametrize("family", LOSSES)
def test_the_plain_loop_that_others_are_held_against(kind, family):
    assert Run(kind, family).steps().trains()


# --- gradients ---


@both
def test_zeroed_gradients_are_as_good_as_none(kind):
    run = Run(kind)
    for step in range(40):
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(step)
        run.optimizer.step()
    assert_same(run, Run(kind).steps())


@both
def test_a_closure_is_called_once_with_gradients_on(kind):
    run, calls = Run(kind), []

    def closure():
        calls.append(torch.is_grad_enabled())
        run.optimizer.zero_grad()
        return run.backward(len(calls) - 1)

    losses = [float(run.optimizer.step(closure).detach()) for _ in range(40)]
    assert calls == [True] * 40
    assert losses[-1] < losses[0]
    assert_same(run, Run(kind).steps())


@both
def test_clipping(kind):
    """By a limit that is never met nothing changes; by one that is, it still trains."""
    ends = {}
    for limit in (1e6, 0.1):
        run = ends[limit] = Run(kind)
        for step in range(40):
            run.optimizer.zero_grad()
            run.backward(step)
            nn.utils.clip_grad_norm_(run.model.parameters(), limit)
            nn.utils.clip_grad_value_(run.model.parameters(), limit)
            run.optimizer.step()
        assert run.loss() < run.first
    assert_same(ends[1e6], Run(kind).steps())
    assert not torch.equal(ends[0.1].weights(), ends[1e6].weights())


class Heads(nn.Module):
    """Two tasks, one of them at a time: the other head gets no gradient."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.task = 0

    def forward(self, x):
        return self.heads[self.task](torch.tanh(self.body(x)))


@both
def test_parameters_without_a_gradient_stay_where_they_are(kind):
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(N, 6)
    targets = [(x @ torch.randn(6, 3)).argmax(1) for _ in range(2)]
    optimizer = kind(model, nn.CrossEntropyLoss(), **FAST[kind])
    losses = []
    for step in range(80):
        model.task = step % 2
        other = model.heads[1 - model.task].weight
        before = other.detach().clone()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), targets[model.task])
        loss.backward()
        optimizer.step()
        assert torch.equal(other, before)
        losses.append(float(loss.detach()))
    assert all(losses[task - 2] < 0.7 * losses[task] for task in (0, 1))


@both
@pytest.mark.parametrize("family", LOSSES)
def test_accumulated_gradients_train(kind, family):
    run = Run(kind, family)
    for step in range(40):
        run.optimizer.zero_grad()
        x, y = run.batch(step)
        for part in torch.arange(BATCH).split(4):
            (run.loss_fn(run.model(x[part]), y[part]) / 4).backward()
        run.optimizer.step()
    assert run.trains(0.8)


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (6, 6, 4)], ids=str)
def test_accumulated_gradients_equal_the_whole_batch(kind, family, sizes):
    """The batch of a step is all that went backward since the last one; each part's loss has its share of the mean."""
    ends = []
    for parts in ((BATCH,), sizes):
        run = Run(kind, family, dtype=torch.float64, estimator="exact")
        for step in range(12):
            run.optimizer.zero_grad()
            x, y = run.batch(step)
            for part in torch.arange(BATCH).split(parts):
                (run.loss_fn(run.model(x[part]), y[part]) * len(part) / BATCH).backward()
            run.optimizer.step()
        ends.append(run.weights())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


# --- schedulers ---

SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 3e-2, total_steps=41),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.7, patience=1),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.ExponentialLR(o, 0.97)], milestones=[5]
    ),
}


@both
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_equal_hyperparameters_set_by_hand(kind, name):
    run = Run(kind)
    scheduler = SCHEDULES[name](run.optimizer)
    used = []
    for step in range(40):
        group = run.optimizer.param_groups[0]
        used.append({key: group[key] for key in ("lr", "betas", "momentum") if key in group})
        loss = run.optimizer.zero_grad() or run.backward(step)
        run.optimizer.step()
        scheduler.step(*([float(loss.detach())] if name == "plateau" else []))
    assert run.trains(0.9)
    assert len({str(options) for options in used}) > 2
    if name == "one cycle":
        momenta = {str(options["betas"] if "betas" in options else options["momentum"]) for options in used}
        assert len(momenta) > 2
    other = Run(kind)
    for step, options in enumerate(used):
        other.optimizer.param_groups[0].update(options)
        other.optimizer._sorting = None  # nothing is kept from the step before
        other.steps(1, start=step)
    assert_same(run, other)


# --- several optimizers, frozen layers ---


def test_two_optimizers_are_one_with_two_groups():
    """On layers of their own, as FisherAdam's steps are by layer."""
    ends = []
    for split in (False, True):
        run = Run(fishopt.FisherAdam, dtype=torch.float64, estimator="exact")
        if split:
            optimizers = [
                fishopt.FisherAdam(run.model, run.loss_fn, params=layer.parameters(), lr=1e-2, estimator="exact")
                for layer in (run.model[0], run.model[2])
            ]
        else:
            optimizers = [run.optimizer]
        for step in range(15):
            for optimizer in optimizers:
                optimizer.zero_grad()
            run.backward(step)
            for optimizer in optimizers:  # else the second one's is at the parameters that the first has moved
                optimizer.refresh(run.batch(step)[0])
            for optimizer in optimizers:
                optimizer.step()
        assert run.loss() < run.first
        ends.append(run.weights())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@both
def test_beside_another_optimizer(kind):
    """Each moves its own parameters; one that stands still changes nothing for the other."""
    ends = []
    for others in ([], [torch.optim.SGD], [torch.optim.SGD]):
        run = Run(kind)
        del run.optimizer
        run.optimizer = kind(run.model, run.loss_fn, params=run.model[0].parameters(), **FAST[kind])
        body, head = run.model[0].weight.detach().clone(), run.model[2].weight.detach().clone()
        rate = 0.1 if len(ends) == 2 else 0.0
        beside = [other(run.model[2].parameters(), lr=rate) for other in others]
        for step in range(40):
            run.model.zero_grad()
            run.backward(step)
            for optimizer in (run.optimizer, *beside):
                optimizer.step()
        assert not torch.equal(run.model[0].weight, body)
        assert torch.equal(run.model[2].weight, head) == (rate == 0.0)
        assert run.loss() < run.first
        ends.append(run.weights())
    assert torch.equal(ends[0], ends[1])


@both
@pytest.mark.parametrize("set_to_none", [True, False])
def test_freezing_and_thawing_in_the_middle(kind, set_to_none):
    run = Run(kind)
    run.steps(12)
    run.model[0].requires_grad_(False)
    run.optimizer.zero_grad(set_to_none=True)
    frozen, middle = run.model[0].weight.detach().clone(), run.loss()
    for step in range(12, 40):
        run.optimizer.zero_grad(set_to_none=set_to_none)
        run.backward(step)
        run.optimizer.step()
    assert torch.equal(run.model[0].weight, frozen)
    assert run.loss() < middle
    run.model[0].requires_grad_(True)
    run.steps(20, start=40)
    assert not torch.equal(run.model[0].weight, frozen)
    assert run.trains()


@both
def test_a_layer_frozen_from_the_start_is_estimated_once_it_is_thawed(kind):
    torch.manual_seed(0)
    run = Run(kind, refresh_every=1000)
    run.model[0].requires_grad_(False)
    run.optimizer = kind(run.model, run.loss_fn, params=run.model.parameters(), **FAST[kind], refresh_every=1000)
    before = run.model[0].weight.detach().clone()
    run.steps(15)
    assert torch.equal(run.model[0].weight, before)
    run.model[0].requires_grad_(True)
    run.steps(30, start=15)
    assert not torch.equal(run.model[0].weight, before)
    assert run.trains()
    assert [row.refreshes for row in run.optimizer.report().rows] == [9, 22]
