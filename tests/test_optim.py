"""The optimizers: torch's contract, known limits, resuming, and a model that is left alone."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import fishopt
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Training
from fishopt.optim.recorder import Record
from fishopt.passes import Arguments
from tests.cases import Case

OPTIMIZERS = [fishopt.FisherAdam, fishopt.DiagonalNGD]
both = pytest.mark.parametrize("kind", OPTIMIZERS)


def _problem(seed=0, act=nn.ReLU, n=64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3))
    x = torch.randn(n, 6)
    return model, x, (x @ torch.randn(6, 3)).argmax(1)


def _train(model, optimizer, x, y, steps=20, loss_fn=None, batch=16, start=0):
    loss_fn = loss_fn or nn.CrossEntropyLoss()
    for step in range(start, start + steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(x)
        optimizer.zero_grad()
        loss = loss_fn(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    return loss


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


@both
@pytest.mark.parametrize("estimator", ["auto", "I1", "I2", "exact", "hutchinson", "empirical"])
def test_training_lowers_the_loss(kind, estimator):
    model, x, y = _problem()
    start = float(nn.functional.cross_entropy(model(x), y).detach())
    fast = {"lr": 1e-2} if kind is fishopt.FisherAdam else {"lr": 3e-2, "kl_radius": 1e-4}
    _train(model, kind(model, nn.CrossEntropyLoss(), estimator=estimator, **fast), x, y, steps=150)
    assert float(nn.functional.cross_entropy(model(x), y).detach()) < 0.5 * start


LOSSES = {
    "mse": (nn.MSELoss(), lambda z: z),
    "mse_sum": (nn.MSELoss(reduction="sum"), lambda z: z),
    "bce": (nn.BCEWithLogitsLoss(), lambda z: (z > 0).float()),
    "bce_sum": (nn.BCEWithLogitsLoss(reduction="sum"), lambda z: (z > 0).float()),
    "poisson": (nn.PoissonNLLLoss(), lambda z: z.exp().round()),
}


@both
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(kind, name):
    loss_fn, targets_of = LOSSES[name]
    model, x, _ = _problem()
    y = targets_of(0.5 * x @ torch.randn(6, 3))
    start = float(loss_fn(model(x), y).detach())
    _train(model, kind(model, loss_fn), x, y, steps=300, loss_fn=loss_fn)
    end = float(loss_fn(model(x), y).detach())
    assert end < start - 0.1 * abs(start)


@both
def test_the_scale_of_the_loss_does_not_matter(kind):
    """Sum or mean over inputs: the same steps, up to rounding."""
    ends = []
    for loss_fn in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        model, x, y = _problem(act=nn.Tanh)
        optimizer = kind(model, loss_fn, estimator="exact")
        _train(model, optimizer, x, y, loss_fn=loss_fn)
        ends.append(_weights(model))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def _minibatch_squared(self, units, wanted, record, training, step):
    """B times the square of the mini-batch gradient: with it, F/B is what Adam averages."""
    from fishopt.optim.estimate import Estimate, Moment

    names = dict(self._model.named_parameters())
    return Estimate({n: 16.0 * p.grad.square() for n, p in names.items()}, Moment(16, 1.0, 1.0))


@pytest.mark.parametrize("maximize", [False, True])
def test_fisher_adam_with_squared_gradients_is_adam(monkeypatch, maximize):
    monkeypatch.setattr(Curvature, "refresh", _minibatch_squared)
    ends = []
    for build in (
        lambda m: fishopt.FisherAdam(
            m,
            "categorical",
            lr=1e-2,
            betas=(0.9, 0.99),
            damping=0.0,
            clip=math.inf,
            weight_decay=0.1,
            refresh_every=1,
            maximize=maximize,
        ),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, maximize=maximize),
    ):
        model, x, y = _problem()
        model, x = model.double(), x.double()
        _train(model, build(model), x, y, steps=50)
        ends.append(_weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_ngd_with_infinite_damping_is_gradient_descent():
    model, x, y = _problem()
    before = _weights(model)
    optimizer = fishopt.DiagonalNGD(model, nn.CrossEntropyLoss(), damping=1e12, momentum=0.0, kl_radius=1e30, lr=1e10)
    _train(model, optimizer, x, y, steps=1)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert nn.functional.cosine_similarity(_weights(model) - before, -gradient, dim=0) > 1 - 1e-6


def test_ngd_keeps_the_predicted_divergence():
    """With a huge learning rate the step lies on the trust region's edge: d^T (F + damping) d / 2 = radius."""
    model, x, y = _problem()
    optimizer = fishopt.DiagonalNGD(model, nn.CrossEntropyLoss(), lr=1e6, kl_radius=1e-4, damping=0.5)
    before = _weights(model)
    _train(model, optimizer, x, y, steps=1)
    step = _weights(model) - before
    damped = torch.cat([optimizer.state[p]["preconditioner"].flatten() ** -2 for p in model.parameters()])
    torch.testing.assert_close((step.square() * damped).sum() / 2, torch.tensor(1e-4), rtol=1e-3, atol=0)


def test_fisher_adam_clips_each_tensor():
    model, x, y = _problem()
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), damping=0.0, clip=0.01, lr=1.0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    _train(model, optimizer, x, y, steps=1)
    for p, old in zip(model.parameters(), before, strict=True):
        assert (p - old).square().mean().sqrt() <= 0.01 * (1 + 1e-4)


def test_squared_loss_estimates_the_variance():
    """F is scaled by the residuals' variance, so the size of the step does not depend on the targets' unit."""
    steps = []
    for unit in (1.0, 1000.0):
        model, x, _ = _problem(act=nn.Tanh)
        model, x = model.double(), x.double()
        with torch.no_grad():
            model[2].weight.mul_(unit)
            model[2].bias.mul_(unit)
        y = unit * (x @ torch.ones(6, 3, dtype=x.dtype))
        optimizer = fishopt.FisherAdam(model, nn.MSELoss(), weight_decay=0.0, estimator="exact", eps=0.0)
        before = model[2].weight.detach().clone()
        residuals = float((model(x[:16]) - y[:16]).detach().square().mean())
        _train(model, optimizer, x, y, steps=1, loss_fn=nn.MSELoss())
        steps.append(model[2].weight.detach() - before)
        noise = optimizer._moment.dispersion * 3 / 2
        assert math.isclose(noise, residuals, rel_tol=1e-9)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=1e-15)


@both
def test_gaussian_of_unknown_variance_as_likelihood(kind):
    model, x, _ = _problem()
    y = x @ torch.ones(6, 3)
    optimizer = kind(model, fishopt.Gaussian(variance="estimated"))
    start = float(nn.functional.mse_loss(model(x), y).detach())
    _train(model, optimizer, x, y, steps=100, loss_fn=nn.MSELoss())
    assert float(nn.functional.mse_loss(model(x), y).detach()) < start


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
    assert optimizer.report().rows[-1].refreshes == 13
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


# --- the user's model ---


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


# --- failed refreshes ---


@both
def test_a_failed_refresh_is_survived_counted_and_warned_of_once(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), refresh_every=1)
    _train(model, optimizer, x, y, steps=12)
    before = {p: optimizer.state[p]["preconditioner"].clone() for p in model.parameters()}
    bad = torch.full((4, 6), float("nan"))
    for attempt in range(3):
        optimizer.zero_grad()
        model(bad).sum().backward()
        for p in model.parameters():
            p.grad.zero_()
        if attempt:
            optimizer.step()
        else:
            with pytest.warns(RuntimeWarning, match="NaN or infinite"):
                optimizer.step()
    assert optimizer.report().failures == 3
    assert all(torch.equal(optimizer.state[p]["preconditioner"], before[p]) for p in model.parameters())
    assert torch.isfinite(_weights(model)).all()
    _train(model, optimizer, x, y, steps=3)
    assert optimizer.report().failures == 3


@both
def test_refresh_after_refresh_failing_stops_training(kind):
    model, _x, _ = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())

    def attempt():
        model(torch.full((4, 6), float("inf"))).sum().backward()
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()

    with pytest.warns(RuntimeWarning):
        attempt()
    for _ in range(8):
        attempt()
    with pytest.raises(RuntimeError, match="10 curvature refreshes in a row"):
        attempt()


def test_a_negative_estimate_is_clamped(monkeypatch):
    model, x, y = _problem(act=nn.Sigmoid)
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), estimator="I2", refresh_inputs=2)
    _train(model, optimizer, x, y, steps=30)
    assert any((optimizer.state[p]["fisher"] < 0).any() for p in model.parameters())
    for p in model.parameters():
        assert torch.isfinite(optimizer.state[p]["preconditioner"]).all()
        assert (optimizer.state[p]["preconditioner"] > 0).all()
    assert torch.isfinite(_weights(model)).all()


# --- the schedule ---


@both
def test_refreshes_and_selections_keep_their_schedule(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss(), refresh_every=10)
    _train(model, optimizer, x, y, steps=101)
    report = optimizer.report()
    assert report.rows[0].refreshes == 10 + 10  # steps 0..9, then 10, 20, ... 100
    steps = [entry["step"] for entry in report.history]
    assert steps[0] == 0
    assert all(b >= 2 * a for a, b in itertools.pairwise(steps))
    assert 2 <= len(steps) <= 4


@both
def test_refresh_by_hand_replaces_the_next_one(kind):
    model, x, y = _problem()
    optimizer = kind(model, nn.CrossEntropyLoss())
    optimizer.refresh(x)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.report().rows[0].refreshes == 1


@both
def test_criterion_bound_gives_the_papers_choice(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 64), nn.Sigmoid(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    optimizer = kind(model, nn.CrossEntropyLoss(), criterion="bound", refresh_inputs=4)
    optimizer.refresh(torch.rand(4, 784))
    assert [row.estimator for row in optimizer.report().rows] == ["I1", "I1", "I2"]


@both
def test_a_thousand_outputs_stay_cheap(kind):
    """The default rule never takes a column per output in a hidden layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1000))
    optimizer = kind(model, nn.CrossEntropyLoss())
    optimizer.refresh(torch.randn(16, 8))
    assert [row.estimator for row in optimizer.report().rows] == ["hutchinson", "I2"]
