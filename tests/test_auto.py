"""lr="auto": the quadratic model against a dense Gauss-Newton matrix, and what a step keeps to."""

import copy
import math
import random
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

import fishopt
from fishopt.optim import recorder
from fishopt.optim.auto import START
from fishopt.optim.objective import Objective
from fishopt.optim.quadratic import Quadratic
from fishopt.optim.replica import Replica
from fishopt.optim.search import Memory
from tests.test_atomic import _all_of, _At

LOSSES = {
    "squared": (nn.MSELoss(), lambda h: torch.randn_like(h)),
    "squared, sum": (nn.MSELoss(reduction="sum"), lambda h: torch.randn_like(h)),
    "classes": (nn.CrossEntropyLoss(), lambda h: torch.randint(0, h.shape[1], (len(h),))),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), lambda h: torch.randint(0, 3, (len(h),))),
    "yes or no": (nn.BCEWithLogitsLoss(), lambda h: torch.rand_like(h).round()),
    "counts": (nn.PoissonNLLLoss(), lambda h: torch.poisson(torch.rand_like(h) * 3)),
}


def _network(width=3, *layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *layers, nn.Linear(5, width)).double()


def _start(model, loss_fn, **options):
    return fishopt.DiagonalNGD(model, loss_fn, lr="auto", generator=torch.Generator().manual_seed(0), **options)


def _backward(model, optimizer, loss_fn, x, y):
    optimizer.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    return float(loss.detach())


def _dense(model, x, loss):
    """The loss, its gradient and its Gauss-Newton matrix as one vector's functions."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)).reshape(-1))(params)
    j = torch.cat([jacobian[name].flatten(1) for name in params], 1)
    h = model(x).detach()
    second = hessian(lambda flat: loss(flat.reshape(h.shape)))(h.reshape(-1))
    first = jacrev(lambda flat: loss(flat.reshape(h.shape)))(h.reshape(-1))
    return float(loss(h)), first @ j, j.T @ second @ j


def _random_directions(model, count=2):
    return [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(count)]


def _vector(direction):
    return torch.cat([d.reshape(-1) for d in direction.values()])


@pytest.mark.parametrize("kind", LOSSES)
def test_the_model_is_the_dense_gauss_newton_one(kind):
    loss_fn, labels = LOSSES[kind]
    model = _network()
    optimizer = _start(model, loss_fn)
    x = torch.randn(6, 4, dtype=torch.float64)
    y = labels(model(x).detach())
    (3 * loss_fn(model(x), y)).backward()
    directions = _random_directions(model)
    value, slopes, curvature = Objective(optimizer._recorder.records, Replica(model, None)).along(directions)
    loss, gradient, matrix = _dense(model, x, lambda h: 3 * loss_fn(h, y))
    d = torch.stack([_vector(one) for one in directions])
    assert value == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(slopes, d @ gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(curvature, d @ matrix @ d.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "family", [fishopt.Categorical(), fishopt.Bernoulli(), fishopt.Poisson(), fishopt.Gaussian(2.0)]
)
def test_with_a_closure_the_likelihood_tells_the_curvature(family):
    model = _network()
    optimizer = _start(model, family)
    x = torch.randn(6, 4, dtype=torch.float64)
    y = family.sample(model(x).detach(), 1)[0]
    family.nll(model(x), y).mean().backward()
    directions = _random_directions(model)
    record = optimizer._recorder.records
    objective = Objective(record, Replica(model, None), family, closure=lambda: None, loss=torch.tensor(7.0))
    value, slopes, curvature = objective.along(directions)
    _, _, matrix = _dense(model, x, lambda h: family.nll(h, y).mean())
    d = torch.stack([_vector(one) for one in directions])
    assert (value, slopes) == (7.0, None)
    torch.testing.assert_close(curvature, d @ matrix @ d.T, rtol=1e-10, atol=1e-12)


def test_labels_that_do_not_count_have_no_curvature():
    family = fishopt.Categorical()
    model = nn.Linear(4, 3).double()
    optimizer = _start(model, family)
    x, y = torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(0, 3, (5, 2))
    y[0, 1] = y[3] = -100

    def loss(h):
        return nn.functional.cross_entropy(h.transpose(1, 2), y)

    loss(model(x)).backward()
    directions = _random_directions(model)
    objective = Objective(optimizer._recorder.records, Replica(model, None), family, closure=lambda: None, loss=0.0)
    _, _, matrix = _dense(model, x, loss)
    d = torch.stack([_vector(one) for one in directions])
    torch.testing.assert_close(objective.along(directions)[2], d @ matrix @ d.T, rtol=1e-10, atol=1e-12)


def test_the_minimum_of_a_model():
    """Also where directions are parallel, or one is zero."""
    torch.manual_seed(0)
    root, slopes = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    a, m = root @ root.T, torch.diag(torch.rand(3, dtype=torch.float64))
    expected = -torch.linalg.solve(a + 0.3 * m, slopes)
    torch.testing.assert_close(Quadratic(slopes, a, m).minimum(0.3), expected)
    assert Quadratic(slopes, a, m).change(expected) == pytest.approx(
        float(slopes @ expected + expected @ a @ expected / 2)
    )
    for factor in torch.linspace(0.1, 3, 20, dtype=torch.float64):  # d, a multiple, and nothing
        d = torch.tensor([0.7, 0.2, -1.1], dtype=torch.float64)
        rows = torch.stack([d, factor * d, 0 * d])
        rounded = rows @ slopes + 1e-8 * torch.tensor([1, -1, 0], dtype=torch.float64)
        c = Quadratic(rounded, rows @ a @ rows.T, rows @ m @ rows.T).minimum(0.3)
        length = -slopes @ d / (d @ (a + 0.3 * m) @ d)
        torch.testing.assert_close(c @ rows, length * d, rtol=1e-6, atol=1e-6)
        assert c.abs().max() < 20 * length.abs()
        assert c[2] == 0


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_on_a_linear_model_a_step_ends_in_the_minimum_of_line_and_plane(decay):
    """Where the loss has no slope along the directions of the step."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 2).double(), nn.MSELoss()
    optimizer = _start(model, loss_fn, weight_decay=decay)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    directions = []
    for _ in range(3):
        optimizer.param_groups[0]["auto"] = (1e-15, *optimizer.param_groups[0]["auto"][1:])
        before = [p.detach().clone() for p in model.parameters()]
        _backward(model, optimizer, loss_fn, x, y)
        optimizer.step()
        step = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        _backward(model, optimizer, loss_fn, x, y)
        gradient = [p.grad + decay * p.detach() for p in model.parameters()]
        directions.append(step)
        size = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        for d in directions[-2:]:
            length = math.sqrt(sum(float(one.square().sum()) for one in d))
            slope = sum(float((a * b).sum()) for a, b in zip(gradient, d, strict=True))
            assert abs(slope) < 1e-8 * size * length
        assert length > 1e-3


def test_a_loss_that_rises_is_undone(monkeypatch):
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    _backward(model, optimizer, loss_fn, x, y)
    before = copy.deepcopy(list(model.parameters()))
    monkeypatch.setattr(Objective, "value", lambda self: math.inf)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["auto"][0] > 1e3
    monkeypatch.undo()
    _backward(model, optimizer, loss_fn, x, y)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_never_rises(kind):
    """On the batch that a step was made on; with nothing tuned it falls far."""
    loss_fn, labels = LOSSES[kind]
    model = _network()
    optimizer = _start(model, loss_fn)
    x = torch.randn(16, 4, dtype=torch.float64)
    y = labels(model(x).detach())
    losses = []
    for _ in range(30):
        losses.append(_backward(model, optimizer, loss_fn, x, y))
        optimizer.step()
    assert all(b <= a for a, b in pairwise(losses))
    assert len(set(losses)) == 30


def test_micro_batches_are_one_batch():
    ends = []
    for parts in (1, 3):
        model, loss_fn = _network(), nn.CrossEntropyLoss()
        optimizer = _start(model, loss_fn, estimator="exact", refresh_inputs=12)
        x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
        for _ in range(3):
            optimizer.zero_grad()
            for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (loss_fn(model(some), labels) / parts).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_loss_of_a_view_of_the_output():
    """Language models pass theirs transposed, or flat."""
    model, loss_fn = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(0, 3, (5, 2))
    found = []
    for view, labels in ((lambda h: h.transpose(1, 2), y), (lambda h: h.view(-1, 3), y.view(-1))):
        optimizer = _start(model, loss_fn)
        model.zero_grad()
        loss_fn(view(model(x)), labels).backward()
        objective = Objective(optimizer._recorder.records, Replica(model, None))
        found.append(objective.value())
        assert found[-1] == pytest.approx(float(loss_fn(view(model(x)), labels).detach()), rel=1e-12)


def test_two_losses_of_two_forwards_add_up():
    """As of a physics-informed network: inside and at the boundary."""
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    a, b = torch.randn(6, 4).double(), torch.randn(2, 4).double()
    loss = loss_fn(model(a), torch.zeros(6, 3).double()) + 10 * loss_fn(model(b), torch.ones(2, 3).double())
    loss.backward()
    assert Objective(optimizer._recorder.records, Replica(model, None)).value() == pytest.approx(float(loss.detach()))


def test_a_penalty_is_noticed_and_counts_with_a_closure():
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y) + 0.3 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    closure()
    with pytest.warns(RuntimeWarning, match="pass a closure"):
        optimizer.step()
    losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
    assert all(b <= a for a, b in pairwise(losses))
    size = max(float(p.grad.abs().max()) for p in model.parameters())
    assert size < 0.02


def test_products_of_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(3, 4, dtype=torch.float64)
    params = dict(model.named_parameters())
    direction = _random_directions(model, 1)[0]
    expected = torch.func.jvp(lambda p: functional_call(model, p, (x,)), (params,), (direction,))
    found = Replica(model, None).products(fishopt.passes.Arguments((x,)), [direction])
    torch.testing.assert_close((found[0], found[1][0]), expected)


def test_products_without_a_forward_mode_rule():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, gradient):
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    class Cubed(nn.Module):
        def forward(self, x):
            return Cube.apply(x)

    class Plain(nn.Module):
        def forward(self, x):
            return x**3

    inputs = fishopt.passes.Arguments((torch.randn(6, 4, dtype=torch.float64),))
    found = []
    for layer in (Cubed(), Plain()):
        model = _network(3, layer)
        directions = _random_directions(model)
        found.append(Replica(model, None).products(inputs, directions))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_batch_statistics_in_training_running_ones_else_and_no_dropout():
    model = _network(3, nn.BatchNorm1d(5).double(), nn.Dropout(0.5))
    x = torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    before = copy.deepcopy(model.state_dict())
    replica, inputs = Replica(model, None), fishopt.passes.Arguments((x,))
    in_training = replica.outputs(inputs)
    model.eval()
    running, _ = replica.products(inputs, _random_directions(model))
    torch.testing.assert_close(running, model(x).detach())
    torch.testing.assert_close(replica.outputs(inputs), model(x).detach())
    plain = nn.Sequential(*(m for m in model if not isinstance(m, nn.Dropout))).train()
    replica.products(inputs, _random_directions(model))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    torch.testing.assert_close(in_training, plain(x).detach())


class Residual(nn.Module):
    """Of u'' = -sin(x)."""

    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    @torch.enable_grad()
    def forward(self, x):
        x = x.detach().requires_grad_()
        first = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), x, create_graph=True)[0] + torch.sin(x)


class ForwardResidual(Residual):
    """By forward mode, which does not nest."""

    def forward(self, x):
        second = torch.func.vmap(torch.func.hessian(lambda one: self.u(one[None])[0, 0]))
        return second(x)[:, :, 0] + torch.sin(x)


@pytest.mark.parametrize("kind", [Residual, ForwardResidual])
@pytest.mark.filterwarnings("ignore:the curvature of")
def test_networks_that_differentiate_themselves(kind):
    torch.manual_seed(0)
    model, loss_fn = kind(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    x = torch.linspace(0, 3, 12, dtype=torch.float64)[:, None]
    losses = []
    for _ in range(12):
        losses.append(_backward(model, optimizer, loss_fn, x, torch.zeros_like(x)))
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def _trained(model, optimizer, loss_fn, steps):
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
        _backward(model, optimizer, loss_fn, x, x[:, :3].sin())
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_a_resumed_run_and_a_copy_go_on_bit_for_bit():
    loss_fn = nn.MSELoss()
    model = _network()
    optimizer = _start(model, loss_fn)
    _trained(model, optimizer, loss_fn, range(13))
    copied = copy.deepcopy((model, optimizer))
    resumed = _network()
    other = _start(resumed, loss_fn)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["auto"] == optimizer.param_groups[0]["auto"] != START
    whole = _trained(model, optimizer, loss_fn, range(13, 30))
    for ends in (_trained(*copied, loss_fn, range(13, 30)), _trained(resumed, other, loss_fn, range(13, 30))):
        assert all(torch.equal(a, b) for a, b in zip(whole, ends, strict=True))


@pytest.mark.parametrize("at", [1, 2])
def test_a_step_whose_loss_fails_has_not_happened(at):
    class Breaking(nn.MSELoss):
        left = 10**6

        def forward(self, *args):
            self.left -= 1
            if self.left < 0:
                raise OSError
            return super().forward(*args)

    loss_fn = Breaking()
    model = _network()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    for _ in range(3):
        _backward(model, optimizer, loss_fn, x, y)
        if optimizer._steps < 2:
            optimizer.step()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    loss_fn.left = at - 1  # the look at the loss, then that after the step
    with pytest.raises(OSError):  # noqa: PT011 - of no further kind
        optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()]
    for states in (before, after):
        states[1] = {**states[1], "fishopt": None, "param_groups": states[1]["param_groups"][0]["auto"]}
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    loss_fn.left = 10**6
    optimizer.step()


def test_a_scheduler_multiplies_the_step():
    def step(factor):
        model, loss_fn = _network(), nn.MSELoss()
        optimizer = _start(model, loss_fn)
        optimizer.param_groups[0]["lr"] *= factor
        before = [p.detach().clone() for p in model.parameters()]
        return [b - a for a, b in zip(before, _trained(model, optimizer, loss_fn, [0]), strict=True)]

    for whole, half in zip(step(1.0), step(0.5), strict=True):
        torch.testing.assert_close(half, whole / 2)


def test_groups_have_their_shares_of_a_step():
    """One that is frozen by its learning rate stays, and the others' step is the one without it."""
    steps = []
    for is_frozen in (True, False):
        model, loss_fn = _network(), nn.MSELoss()
        groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
        for p in model[0].parameters():
            p.requires_grad_(is_frozen)
        optimizer = _start(model, loss_fn, params=groups, estimator="exact")
        before = [p.detach().clone() for p in model.parameters()]
        after = _trained(model, optimizer, loss_fn, range(1))
        steps.append([b - a for a, b in zip(before, after, strict=True)])
    assert not any(step.any() for step in steps[0][:2])
    assert all(step.any() for step in steps[0][2:])


def test_a_model_in_several_processes_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            _start(model, nn.MSELoss())
        inner, loss_fn = model.module, nn.MSELoss()
        optimizer = _start(inner, loss_fn)
        loss_fn(model(torch.randn(3, 2)), torch.randn(3, 1)).backward()
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_a_closure_tells_the_loss():
    family = fishopt.Categorical()
    model = _network()
    optimizer = _start(model, family)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert all(b <= a for a, b in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_searched_is_refused_by_name():
    model, x = _network(), torch.randn(6, 4).double()
    y = torch.randn(6, 3).double()

    def stepped(likelihood, loss, closure=None, **options):
        optimizer = _start(model, likelihood, **options)
        before = [p.detach().clone() for p in model.parameters()]
        loss(optimizer)
        try:
            optimizer.step(closure)
        finally:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert not optimizer.state

    def plain(_):
        nn.functional.mse_loss(model(x), y).backward()

    def scaled(optimizer):
        plain(optimizer)
        optimizer.found_inf = torch.tensor(0.0)

    with pytest.raises(ValueError, match="no call of a loss module"):
        stepped(nn.MSELoss(), plain)
    with pytest.raises(ValueError, match="no call of a loss module"):
        stepped("gaussian", plain)
    with pytest.raises(ValueError, match="labels' variance is not known"):
        stepped(nn.MSELoss(), plain, closure=lambda: nn.functional.mse_loss(model(x), y).detach())
    with pytest.raises(ValueError, match="2 forwards"):
        stepped("gaussian", lambda _: (plain(_), plain(_)), closure=lambda: torch.tensor(0.0))
    with pytest.raises(ValueError, match="closure returned None"):
        stepped("gaussian", plain, closure=lambda: None)
    with pytest.raises(ValueError, match="GradScaler"):
        stepped(nn.MSELoss(), scaled)
    with pytest.raises(ValueError, match="before any backward"):
        stepped("gaussian", lambda _: model(x))
    with pytest.raises(ValueError, match="maximize"):
        _start(model, nn.MSELoss(), maximize=True)
    with pytest.raises(ValueError, match="lr='fast'"):
        fishopt.DiagonalNGD(model, nn.MSELoss(), lr="fast")


def test_models_are_averaged_where_batches_differ(monkeypatch):
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    used, averages = [], []
    minimum, after = Quadratic.minimum, Memory.after
    monkeypatch.setattr(Quadratic, "minimum", lambda self, *rest: (used.append(self), minimum(self, *rest))[1])
    monkeypatch.setattr(Memory, "after", lambda self, *rest: (averages.append(after(self, *rest)), averages[-1])[1])
    _trained(model, optimizer, loss_fn, [0, 1, 2, 2])
    assert [a is b for a, (b, _) in zip(used, averages, strict=True)] == [True, True, True, False]
    assert [memory.averaged for _, memory in averages] == [0, 1, 2, 3]


def test_the_average_of_models():
    """The mean at first, with ever less weight on the older ones; directions have length one."""
    torch.manual_seed(0)
    models = []
    for _ in range(3):
        root = torch.randn(2, 2, dtype=torch.float64)
        metric = torch.eye(2, dtype=torch.float64) + 0.1 * torch.tensor([[0, 1], [1, 0]])
        models.append(Quadratic(torch.randn(2, dtype=torch.float64), root @ root.T, metric))
    memory = Memory()
    for one in models:
        found, memory = memory.after(one)
    for mean, parts in zip(found, zip(*models, strict=True), strict=True):
        torch.testing.assert_close(mean, torch.stack(parts).mean(0))
    late, _ = memory._replace(averaged=1e6).after(models[0])
    torch.testing.assert_close(late.slopes, 0.99 * found.slopes + 0.01 * models[0].slopes)
    single = Quadratic(torch.ones(1), torch.ones(1, 1), torch.ones(1, 1))
    assert memory.after(single) == (single, memory)


def test_what_a_model_allows():
    """Nothing at its minimum, damped or not, or at less; at more what it explains and its curvature's part."""
    model = Quadratic(*(torch.tensor(x, dtype=torch.float64) for x in ([-2.0], [[4.0]], [[1.0]])))
    assert [model.allows(torch.tensor([c], dtype=torch.float64)) for c in (0.25, 0.5, 1.0)] == [0, 0, 2]
    assert model.allows(model.minimum(3.0)) == 0


@pytest.mark.parametrize("at", [3, 12])
def test_an_interrupt_at_any_line_is_before_or_after_the_step(at):
    """A step with a refresh, and one without."""
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    _trained(model, optimizer, loss_fn, range(at))

    def started():
        copied, other = copy.deepcopy((model, optimizer))
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(at)).double()
        _backward(copied, other, loss_fn, x, x[:, :3].sin())
        return copied, other

    untouched, whole = started(), started()
    started()[1].step()  # some lines are for the first time alone
    counter = _At()
    counter.during(whole[1].step)
    ends = [_all_of(*pair) for pair in (untouched, whole)]
    seen = set()
    for line in {*random.Random(at).sample(range(1, counter.count), 30), *range(counter.count - 20, counter.count)}:
        pair = started()
        with pytest.raises(KeyboardInterrupt):
            _At(line).during(pair[1].step)
        after = _all_of(*pair)
        assert after in ends, line
        seen.add(ends.index(after))
    assert seen == {0, 1}


def test_what_was_gone_through_before_gradients_were_zero_does_not_count():
    """Not even if its graph is gone through again."""
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    loss = loss_fn(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    (2 * loss).backward()
    (record,) = optimizer._recorder.records
    assert [float(call.factor) for call in record.calls] == [2.0]


def test_all_micro_batches_are_kept(monkeypatch):
    monkeypatch.setattr(recorder, "MAX_KEPT", 1)
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn, refresh_inputs=2)
    for _ in range(3):
        loss_fn(model(torch.randn(6, 4).double()), torch.randn(6, 3).double()).backward()
    assert len(optimizer._recorder.records) == 3


def test_damping_is_relative_to_the_present_curvature():
    """Not to its peak: the size of a step is found, so it cannot grow without bound where F goes to zero."""
    model, loss_fn = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    optimizer = _start(model, loss_fn, decay=0.0, estimator="exact", refresh_inputs=6)
    x = torch.randn(6, 4).double()
    peaks = []
    for size in (1.0, 1e-2):
        optimizer.refresh(size * x)
        peaks.append(optimizer.state[model.weight]["peak"].item())
    assert peaks[1] < peaks[0]


def test_a_checkpoint_brings_the_search_along():
    """Into an optimizer with a learning rate, as all options of the groups."""
    source, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(source, loss_fn)
    _trained(source, optimizer, loss_fn, range(2))
    model = _network()
    other = fishopt.DiagonalNGD(model, loss_fn)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.load_state_dict(source.state_dict())
    ends = _trained(source, optimizer, loss_fn, range(2, 4)), _trained(model, other, loss_fn, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
