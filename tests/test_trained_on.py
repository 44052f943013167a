"""Which backward passes count as training, and which loss a forward's factor is that of."""

import gc

import pytest
import torch
from loops_setup import FAST, LOSSES, Run, assert_same, both
from torch import nn
from torch.func import functional_call, grad, vmap

import fishopt


def tuple_approx(values):
    return pytest.approx(tuple(values), rel=1e-4)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.main, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.main(h), self.other(h)


class Halves(TwoHeads):
    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return (self.main(h).repeat(1, 2) + self.other(h).repeat(1, 2)).chunk(2, -1)


def two_heads(kind, family, loss, model=TwoHeads):
    run = Run(kind, family)
    model = model()
    optimizer = kind(model, run.loss_fn, params=[{"params": [*model.trunk.parameters(), *model.main.parameters()]}],
                     output=0, **FAST[kind])  # fmt: skip
    for step in range(12):
        x, y = run.batch(step)
        optimizer.zero_grad()
        loss(run.loss_fn, *model(x), y).backward()
        optimizer.step()
    return optimizer._moment


@both
@pytest.mark.parametrize("model", [TwoHeads, Halves, lambda: torch.compile(TwoHeads(), backend="aot_eager")])
def test_another_loss_of_the_same_module_is_not_the_forwards(kind, model):
    first = two_heads(kind, "mse", lambda f, out, other, y: 0.1 * f(other, y) + f(out, y), model)
    second = two_heads(kind, "mse", lambda f, out, other, y: f(out, y) + 0.1 * f(other, y), model)
    alone = two_heads(kind, "mse", lambda f, out, other, y: f(out, y) + 0 * f(other.detach(), y), model)
    assert first == tuple_approx(second)
    assert first.dispersion == pytest.approx(alone.dispersion, rel=0.2)


@both
def test_one_loss_module_on_two_models(kind):
    def dispersions(order):
        runs = [Run(kind, "mse"), Run(kind, "mse")]
        other = kind(runs[1].model, runs[0].loss_fn, **FAST[kind])
        x, y = runs[0].batch(0)
        losses = [runs[0].loss_fn(run.model(x), y) * weight for run, weight in zip(runs, (1.0, 0.1), strict=True)]
        sum(losses[i] for i in order).backward()
        runs[0].optimizer.step()
        other.step()
        return runs[0].optimizer._moment.dispersion, other._moment.dispersion

    assert dispersions((0, 1)) == pytest.approx(dispersions((1, 0)))
    assert dispersions((0, 1))[0] == pytest.approx(dispersions((0, 1))[1])


def moment(kind, loss, family="mse", steps=3):
    run = Run(kind, family)
    for step in range(steps):
        run.optimizer.zero_grad()
        loss(run, *run.batch(step)).backward()
        run.optimizer.step()
    return run.optimizer._moment


@both
@pytest.mark.parametrize("family", LOSSES)
def test_forwards_first_and_losses_later(kind, family):
    def in_turn(run, x, y):
        return run.loss_fn(run.model(x), y) + run.loss_fn(run.model(-x), y)

    def later(run, x, y):
        outputs = run.model(x), run.model(-x)
        return sum(run.loss_fn(out, y) for out in outputs)

    assert moment(kind, later, family) == moment(kind, in_turn, family)


@both
@pytest.mark.parametrize("family", LOSSES)
def test_one_loss_of_two_forwards_is_the_mean_over_both(kind, family):
    def apart(run, x, y):
        return run.loss_fn(torch.cat([run.model(x[:4]), run.model(x[4:])]), y)

    def whole(run, x, y):
        return run.loss_fn(run.model(x), y)

    assert moment(kind, apart, family, steps=1) == tuple_approx(moment(kind, whole, family, steps=1))


@both
def test_two_losses_of_one_output_count_together(kind):
    def mixed(run, x, y):
        out = run.model(x)
        return 0.3 * run.loss_fn(out, y) + 0.7 * run.loss_fn(out, y)

    def plain(run, x, y):
        return run.loss_fn(run.model(x), y)

    assert moment(kind, mixed) == tuple_approx(moment(kind, plain))


def saliency(run, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(run.model(x).square().sum(), x)


def adversary(run, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(run.loss_fn(run.model(x), y), x)


def of_each_input(run, x, y):
    def loss(parameters, x, y):
        return run.loss_fn(functional_call(run.model, parameters, (x[None],)), y[None])

    vmap(grad(loss), in_dims=(None, 0, 0))(dict(run.model.named_parameters()), x, y)


@both
@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("look", [saliency, adversary, of_each_input])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_backward_that_leaves_no_gradient_is_no_training(kind, family, look, when):
    run, plain = Run(kind, family), Run(kind, family).steps(12)
    for step in range(12):
        if when == "before":
            look(run, *run.batch(step))
        run.optimizer.zero_grad()
        if when == "between":
            look(run, *run.batch(step + 1))
        run.backward(step)
        if when == "after":
            look(run, *run.batch(step + 1))
        run.optimizer.step()
    assert_same(run, plain)


@both
@pytest.mark.parametrize("family", ["mse"])
def test_a_penalty_on_the_outputs_gradient(kind, family):
    def penalized(run, x, y):
        x = x.clone().requires_grad_()
        out = run.model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return run.loss_fn(out, y) + 1e-12 * slope.square().mean()

    def plain(run, x, y):
        return run.loss_fn(run.model(x), y)

    assert moment(kind, penalized, family) == tuple_approx(moment(kind, plain, family))


@both
@pytest.mark.parametrize("family", LOSSES)
def test_the_models_own_zero_grad_starts_anew(kind, family):
    run, plain = Run(kind, family), Run(kind, family).steps(12)
    for step in range(12):
        run.optimizer.zero_grad()
        run.backward(step + 1)  # for another network, say
        run.model.zero_grad()
        run.backward(step)
        run.optimizer.step()
    assert_same(run, plain)


def test_an_optimizer_that_is_idle_keeps_one_batch():
    run = Run(fishopt.FisherAdam)
    other = torch.optim.SGD(run.model.parameters(), lr=1e-3)
    for step in range(20):
        other.zero_grad()
        run.backward(step)
        other.step()
    assert len(run.optimizer._recorder.records) == 1


@both
def test_clipping_after_another_look(kind):
    run, plain = Run(kind), Run(kind)
    for step in range(12):
        for one in (run, plain):
            one.optimizer.zero_grad()
            one.backward(step)
            if one is run:
                saliency(one, *one.batch(step + 1))
            nn.utils.clip_grad_norm_(one.model.parameters(), 0.1)
            one.optimizer.step()
    assert_same(run, plain)


@both
@pytest.mark.parametrize("again", ["model", "optimizer", None])
def test_two_backwards_through_one_output(kind, again):
    def twice(run, x, y):
        loss = run.loss_fn(run.model(x), y)
        loss.backward(retain_graph=True)
        if again is None:
            return loss - loss.detach()  # the same once more
        getattr(run, again).zero_grad()
        return loss

    def once(run, x, y):
        return run.loss_fn(run.model(x), y) * (2 if again is None else 1)

    assert moment(kind, twice) == tuple_approx(moment(kind, once))


@both
def test_labels_of_two_backwards_count_together(kind):
    run = Run(kind)
    x, y = run.batch(0)
    out = run.model(x)
    run.loss_fn(out[:12], y[:12]).backward(retain_graph=True)
    run.loss_fn(out[12:], y[12:]).backward()
    run.optimizer.step()
    assert run.optimizer._moment.batch_size == 16


@both
def test_predictions_that_are_all_certain(kind):
    run = Run(kind)
    with torch.no_grad():
        run.model[2].bias.copy_(torch.tensor([500.0, 0.0, -500.0]))
    for _ in range(12):
        run.optimizer.zero_grad()
        run.loss_fn(run.model(run.x), torch.zeros(len(run.x)).long()).backward()
        run.optimizer.step()
    assert run.optimizer._moment.batch_size == len(run.x)


@pytest.mark.parametrize("where", ["model", "loss"])
def test_an_optimizer_collected_within_a_call_is_gone(where):
    """Torch calls a hook without the keyword arguments that it asked for if these are not due to it any more."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    module = model if where == "model" else loss_fn
    left = []

    def collect(*_):
        left.clear()
        gc.collect()

    module.register_forward_hook(collect)
    left.append(fishopt.FisherAdam(model, loss_fn))
    assert torch.isfinite(loss_fn(model(torch.ones(5, 4)), torch.zeros(5).long()))
    assert not left
