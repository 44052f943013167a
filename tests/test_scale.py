"""Where the size of F is from, ``FisherAdam(scale=...)``: against sums by hand, and as what it promises."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

import fishopt
from fishopt.optim.averages import ENERGY_DECAY
from fishopt.optim.noise import NOISE_DECAY, SCALES
from tests.asserts import assert_close
from tests.ranks import gathered, worlds

WHOLE = {"estimator": "exact", "refresh_inputs": 100, "weight_decay": 0.0}
LAYERS = (("0.weight", "0.bias"), ("2.weight", "2.bias"))


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def _data(family="categorical", seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    scores = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    labels = {"bernoulli": (scores > 0).double(), "poisson": scores.exp().round(), "gaussian": scores}
    return x, labels.get(family, scores.argmax(1))


LOSSES = {
    "categorical": nn.CrossEntropyLoss(),
    "bernoulli": nn.BCEWithLogitsLoss(),
    "poisson": nn.PoissonNLLLoss(reduction="sum"),
    "gaussian": nn.MSELoss(),
}


def _step(model, optimizer, loss, batch, multiple=1.0):
    optimizer.zero_grad()
    (multiple * loss(model(batch[0]), batch[1])).backward()
    optimizer.step()


def _by_hand(family, h, y):
    """Squared residuals, and what the model expects of them."""
    if family == "categorical":
        p = h.softmax(-1)
        return (p - nn.functional.one_hot(y, 3)).square().sum(), (1 - p.square().sum(-1)).sum()
    mean, variance = {
        "bernoulli": (h.sigmoid(), h.sigmoid() * (1 - h.sigmoid())),
        "poisson": (h.exp(), h.exp()),
        "gaussian": (h, torch.full_like(h, 3 / 2)),  # whose NLL has the gradient of MSELoss over three outputs
    }[family]
    return (mean - y).square().sum(), variance.sum()


def _squared_means(model):
    """The mean square of each layer's training gradient."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    return [torch.cat([grads[name].flatten() for name in layer]).square().mean() for layer in LAYERS]


def _preconditioners(model, optimizer):
    return {name: optimizer.state[p]["preconditioner"] for name, p in model.named_parameters()}


def _layer_means(model, optimizer):
    held = _preconditioners(model, optimizer)
    return [torch.cat([held[name].flatten() for name in layer]).mean() for layer in LAYERS]


# --- dispersion ---


@pytest.mark.parametrize("family", LOSSES)
def test_dispersion_is_the_residuals_over_what_the_model_expects(family):
    """Averaged over refreshes; F is multiplied by it."""
    models = {scale: _model() for scale in ("likelihood", "dispersion")}
    optimizers = {
        scale: fishopt.FisherAdam(m, LOSSES[family], scale=scale, eps=0.0, lr=1e-3, **WHOLE)
        for scale, m in models.items()
    }
    model, optimizer = models["dispersion"], optimizers["dispersion"]
    value = weight = 0.0
    for step in range(3):
        x, y = _data(family, seed=step)
        with torch.no_grad():
            found, expected = _by_hand(family, model(x), y)
        value = NOISE_DECAY * value + (1 - NOISE_DECAY) * float(found / expected)
        weight = NOISE_DECAY * weight + 1 - NOISE_DECAY
        for scale, one in models.items():
            _step(one, optimizers[scale], LOSSES[family], (x, y))
        assert optimizer._moment.dispersion == pytest.approx(value / weight, rel=1e-10)
        assert optimizers["likelihood"]._moment.dispersion == 1.0
        if step == 0:
            multiple = optimizer._moment.dispersion
            plain = _preconditioners(models["likelihood"], optimizers["likelihood"])
            assert_close(_preconditioners(model, optimizer), {k: multiple * v for k, v in plain.items()})


def test_auto_estimates_it_for_squared_loss_alone():
    for family, loss in LOSSES.items():
        model = _model()
        optimizer = fishopt.FisherAdam(model, loss, **WHOLE)
        _step(model, optimizer, loss, _data(family))
        assert (optimizer._moment.dispersion != 1.0) == (family == "gaussian")
    unknown = fishopt.FisherAdam(_model(), fishopt.Gaussian("estimated"), scale="likelihood")
    assert unknown._curvature.estimates_noise


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_positions_that_do_not_count_have_no_residuals(estimator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(0, 3, (5, 2))
    y[0, 1] = y[3, 0] = -100
    options = {**WHOLE, "estimator": estimator, "betas": (0.9, 0.0)}
    optimizer = fishopt.FisherAdam(model, fishopt.Categorical(), scale="dispersion", **options)
    with torch.no_grad():
        found, expected = _by_hand("categorical", model(x)[y != -100], y[y != -100])
    fisher = fishopt.fisher_diagonal(model, x, fishopt.Categorical(), estimator=estimator, targets=y)
    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    assert optimizer._moment.dispersion == pytest.approx(float(found / expected), rel=1e-10)
    assert_close({name: optimizer.state[p]["fisher"] for name, p in model.named_parameters()}, fisher)


def test_dispersion_compares_the_same_inputs():
    """Of a refresh that looks at two: both sums are over these."""
    model, (x, y) = _model(), _data("bernoulli")
    optimizer = fishopt.FisherAdam(model, LOSSES["bernoulli"], scale="dispersion", **{**WHOLE, "refresh_inputs": 2})
    with torch.no_grad():
        h = model(x)
    sums = [_by_hand("bernoulli", h[list(rows)], y[list(rows)]) for rows in itertools.combinations(range(6), 2)]
    _step(model, optimizer, LOSSES["bernoulli"], (x, y))
    ratios = [float(found / expected) for found, expected in sums]
    assert sum(optimizer._moment.dispersion == pytest.approx(ratio, rel=1e-10) for ratio in ratios) == 1


def test_dispersion_is_relative_to_the_network_that_f_is_of():
    """In eval mode: with dropout, residuals are of the training output, the variance is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = _data("bernoulli")
    optimizer = fishopt.FisherAdam(model, nn.BCEWithLogitsLoss(), scale="dispersion", **WHOLE)
    h = model(x)
    nn.functional.binary_cross_entropy_with_logits(h, y).backward()
    with torch.no_grad():
        found, _ = _by_hand("bernoulli", h, y)
        _, expected = _by_hand("bernoulli", model.eval()(x), y)
    model.train()
    optimizer.step()
    assert optimizer._moment.dispersion == pytest.approx(float(found / expected), rel=1e-10)


# --- gradient ---


def test_each_layer_is_as_large_as_its_gradients():
    """Without damping the mean of F/B over a layer is the average of the gradient's mean square; the shape is F's."""
    model, other = _model(), _model()
    options = {"damping": 0.0, "eps": 0.0, "betas": (0.9, 0.0), "refresh_every": 1, "lr": 1e-3, **WHOLE}
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), scale="gradient", **options)
    plain = fishopt.FisherAdam(other, nn.CrossEntropyLoss(), scale="likelihood", **options)
    averages = None
    for step in range(15):
        other.load_state_dict(model.state_dict())
        for m, o in ((model, optimizer), (other, plain)):
            _step(m, o, nn.CrossEntropyLoss(), _data(seed=step))
        new, share = _squared_means(model), max(1 - ENERGY_DECAY, 1 / (step + 1))
        averages = new if averages is None else [a + share * (b - a) for a, b in zip(averages, new, strict=True)]
        torch.testing.assert_close(_layer_means(model, optimizer), averages, rtol=1e-9, atol=0.0)
    mine, theirs = _preconditioners(model, optimizer), _preconditioners(other, plain)
    for layer in LAYERS:
        ratios = torch.cat([(mine[name] / theirs[name]).flatten() for name in layer])
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-9, atol=0.0)


def test_what_the_loss_is_multiplied_by_does_not_matter():
    """Nor would a likelihood of the wrong scale."""
    steps = []
    for multiple in (1.0, 1e5):
        model = _model()
        optimizer = fishopt.FisherAdam(model, "categorical", scale="gradient", eps=0.0, **WHOLE)
        for step in range(3):
            _step(model, optimizer, nn.CrossEntropyLoss(), _data(seed=step), multiple)
        steps.append(dict(model.named_parameters()))
    assert_close(*steps, rtol=1e-9)


def test_without_gradients_it_is_the_likelihoods_scale():
    """In a refresh by hand, whose gradients may be another step's or multiplied by a GradScaler; or where all are 0."""
    model, other = _model(), _model()
    x, y = _data()
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), scale="gradient", **WHOLE)
    plain = fishopt.FisherAdam(other, nn.CrossEntropyLoss(), **WHOLE)
    (1e8 * nn.functional.cross_entropy(model(x), y)).backward()
    nn.functional.cross_entropy(other(x), y).backward()
    for o in (optimizer, plain):
        o.refresh(x)
    assert_close(_preconditioners(model, optimizer), _preconditioners(other, plain), rtol=1e-12)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer._is_fresh = False
    optimizer.step()
    assert all(v.isfinite().all() for v in _preconditioners(model, optimizer).values())
    assert all(float(state["energy"]) == 0.0 for state in optimizer.state.values())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()  # what came before does not count
    assert all(float(state["energy"]) == pytest.approx(1.0) for state in optimizer.state.values())


def test_a_constant_output_has_no_shape_to_scale():
    """F of zero and gradients that are not: no division by it."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = fishopt.FisherAdam(model, "categorical", scale="gradient", **WHOLE)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([2000.0, 0.0, 0.0]))
    x, _ = _data()
    model(x).sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(v.isfinite().all() for v in _preconditioners(model, optimizer).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_gradients_of_half_precision_are_not_lost(dtype):
    model = nn.Linear(4, 3).to(dtype)
    optimizer = fishopt.FisherAdam(model, "categorical", scale="gradient")
    x = torch.randn(6, 4, dtype=dtype)
    (1e-4 * model(x).logsumexp(1).mean()).backward()
    optimizer.step()
    for p in model.parameters():
        expected = p.grad.float().square().mean()
        torch.testing.assert_close(optimizer.state[p]["energy"], expected, rtol=1e-5, atol=0.0)
        assert expected > 0


# --- both ---


@pytest.mark.parametrize("scale", ["dispersion", "gradient"])
def test_a_resumed_run_is_the_same(scale):
    def train(model, optimizer, steps):
        for step in steps:
            _step(model, optimizer, nn.BCEWithLogitsLoss(), _data("bernoulli", seed=step))

    model = _model()
    optimizer = fishopt.FisherAdam(model, nn.BCEWithLogitsLoss(), scale=scale, refresh_every=3)
    train(model, optimizer, range(11))
    other = _model(seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = fishopt.FisherAdam(other, nn.BCEWithLogitsLoss(), scale=scale, refresh_every=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(11, 20))
    train(other, resumed, range(11, 20))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_goes_on_under_another_scale():
    for before in SCALES:
        for after in SCALES:
            model = _model()
            first, second = (fishopt.FisherAdam(model, nn.CrossEntropyLoss(), scale=s) for s in (before, after))
            _step(model, first, nn.CrossEntropyLoss(), _data())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            _step(model, second, nn.CrossEntropyLoss(), _data(seed=1))
            assert all(p.isfinite().all() for p in model.parameters())


def test_a_damaged_energy_is_refused():
    model = _model()
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), scale="gradient")
    _step(model, optimizer, nn.CrossEntropyLoss(), _data())
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["energy"] = torch.ones(2)
    with pytest.raises(ValueError, match="energy"):
        optimizer.load_state_dict(state)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale='pearson'.*'dispersion'"):
        fishopt.FisherAdam(_model(), nn.CrossEntropyLoss(), scale="pearson")


@worlds(2)
def test_processes_agree():
    """With one process on all inputs, and with each other bit for bit."""
    loss = nn.BCEWithLogitsLoss()
    for scale in ("dispersion", "gradient"):
        model, other = DDP(_model()), _model()
        optimizer = fishopt.FisherAdam(model, loss, scale=scale, **WHOLE)
        reference = fishopt.FisherAdam(other, loss, scale=scale, **WHOLE)
        for step in range(4):
            parts = [_data("bernoulli", seed=10 * step + rank) for rank in range(dist.get_world_size())]
            _step(model, optimizer, loss, parts[dist.get_rank()])
            _step(other, reference, loss, tuple(map(torch.cat, zip(*parts, strict=True))))
        assert_close(dict(model.module.named_parameters()), dict(other.named_parameters()), rtol=1e-9)
        assert optimizer._moment.dispersion == pytest.approx(reference._moment.dispersion, rel=1e-9)
        assert len(set(gathered(str([p.tolist() for p in model.parameters()])))) == 1


def test_a_new_optimizer_makes_room_for_what_will_be_loaded():
    """As `torch.distributed.checkpoint` has it do, by a step without gradients; what is made counts for nothing."""
    model, other = _model(), _model()
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), scale="gradient", lr=0.0, **WHOLE)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(float(state["energy"]) == 0.0 for state in optimizer.state.values())
    reference = fishopt.FisherAdam(other, nn.CrossEntropyLoss(), scale="gradient", **WHOLE)
    optimizer.param_groups[0]["lr"] = reference.defaults["lr"]
    for m, o in ((model, optimizer), (other, reference)):
        _step(m, o, nn.CrossEntropyLoss(), _data())
    assert_close(dict(model.named_parameters()), dict(other.named_parameters()))
