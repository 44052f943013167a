"""The optimizers as torch's: closures, groups, schedules, scalers, and resuming."""

import io
import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.estimate import Training
from fishopt.optim.record import Record
from fishopt.passes import Arguments
from tests.cases import Case
from tests.optim_setup import _problem, _train, _weights, both

# --- torch's contract ---


@both
def test_closure_maximize_and_none_gradients(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), maximize=True)
    loss_fn = nn.CrossEntropyLoss()

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        model[0].bias.grad = None
        return loss

    bias = model[0].bias.detach().clone()
    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert losses[-1] > losses[0]
    assert torch.equal(model[0].bias, bias)


@both
def test_a_closure_is_called_where_a_warm_up_begins_at_zero(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = _weights(model)
    assert float(optimizer.step(closure).detach()) > 0
    assert torch.equal(_weights(model), before)
    assert all(state["step"] == 1 for state in optimizer.state.values())


@both
def test_param_groups_have_their_own_options(kind):
    model, x, y = _problem()
    optimizer = kind(
        model,
        nn.CrossEntropyLoss(),
        params=[
            {"params": model[0].parameters(), "lr": 0.0, "weight_decay": 0.0, "estimator": "I1", "name": "frozen"},
            {"params": [("head", model[2].weight)], "estimator": "exact"},
        ],
    )
    first, bias = model[0].weight.detach().clone(), model[2].bias.detach().clone()
    _train(model, optimizer, x, y)
    assert torch.equal(model[0].weight, first)
    optimizer.add_param_group({"params": model[2].bias, "lr": 1e-2, "estimator": "hutchinson"})
    _train(model, optimizer, x, y)
    assert not torch.equal(model[2].bias, bias)
    rows = optimizer.report().as_dict()["rows"]
    assert [(r["group"], r["estimator"]) for r in rows] == [
        ("frozen", "I1"),
        ("group 1", "exact"),
        ("group 2", "hutchinson"),
    ]


@both
def test_a_frozen_layer_stays_and_can_be_thawed(kind):
    model, x, y = _problem()
    model[0].requires_grad_(False)
    optimizer = kind(model, nn.CrossEntropyLoss())
    before = model[0].weight.detach().clone()
    _train(model, optimizer, x, y)
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    _train(model, optimizer, x, y)
    assert not torch.equal(model[0].weight, before)


@both
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=30),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    ],
)
def test_schedulers_change_the_learning_rate(kind, schedule):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    scheduler = schedule(optimizer)
    rates = []
    for step in range(5):
        _train(model, optimizer, x, y, steps=1, start=step)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1


@both
def test_tensor_learning_rate(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), lr=torch.tensor(0.0), weight_decay=0.0)
    before = _weights(model)
    _train(model, optimizer, x, y, steps=3)
    assert torch.equal(before, _weights(model))


@both
def test_float64_and_scalar_and_shared_parameters(kind):
    for network in ("residual", "tied", "two_inputs", "batch_norm", "layer_norm", "conv_sigmoid"):
        model, inputs, _ = Case(network, "categorical", inputs=16).build()
        y = torch.arange(16) % 3
        optimizer = kind(model, nn.CrossEntropyLoss(), lr=1e-2)
        losses = []
        for _ in range(80):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(*inputs), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-20:]) < sum(losses[:20]), network


@both
@pytest.mark.parametrize("family", ["mse", "ce"])
def test_a_grad_scaler_changes_nothing_but_rounding(kind, family):
    """The recorded gradient at the output is scaled as well: the residuals' variance must not be."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model, x, y = _problem(act=nn.Tanh)
        model, x = model.double(), x.double()
        y = nn.functional.one_hot(y, 3).double() if family == "mse" else y
        loss_fn = _loss_of(family)
        optimizer = kind(model, loss_fn)
        for _ in range(15):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        ends.append(_weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


@both
def test_a_grad_scaler_skips_overflows_and_hides_its_scale(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    model[0].weight.grad[0, 0] = math.inf
    before = _weights(model)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, _weights(model))
    optimizer = kind(model, nn.MSELoss())
    scaler.scale(nn.functional.mse_loss(model(x), x[:, :3])).backward()
    model[0].weight.grad[0, 0] = 0.0
    scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"unscale_.*Gaussian"):
        scaler.step(optimizer)


@both
def test_groups_of_weights_and_biases_train_as_one_group_does(kind):
    """Damping is relative to a layer, whatever the groups; only the choice of an estimator goes by group."""
    ends = []
    for split in (False, True):
        model, x, y = _problem(act=nn.Sigmoid)
        weights, biases = ([p for p in model.parameters() if p.ndim == d] for d in (2, 1))
        params = [{"params": weights}, {"params": biases, "weight_decay": 0.01}] if split else None
        optimizer = kind(model, nn.CrossEntropyLoss(), params=params, estimator="exact", weight_decay=0.01)
        _train(model, optimizer, x, y)
        ends.append(_weights(model))
    torch.testing.assert_close(*ends)


@both
def test_groups_of_the_same_name_are_all_trained(kind):
    model, x, y = _problem()
    params = [{"params": layer.parameters(), "name": "a"} for layer in (model[0], model[2])]
    optimizer = kind(model, nn.CrossEntropyLoss(), params=params)
    before = [p.detach().clone() for p in model.parameters()]
    _train(model, optimizer, x, y, steps=3)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert [row.group for row in optimizer.report().rows] == ["a", "a (1)"]


@both
def test_frozen_parameters_with_gradients_do_not_force_refreshes(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), refresh_every=10)
    _train(model, optimizer, x, y, steps=1)
    model[0].requires_grad_(False)
    for _ in range(39):
        nn.functional.cross_entropy(model(x), y).backward()
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
    assert optimizer.report().rows[-1].refreshes == 20
    model.requires_grad_(False)
    optimizer.step()


@both
def test_residuals_are_those_of_the_last_backward(kind):
    """Squared loss: a forward without a backward, or inputs by keyword, do not hide the variance."""
    model, x, _ = _problem()
    y = x[:, :3]
    optimizer = kind(model, nn.MSELoss())
    optimizer.zero_grad()
    nn.functional.mse_loss(model(input=x), y).backward()
    model(x[:5])
    optimizer.step()
    expected = float((model(x) - y).detach().square().mean()) * 2 / 3
    assert math.isclose(optimizer._moment.dispersion, expected, rel_tol=0.05)


@both
def test_settings_of_the_model_that_change_in_training_are_followed(kind):
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.temperature = 1.0

        def forward(self, x):
            return self.layer(x) / self.temperature

    torch.manual_seed(0)
    model, x = Tempered(), torch.randn(8, 6)
    optimizer = kind(model, nn.CrossEntropyLoss(), estimator="exact")
    optimizer.refresh(x)
    model.temperature = 0.5
    record = Record(Arguments((x,)))
    found = optimizer._curvature.refresh(*optimizer._units(), record, Training(None, lambda _: None), 0).diagonal
    expected = fishopt.fisher_diagonal(model, x, "categorical", estimator="exact")
    torch.testing.assert_close(found["layer.weight"], expected["layer.weight"])


@both
@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(reduction="sum"), nn.BCEWithLogitsLoss(), nn.PoissonNLLLoss()], ids=str
)
def test_empirical_from_the_recorded_gradient_is_on_the_scale_of_the_function(kind, loss_fn):
    """However the loss is reduced: the labels themselves are never seen."""
    model, x, labels = _problem(n=16)
    y = labels if isinstance(loss_fn, nn.CrossEntropyLoss) else nn.functional.one_hot(labels, 3).float()
    optimizer = kind(model, loss_fn, estimator="empirical")
    expected = fishopt.fisher_diagonal(model, x, loss_fn, estimator="empirical", targets=y)
    loss_fn(model(x), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        found = optimizer.state[p]["fisher"] / (1 - optimizer._decay(optimizer.param_groups[0]))
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-7)


# --- resuming ---


def _loss_of(family):
    return {"mse": nn.MSELoss(), "ce": nn.CrossEntropyLoss()}[family]


@both
@pytest.mark.parametrize("estimator", ["auto", "I1", "empirical"])
@pytest.mark.parametrize("family", ["mse", "ce"])
@pytest.mark.parametrize("at", [1, 7, 23, 37])
def test_a_resumed_run_is_the_same_bit_for_bit(kind, estimator, family, at):
    """In the middle of a refresh cycle and of the schedule of selections, through a file."""
    loss_fn = _loss_of(family)

    def fresh(seed):
        model, x, y = _problem(seed, act=nn.Tanh)
        x, y = _problem(0)[1:]
        y = nn.functional.one_hot(y, 3).float() if family == "mse" else y
        return model, kind(model, loss_fn, estimator=estimator, generator=torch.Generator().manual_seed(seed)), x, y

    model, optimizer, x, y = fresh(0)
    _train(model, optimizer, x, y, steps=at, loss_fn=loss_fn)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    _train(model, optimizer, x, y, steps=40, start=at, loss_fn=loss_fn)

    other, resumed, x, y = fresh(1)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    _train(other, resumed, x, y, steps=40, start=at, loss_fn=loss_fn)
    assert torch.equal(_weights(model), _weights(other))
    assert optimizer.report().rows == resumed.report().rows


@both
def test_runs_are_reproducible_and_leave_the_global_generator_alone(kind):
    ends = []
    for _ in range(2):
        model, x, y = _problem()
        before = torch.random.get_rng_state()
        _train(model, kind(model, nn.CrossEntropyLoss()), x, y, steps=30)
        assert torch.equal(before, torch.random.get_rng_state())
        ends.append(_weights(model))
    assert torch.equal(*ends)
