"""lr="auto": the quadratic model against a dense Gauss-Newton matrix, its minimum and average, and what enters it."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

import fishopt
from fishopt.optim import recorder
from fishopt.optim.objective import Objective
from fishopt.optim.quadratic import Quadratic
from fishopt.optim.replica import Replica
from fishopt.optim.search import Memory
from tests.auto_setup import LOSSES, _network, _problem, _random_directions, _start


def _dense(model, x, loss):
    """The loss, its gradient and its Gauss-Newton matrix as one vector's functions."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)).reshape(-1))(params)
    j = torch.cat([jacobian[name].flatten(1) for name in params], 1)
    h = model(x).detach()
    second = hessian(lambda flat: loss(flat.reshape(h.shape)))(h.reshape(-1))
    first = jacrev(lambda flat: loss(flat.reshape(h.shape)))(h.reshape(-1))
    return float(loss(h)), first @ j, j.T @ second @ j


def _vector(direction):
    return torch.cat([d.reshape(-1) for d in direction.values()])


@pytest.mark.parametrize("kind", LOSSES)
def test_the_model_is_the_dense_gauss_newton_one(kind):
    model, optimizer, loss_fn, x, y = _problem(kind, 6)
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


def test_a_loss_of_an_output_that_lies_within_other_memory():
    class Second(nn.Module):
        def forward(self, x):
            return torch.stack([torch.zeros(len(x), 3).to(x), self.head(x)])[1]

    model, loss_fn = Second(), nn.MSELoss()
    model.head = _network()
    optimizer = _start(model, loss_fn)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    loss_fn(model(x), y).backward()
    (record,) = optimizer._recorder.records
    torch.testing.assert_close(record.loss(model(x).detach()), loss_fn(model(x), y))


def test_two_losses_of_two_forwards_add_up():
    """As of a physics-informed network: inside and at the boundary."""
    model, loss_fn = _network(), nn.MSELoss()
    optimizer = _start(model, loss_fn)
    a, b = torch.randn(6, 4).double(), torch.randn(2, 4).double()
    loss = loss_fn(model(a), torch.zeros(6, 3).double()) + 10 * loss_fn(model(b), torch.ones(2, 3).double())
    loss.backward()
    assert Objective(optimizer._recorder.records, Replica(model, None)).value() == pytest.approx(float(loss.detach()))


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
