"""The optimizers and the user's model: it is left alone, and what changes in it is followed."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fishopt
from fishopt.optim.estimate import Training
from fishopt.optim.record import Record
from fishopt.passes import Arguments
from tests.optim_setup import _problem, _train, _weights, both


@both
def test_the_model_is_left_alone(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3))
    plain = copy.deepcopy(model)
    _, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    for m in (model, plain):
        torch.manual_seed(1)
        nn.functional.cross_entropy(m(x), y).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    rng = torch.random.get_rng_state()
    optimizer.refresh(x)
    assert torch.equal(rng, torch.random.get_rng_state())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert [len(m._forward_hooks) for m in model.modules()] == [1, 0, 0, 0, 0, 0]
    others = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(m, h) for m in model.modules() for h in others)
    assert not any(k.startswith(("input", "output", "_backpack")) for m in model.modules() for k in vars(m))
    assert not any(set(vars(p)) for p in model.parameters())
    assert model[2].inplace
    assert model.training


@both
def test_the_model_still_pickles_copies_and_saves(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    _train(model, optimizer, x, y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        (recorder,) = other._forward_hooks.values()
        assert not recorder._active
        assert recorder.last is None
    file = io.BytesIO()
    torch.save(model, file)
    assert model.state_dict().keys() == _problem()[0].state_dict().keys()


@both
def test_the_hook_goes_with_the_optimizer(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    _train(model, optimizer, x, y, steps=2)
    del optimizer
    assert not model._forward_hooks


@both
def test_evaluation_between_steps_is_not_recorded(kind):
    model, x, y = _problem()
    ends = []
    for evaluate in (False, True):
        model, x, y = _problem()
        optimizer = kind(model, nn.CrossEntropyLoss())
        for _step in range(15):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if evaluate:
                model(torch.full((3, 6), 1e6))  # with gradients on, too: no backward follows
                with torch.no_grad():
                    model(torch.full((3, 6), 1e6))
            optimizer.step()
        ends.append(_weights(model))
    assert torch.equal(*ends)


@both
def test_moving_the_model_and_replacing_its_data_is_followed(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), estimator="exact")
    _train(model, optimizer, x, y, steps=5)
    for p in model.parameters():
        p.data = p.data * 0.5
    optimizer.refresh(x)
    expected = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    optimizer._curvature._refresh_inputs = 10**6
    record = Record(Arguments((x,)))
    found = optimizer._curvature.refresh(*optimizer._units(), record, Training(None, lambda _: None), 0)
    for name, value in found.diagonal.items():
        torch.testing.assert_close(value, expected[name])


@both
def test_curvature_follows_running_statistics(kind):
    """BatchNorm changes them without a trace in their version counters."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(8, 6) + 3
    optimizer = kind(model, nn.CrossEntropyLoss(), estimator="exact", refresh_inputs=8)
    for _ in range(4):
        _train(model, optimizer, x, torch.arange(8) % 3, steps=1, batch=8)
        expected = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
        record = Record(Arguments((x,)))
        found = optimizer._curvature.refresh(*optimizer._units(), record, Training(None, lambda _: None), 0)
        for name, value in found.diagonal.items():
            torch.testing.assert_close(value, expected[name])


@both
def test_curvature_follows_data_changed_behind_autograds_back(kind):
    """Of a parameter in half precision it keeps a copy."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3)).bfloat16(), torch.randn(8, 6).bfloat16()
    optimizer = kind(model, nn.CrossEntropyLoss(), estimator="exact", refresh_inputs=8)
    optimizer.refresh(x)
    model[0].weight.data.mul_(4.0)
    record = Record(Arguments((x,)))
    found = optimizer._curvature.refresh(*optimizer._units(), record, Training(None, lambda _: None), 0)
    expected = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    torch.testing.assert_close(found.diagonal["0.weight"], expected["0.weight"])


def _put_in(model):
    model.insert(0, nn.Dropout(0.0))


def _wrapped(model):
    model[2] = nn.Sequential(nn.Identity(), model[2])


def _pruned(model):
    prune.identity(model[0], "weight")


def _parametrized(model):
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())


@pytest.mark.parametrize("change", [_put_in, _wrapped, _pruned, _parametrized])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(fishopt.FisherAdam, {}), (fishopt.DiagonalNGD, {}), (fishopt.DiagonalNGD, {"lr": "auto"})],
)
def test_parameters_that_get_another_name(kind, options, change):
    ends = []
    for changes in (False, True):
        model, x, y = _problem()
        loss_fn = nn.CrossEntropyLoss()
        optimizer = kind(model, loss_fn, estimator="exact", **options)
        _train(model, optimizer, x, y, steps=8, loss_fn=loss_fn)
        if changes:
            change(model)
            assert {name for names in optimizer.state_dict()["fishopt"]["names"] for name in names} == {
                name for name, _ in model.named_parameters()
            }
        _train(model, optimizer, x, y, steps=60, start=8, loss_fn=loss_fn)
        assert optimizer.report().failures == 0
        ends.append(dict(zip(("w", "b", "v", "c"), sorted(model.parameters(), key=lambda p: p.shape), strict=True)))
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], rtol=0, atol=0.02)


@both
def test_layers_that_change_places(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(32, 3)
    y = torch.arange(32) % 3
    optimizer = kind(model, nn.CrossEntropyLoss(), estimator="exact")
    _train(model, optimizer, x, y, steps=4)
    model[0], model[1] = model[1], model[0]
    _train(model, optimizer, x, y, steps=200, start=4)
    expected = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    for name, p in model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["fisher"].mean(), expected[name].mean(), rtol=0.7, atol=0)


@both
def test_a_layer_that_is_replaced(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    _train(model, optimizer, x, y, steps=8)
    model[2] = nn.Linear(8, 3)
    optimizer.add_param_group({"params": model[2].parameters()})
    first = _train(model, optimizer, x, y, steps=1, start=8)
    assert _train(model, optimizer, x, y, steps=200, start=9) < first
    assert optimizer.report().failures == 0
    optimizer.load_state_dict(optimizer.state_dict())


class Noisy(nn.Module):
    """Draws random numbers in its forward, in eval mode too, as variational autoencoders do."""

    def __init__(self, source):
        super().__init__()
        self.layer, self.source = nn.Linear(6, 3), source

    def forward(self, x):
        noise = torch.randn_like(x) if self.source == "torch" else random.gauss()
        return self.layer(x + 0.1 * noise)


@both
@pytest.mark.parametrize("source", ["torch", "python"])
def test_a_refresh_leaves_the_users_random_numbers_alone(kind, source):
    _, x, y = _problem()
    torch.manual_seed(0)
    model = Noisy(source)
    optimizer = kind(model, nn.CrossEntropyLoss())
    nn.functional.cross_entropy(model(x), y).backward()
    before = torch.random.get_rng_state(), random.getstate()
    optimizer.step()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()


class Keeping(nn.Module):
    """Keeps activations, for a further loss or to be looked at."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(6, 8), nn.Linear(8, 3), how

    def forward(self, x):
        h = torch.tanh(self.first(x))
        self.kept = self._last = {"list": [h], "dict": {"h": h}, "tuple": (h, (h,)), "tensor": h}[self.how]
        return self.last(h)


@both
@pytest.mark.parametrize("how", ["list", "dict", "tuple", "tensor"])
def test_models_that_keep_activations(kind, how):
    _, x, y = _problem()
    ends = []
    for model in (Keeping(how), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))):
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        _train(model, kind(model, nn.CrossEntropyLoss()), x, y, steps=8)
        ends.append(_weights(model))
    assert torch.equal(*ends)


@both
def test_attention_masks_among_the_arguments(kind):
    """They hold minus infinity, with a row for each input or without."""
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)

        def forward(self, tokens, mask):
            return self.head(self.layer(self.embed(tokens), mask))

    model, tokens, loss_fn = Network(), torch.randint(0, 5, (6, 4)), nn.CrossEntropyLoss()
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    optimizer = kind(model, loss_fn)
    for shown in (mask, mask.expand(12, 4, 4)):
        loss_fn(model(tokens, shown).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert optimizer.report().failures == 0
    assert all(state["step"] == 2 for state in optimizer.state.values())
