"""Backwards out of the ordinary, against the plain loop: gradients by hand or moved, checkpoints, compiled ones."""

import pytest
import torch
from loops_setup import LOSSES, Run, assert_same, both
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint


@both
@pytest.mark.parametrize("family", LOSSES)
def test_gradients_that_the_user_puts_there(kind, family):
    run, plain = Run(kind, family), Run(kind, family).steps(12)
    parameters = list(run.model.parameters())
    for step in range(12):
        x, y = run.batch(step)
        grads = torch.autograd.grad(run.loss_fn(run.model(x), y), parameters)
        for p, new in zip(parameters, grads, strict=True):
            p.grad = new
        run.optimizer.step()
    assert_same(run, plain)


@both
@pytest.mark.parametrize("family", LOSSES)
def test_a_step_from_within_the_backward(kind, family):
    """As where each parameter has an optimizer of its own, to spare the memory for gradients."""
    run = Run(kind, family)
    last = next(run.model.parameters())  # the first layer's weight is reached last

    def step(_):
        run.optimizer.step()
        run.optimizer.zero_grad()

    handle = last.register_post_accumulate_grad_hook(step)
    run.model[0].bias.requires_grad_(False)
    plain = Run(kind, family)
    plain.model[0].bias.requires_grad_(False)
    plain.steps(12)
    for i in range(12):
        run.backward(i)
    handle.remove()
    assert_same(run, plain)


def in_parts(run, step, each):
    x, y = run.batch(step)
    for rows in torch.arange(len(x)).chunk(4):
        each(run.loss_fn(run.model(x[rows]), y[rows]) / 4)


def by_hand(run, step):
    parameters = list(run.model.parameters())

    def each(loss):
        for p, new in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = new if p.grad is None else p.grad + new

    in_parts(run, step, each)


def elsewhere(run, step):
    """Gradients that are added up in other tensors, as where these are in higher precision, or on another device."""
    main = {}

    def move(p):
        main[p] = p.grad if p not in main else main[p] + p.grad
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(move) for p in run.model.parameters()]
    in_parts(run, step, torch.Tensor.backward)
    for handle in handles:
        handle.remove()
    for p, total in main.items():
        p.grad = total


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("backward", [by_hand, elsewhere])
def test_micro_batches_whose_gradients_the_user_adds_up(kind, family, backward):
    run, plain = Run(kind, family), Run(kind, family)
    for step in range(12):
        run.optimizer.zero_grad()
        backward(run, step)
        run.optimizer.step()
        plain.optimizer.zero_grad()
        in_parts(plain, step, torch.Tensor.backward)
        plain.optimizer.step()
    assert run.optimizer._moment.batch_size == 16
    assert_same(run, plain)


@both
@pytest.mark.parametrize("trunk_alone", [False, True])
def test_reentrant_checkpoints(kind, trunk_alone):
    run, plain = Run(kind, "mse"), Run(kind, "mse")
    for step in range(12):
        for one in (run, plain):
            x, y = one.batch(step)
            x = x.clone().requires_grad_()
            one.optimizer.zero_grad()
            for rows in (slice(8), slice(8, None)):
                if one is plain:
                    out = one.model(x[rows])
                elif trunk_alone:
                    out = one.model[2](checkpoint(one.model[:2], x[rows], use_reentrant=True))
                else:
                    out = checkpoint(one.model, x[rows], use_reentrant=True)
                one.loss_fn(out, y[rows]).backward()
            if not trunk_alone:  # which calls parts of the model, and so is not seen
                one.optimizer.step()
    if not trunk_alone:
        assert run.optimizer._moment.scale == plain.optimizer._moment.scale == 2
        assert_same(run, plain)


@both
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_backwards(kind):
    run, plain = Run(kind), Run(kind).steps(12)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        run.steps(12)
    assert_same(run, plain)
