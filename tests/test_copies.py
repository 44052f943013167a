"""Copies and pickles of optimizers: they belong to the copied model, and go on as the original does, bit for bit."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import fishopt

both = pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
LOSSES = {"ce": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}


class Holder(nn.Module):
    """A model that holds its optimizer, as some training frameworks have it."""

    def __init__(self):
        super().__init__()
        self.optimizer = None
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.inner(x)


def _start(kind, loss="ce", model=None):
    torch.manual_seed(0)
    model = model or Holder().inner
    return model, kind(model, LOSSES[loss], generator=torch.Generator().manual_seed(7))


def _train(model, optimizer, steps, start=0, loss="ce"):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.ones(6, 3).tril()).argmax(1)
    y = nn.functional.one_hot(y, 3).float() if loss == "mse" else y
    for step in range(start, start + steps):
        rows = torch.arange(step * 16, (step + 1) * 16) % 64
        optimizer.zero_grad()
        LOSSES[loss](model(x[rows]), y[rows]).backward()
        optimizer.step()


def _through_a_file(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "optimizer first": lambda pair: copy.deepcopy(pair[::-1])[::-1],
    "save": _through_a_file,
    "copy of a copy": lambda pair: pickle.loads(pickle.dumps(copy.deepcopy(pair))),
}


@both
@pytest.mark.parametrize(
    ("how", "loss", "at"), [*[(how, "ce", 5) for how in COPIES], ("pickle", "mse", 0), ("deepcopy", "mse", 23)]
)
def test_a_copy_continues_bit_for_bit(kind, how, loss, at):
    model, optimizer = _start(kind, loss)
    _train(model, optimizer, at, loss=loss)
    other, copied = COPIES[how]((model, optimizer))
    untouched = [p.detach().clone() for p in model.parameters()]
    _train(other, copied, 40 - at, at, loss)
    assert all(map(torch.equal, untouched, model.parameters()))
    _train(model, optimizer, 40 - at, at, loss)
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    assert copied.report().rows == optimizer.report().rows
    assert [id(p) for p in copied.param_groups[0]["params"]] == [id(p) for p in other.parameters()]


@both
def test_an_optimizer_copied_alone_brings_its_model_along(kind):
    model, optimizer = _start(kind)
    _train(model, optimizer, 5)
    copied = copy.deepcopy(optimizer)
    assert not {id(p) for p in copied.param_groups[0]["params"]} & {id(p) for p in model.parameters()}
    _train(copied._model, copied, 20, 5)
    _train(model, optimizer, 20, 5)
    assert all(map(torch.equal, copied._model.parameters(), model.parameters()))


@both
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_model_that_holds_its_optimizer(kind, how):
    model, optimizer = _start(kind, model=Holder())
    model.optimizer = optimizer
    _train(model, optimizer, 5)
    other = COPIES[how](model)
    _train(other, other.optimizer, 20, 5)
    _train(model, optimizer, 20, 5)
    assert all(map(torch.equal, other.parameters(), model.parameters()))


@both
def test_the_last_batch_goes_along(kind):
    """Between a backward and its step; torch copies parameters without their gradients."""
    model, optimizer = _start(kind, "mse")
    _train(model, optimizer, 3, loss="mse")
    x = torch.randn(4, 6)
    LOSSES["mse"](model(x), x[:, :3]).backward()
    other, copied = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    for one in (optimizer, copied):
        one.step()
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    assert optimizer._moment == copied._moment


@both
def test_each_has_its_own_hook_and_generator(kind):
    model, optimizer = _start(kind)
    _train(model, optimizer, 2)
    other, copied = copy.deepcopy((model, optimizer))
    assert copied._curvature._shadow is None  # would be of the original's model
    assert list(other._forward_hooks.values()) == [copied._recorder] != [optimizer._recorder]
    before = optimizer._curvature._generator.get_state()
    _train(other, copied, 12, 2)
    assert torch.equal(before, optimizer._curvature._generator.get_state())
    assert copied._curvature._model is other
    del copied
    gc.collect()
    assert not other._forward_hooks
    assert model._forward_hooks
    _train(model, optimizer, 12, 2)


@both
def test_all_attributes_are_there(kind):
    """But for the user's hooks, and what torch's own optimizers lose as well."""
    model, optimizer = _start(kind)
    _train(model, optimizer, 2)
    optimizer.register_step_post_hook(lambda *args: None)
    copied = copy.deepcopy(optimizer)
    assert vars(optimizer).keys() - vars(copied).keys() <= {"_warned_capturable_if_run_uncaptured"}
    assert not copied._optimizer_step_post_hooks
    assert str(copied) == str(optimizer)


@both
def test_a_scheduler_copied_along_drives_the_copy(kind):
    model, optimizer = _start(kind)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    _train(model, optimizer, 2)
    scheduler.step()
    other, copied, followed = copy.deepcopy((model, optimizer, scheduler))
    lr = optimizer.param_groups[0]["lr"]
    _train(other, copied, 1)
    followed.step()
    assert (optimizer.param_groups[0]["lr"], copied.param_groups[0]["lr"]) == (lr, lr / 2)
