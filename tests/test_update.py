"""The plain step against its formula: fused and not, clipped and not, whatever the groups, dtypes and layouts."""

import io
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fishopt
from fishopt.optim import buckets, fused
from fishopt.optim.averages import averaged
from fishopt.optim.curvature import Curvature, _all_finite
from fishopt.optim.estimate import Estimate, Moment

BOTH = [fishopt.FisherAdam, fishopt.DiagonalNGD]
SHAPES = {"vector": (7,), "matrix": (5, 9), "scalar": (), "empty": (0,), "conv": (4, 6, 3, 3), "large": (300, 1001)}


class Bag(nn.Module):
    """Parameters without a network."""

    def __init__(self, names=SHAPES, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in names:
            value = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(self, x):
        return x


@pytest.fixture(autouse=True)
def _estimates_are_given(monkeypatch):
    """Each refresh finds the same Fisher diagonal."""

    def refresh(self, units, wanted, record, training, step):
        generator = torch.Generator().manual_seed(1)
        parts, wanted = {}, {name for names in units.values() for name in names}
        for name, p in self._model.named_parameters():
            if name not in wanted:
                continue
            new = torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.1
            parts[name] = torch.empty_like(p).copy_(new)
        return Estimate(parts, Moment(4, 1.0, 1.0))

    monkeypatch.setattr(Curvature, "refresh", refresh)


def _optimizer(model, kind=fishopt.FisherAdam, **options):
    """Refreshed, with none due in the steps that follow."""
    optimizer = kind(model, "categorical", refresh_every=10**6, **options)
    optimizer._steps = 10
    optimizer.refresh(torch.zeros(1))
    optimizer._is_fresh = False
    return optimizer


def _set_gradients(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = grad.to(p.dtype)


def _sampled(x):
    """As documented: of every so many blocks of 64 entries, in the order of memory, the first."""
    every = max((min(x.numel() // 2**13, 62) - 1) | 1, 1)
    if every == 1:
        return x
    blocks = x.flatten()[: x.numel() // 64 * 64].view(-1, 64)
    return blocks[::every]


class Reference:
    """The formula, in float64, one parameter at a time."""

    def __init__(self, optimizer):
        self.of = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                square = optimizer.state[p]["preconditioner"].double()
                self.of[p] = [p.detach().double().clone(), torch.zeros_like(square), square.sqrt(), group, 0]
        self.excesses = []

    def step(self, sample=_sampled):
        for p, kept in self.of.items():
            value, m, denominator, group, t = kept
            if p.grad is None:
                continue
            g = p.grad.double() * (-1 if group["maximize"] else 1)
            beta, lr = group["betas"][0], float(group["lr"])
            m.lerp_(g, 1 - beta)
            t += 1
            update = m / (1 - beta**t) / denominator
            if p.numel():
                part = sample(update) if p.dtype == torch.float32 and p.is_contiguous() else update
                excess = max(1.0, float(part.square().mean().sqrt()) / group["clip"])
                self.excesses.append(excess)
                update /= excess
            value.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
            kept[4] = t

    def check(self, rtol=2e-5, atol=2e-6):
        for p, kept in self.of.items():
            torch.testing.assert_close(p.detach().double(), kept[0], rtol=rtol, atol=atol)


def _run(model, optimizer, steps=6, **options):
    reference = Reference(optimizer)
    for step in range(steps):
        _set_gradients(model, step, **options)
        reference.step()
        optimizer.step()
    reference.check()
    return reference


def _count_fused(monkeypatch):
    assert fused.is_exact("cpu")  # tried out before we count
    calls = []
    kernel = torch._fused_adamw_
    monkeypatch.setattr(
        torch, "_fused_adamw_", lambda params, *a, **k: (calls.append(len(params)), kernel(params, *a, **k))
    )
    return calls


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("clip", [math.inf, 100.0, 1.0, 0.03, 1e-4])
@pytest.mark.parametrize("is_exact", [True, False])
def test_fisher_adam_is_its_formula(monkeypatch, maximize, clip, is_exact):
    monkeypatch.setattr("fishopt.optim.adam.can_fuse", fused.can_fuse if is_exact else lambda *a: False)
    calls = _count_fused(monkeypatch)
    model = Bag() if is_exact else Bag([name for name in SHAPES if name != "large"])  # sampled only if fused
    reference = _run(model, _optimizer(model, lr=0.05, weight_decay=0.1, clip=clip, maximize=maximize))
    assert calls == ([len(SHAPES)] * 6 if is_exact else [])
    assert (max(reference.excesses) > 1) == (clip <= 1)


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["float", "tensor"])
def test_groups_dtypes_and_missing_gradients(monkeypatch, lr):
    calls = _count_fused(monkeypatch)
    model = Bag()
    model.matrix.data = model.matrix.data.double()
    groups = [
        {"params": [model.vector, model.matrix, model.conv], "weight_decay": 0.0, "betas": (0.5, 0.9)},
        {"params": [model.scalar, model.large, model.empty], "maximize": True, "clip": 0.2},
    ]
    optimizer = _optimizer(model, params=groups, lr=lr)
    reference = Reference(optimizer)
    for step in range(8):
        _set_gradients(model, step)
        if step in {2, 3}:
            model.vector.grad = None
        if step == 5:
            model.large.grad = None
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        reference.step()
        optimizer.step()
    reference.check()
    assert [optimizer.state[p]["step"] for p in (model.vector, model.conv, model.large)] == [6, 8, 7]
    # Vector and conv, then scalar and large: apart once their counts of steps differ.
    assert calls == [2, 3] * 2 + [1, 3] * 2 + [1, 1, 3] + [1, 1, 2] + [1, 1, 2, 1] * 2


def test_a_state_replaced_by_hand_is_followed():
    model = Bag()
    optimizer = _optimizer(model, lr=0.05, clip=0.5)
    _set_gradients(model, 0)
    optimizer.step()
    for p in model.parameters():
        state = optimizer.state[p]
        state.update(exp_avg=torch.zeros_like(p), preconditioner=state["preconditioner"] / 100)
    before = model.conv.detach().double().clone()
    optimizer.step()
    m = 0.1 * model.conv.grad.double() / (1 - 0.9**2)
    update = m / optimizer.state[model.conv]["preconditioner"].double().sqrt()
    update *= 0.5 / update.square().mean().sqrt()
    torch.testing.assert_close(
        model.conv.detach().double(), before * (1 - 0.05 * 0.01) - 0.05 * update, rtol=1e-5, atol=1e-6
    )


def test_a_group_added_and_data_replaced_are_followed():
    model = Bag()
    optimizer = _optimizer(model, params=[model.vector, model.conv, model.large], lr=0.05)
    _set_gradients(model, 0)
    optimizer.step()
    optimizer.add_param_group({"params": [model.matrix]})
    before = model.matrix.detach().clone()
    optimizer.refresh(torch.zeros(1))
    for p in model.parameters():
        p.data = p.data.clone()
    # The same values, but no longer dense, and in another order of memory: the kernel is not for these.
    model.conv.data = model.conv.data.to(memory_format=torch.channels_last)
    model.vector.data = torch.stack([model.vector.data] * 2, dim=1)[:, 0]
    values = {p: p.detach().double().clone() for p in (model.vector, model.conv, model.large)}
    averages = {p: optimizer.state[p]["exp_avg"].double().clone() for p in values}
    _set_gradients(model, 1)
    optimizer.step()
    for p, value in values.items():
        m = averages[p].lerp(p.grad.double(), 0.1) / (1 - 0.9**2)
        update = m / optimizer.state[p]["preconditioner"].double().sqrt()
        part = _sampled(update) if p.is_contiguous() else update
        update /= max(1.0, float(part.square().mean().sqrt()))
        torch.testing.assert_close(p.detach().double(), value * (1 - 0.05 * 0.01) - 0.05 * update, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.matrix, before)


@pytest.mark.parametrize("clip", [math.inf, 0.1])
def test_memory_layouts_of_parameters_and_gradients(monkeypatch, clip):
    """The kernel goes by position in memory: gradients laid out otherwise, and views, must not be mixed up."""
    calls = _count_fused(monkeypatch)
    model = Bag()
    flat = torch.zeros(model.large.numel() + 13)  # parameters as parts of one buffer
    flat[13:].copy_(model.large.detach().flatten())
    model.large.data = flat[13:].view_as(model.large)
    model.conv.data = model.conv.data.to(memory_format=torch.channels_last)
    model.matrix.data = torch.cat([model.matrix.data, model.matrix.data], dim=1)[:, :9]  # with gaps
    optimizer = _optimizer(model, lr=0.05, clip=clip)
    reference = Reference(optimizer)
    for step in range(4):
        _set_gradients(model, step)
        if step % 2:
            model.conv.grad = model.conv.grad.to(memory_format=torch.channels_last)
        else:
            model.large.grad = model.large.grad.t().contiguous().t()
            model.vector.grad = torch.full((), 0.5).expand(7)
        reference.step()
        optimizer.step()
    reference.check()
    assert len(calls) == 4 if clip == math.inf else calls
    assert not flat[:13].any()


def test_channels_last_weights_are_fused(monkeypatch):
    calls = _count_fused(monkeypatch)
    model = Bag(["conv"])
    model.conv.data = model.conv.data.to(memory_format=torch.channels_last)
    _run(model, _optimizer(model, lr=0.05), steps=3)
    assert calls == [1, 1, 1]


def test_float64_is_not_fused(monkeypatch):
    calls = _count_fused(monkeypatch)
    model = Bag(["matrix", "conv"], torch.float64)
    optimizer = _optimizer(model, lr=0.05, clip=0.5)
    reference = Reference(optimizer)
    for step in range(5):
        _set_gradients(model, step)
        reference.step()
        optimizer.step()
    reference.check(1e-12, 1e-12)
    assert not calls


def test_a_decay_rate_out_of_the_kernels_range_is_not_fused(monkeypatch):
    calls = _count_fused(monkeypatch)
    model = Bag(["matrix", "conv"])
    _run(model, _optimizer(model, lr=0.05, betas=(0.9999, 0.9)))
    assert not calls


@pytest.mark.parametrize("clip", [math.inf, 1e-3])
def test_the_squares_stay_as_they_are(clip):
    """Averaged into by 2^-53 per step: nothing in float32, even with gradients a thousand times their root."""
    model = Bag(["matrix", "conv"])
    optimizer = _optimizer(model, clip=clip, lr=1e-6)
    before = {p: optimizer.state[p]["preconditioner"].clone() for p in model.parameters()}
    _set_gradients(model, 0, scale=1e3)
    for _ in range(1000):
        optimizer.step()
    assert all(torch.equal(optimizer.state[p]["preconditioner"], old) for p, old in before.items())


def _moved(excess, beta=0.9):
    """A step of each excess: what the kernel makes of an update that is so many times the limit."""
    p, g, m, v = (torch.full((33,), x) for x in (0.0, 2.0, 0.0, 4.0))
    limit = (1 - beta) / excess
    counts = fused.Sample([m], [v]).counts([g], beta, limit)
    fused.adamw_with_frozen_square([p], [g], [m], [v], lr=excess, beta=beta, weight_decay=0.0, step=1, counts=counts)
    return p


def test_the_clip_is_exact_over_its_range():
    for excess in (1 + 1e-6, 1.0001, 1.01, 2.0, 30.0, 1e3, 2.0**12, 2.0**16):
        torch.testing.assert_close(_moved(excess), torch.full((33,), -1.0), rtol=1e-5, atol=0.0)
    for beta in (0.0, 0.9, fused.MAX_BETA):
        torch.testing.assert_close(_moved(2.0**20, beta), torch.full((33,), -1.0), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(_moved(2.0**22), torch.full((33,), -4.0), rtol=1e-3, atol=0.0)  # no further
    torch.testing.assert_close(_moved(0.5), torch.full((33,), -0.5), rtol=1e-6, atol=0.0)


def test_zero_gradients_and_limits_of_any_size():
    for clip in (1e-30, 1e30, 1e300):
        model = Bag()
        optimizer = _optimizer(model, clip=clip)
        for scale in (0.0, 1.0):
            _set_gradients(model, 0, scale=scale)
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [1, 2**13, 3 * 2**13 - 1, 3 * 2**13, 100_003, 2**19 + 77, 10**7])
def test_samples_are_as_large_as_promised_and_within_the_tensor(size):
    x = torch.arange(size, dtype=torch.float32)
    stride = fused._stride(x)
    assert stride % 2 == 1
    assert stride <= 61
    part = fused._blocks(x, stride) if stride > 1 else x
    assert part.numel() >= min(size, max(2**13, size / 61 - 64))
    assert part.flatten()[-1] <= size - 1  # beyond the tensor there would be other memory
    assert part.flatten()[-1] >= size - 64 * (stride + 1)


def test_a_kernel_that_does_something_else_is_not_used(monkeypatch):
    kernel = torch._fused_adamw_
    assert fused.is_exact.__wrapped__("cpu")
    for wrong in ({"beta2": 0.5}, {"weight_decay": 0.0}, {"eps": 0.1}, {"maximize": True}):
        monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, wrong=wrong, **k: kernel(*a, **{**k, **wrong}))
        assert not fused.is_exact.__wrapped__("cpu")
    monkeypatch.delattr(torch, "_fused_adamw_")
    assert not fused.is_exact.__wrapped__("cpu")
    assert not fused.is_exact.__wrapped__("meta")


# --- DiagonalNGD ---


@pytest.mark.parametrize("radius", [1e30, 1e-4])
def test_ngd_is_its_formula(monkeypatch, radius):
    monkeypatch.setattr(buckets, "PART", 2**17)  # cuts the large one
    model = Bag()
    model.matrix.data = model.matrix.data.double()
    shared = {"momentum": 0.8, "kl_radius": radius}
    groups = [
        {"params": [model.vector, model.matrix, model.empty], "lr": 0.3, "weight_decay": 0.1, **shared},
        {"params": [model.scalar, model.conv, model.large], "lr": 0.1, "maximize": True, **shared},
    ]
    optimizer = _optimizer(model, fishopt.DiagonalNGD, params=groups)
    values = {p: p.detach().double().clone() for p in model.parameters()}
    averages = {p: torch.zeros_like(value) for p, value in values.items()}
    counts = dict.fromkeys(values, 0)
    limited = []
    for step in range(6):
        _set_gradients(model, step)
        if step == 3:
            model.conv.grad = None
        steps, divergence = {}, 0.0
        moving = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for p, group in moving:
            counts[p] += 1
            averages[p].lerp_(p.grad.double() * (-1 if group["maximize"] else 1), 1 - 0.8)
            damped = optimizer.state[p]["preconditioner"].double() ** -2
            steps[p] = group["lr"] * averages[p] / (1 - 0.8 ** counts[p]) / damped
            divergence += float((steps[p].square() * damped).sum()) / 2
        limited.append(divergence > radius)
        for p, group in moving:
            values[p].mul_(1 - group["lr"] * group["weight_decay"])
            values[p].sub_(steps[p] / max(1.0, math.sqrt(divergence / radius)))
        optimizer.step()
    assert set(limited) == {radius < 1}
    for p, value in values.items():
        torch.testing.assert_close(p.detach().double(), value, rtol=2e-5, atol=2e-6)


def test_parts_hold_each_entry_once_and_are_cut_alike(monkeypatch):
    monkeypatch.setattr(buckets, "PART", 2**17)
    sizes = [(300, 1001), (7,), (), (0,), (500, 301), (2**17,), (3,)]
    tensors = [torch.arange(math.prod(size), dtype=torch.float32).view(size) for size in sizes]
    tensors.append(torch.zeros(600, 400).t())  # not contiguous: in one piece
    copies = [x.clone() for x in tensors]
    found = list(buckets.in_parts(tensors, copies))
    assert all(torch.equal(a, b) for part in found for a, b in zip(*part, strict=True))
    assert all(sum(x.numel() for x in part[0]) <= 2**17 for part in found[:-1])
    for part in found:
        for listed in part:
            for x in listed:
                x.add_(1)
    for x, shape in zip(tensors[:-1], sizes, strict=True):
        assert torch.equal(x, torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert (tensors[-1] == 1).all()


# --- both ---


class _NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", BOTH)
def test_nothing_is_read_on_the_host(kind):
    model = Bag()
    optimizer = _optimizer(model, kind, weight_decay=0.1)
    for step in range(3):
        _set_gradients(model, step)
        with _NoSync():
            optimizer.step()


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is not torch.ops.aten.as_strided.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", BOTH)
def test_operations_do_not_grow_with_the_number_of_parameters(kind):
    counts = []
    for layers in (1, 20):
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])
        optimizer = _optimizer(model, kind)
        for step in range(2):
            _set_gradients(model, step)
            with _Count() as count:
                optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]
    assert counts[0] <= 18


@pytest.mark.parametrize("kind", BOTH)
def test_a_state_loaded_in_the_middle_continues_bit_for_bit(kind):
    """Also into an optimizer that has stepped, whose buckets and samples are of other tensors."""
    fast = {"lr": 0.05, "clip": 0.5} if kind is fishopt.FisherAdam else {"lr": 0.1, "kl_radius": 1e-3}
    models = Bag(), Bag()
    optimizers = [_optimizer(model, kind, **fast) for model in models]
    for step in range(4):
        _set_gradients(models[0], step)
        _set_gradients(models[1], 50 + step, scale=3.0)
        for optimizer in optimizers[: 1 if step == 3 else 2]:
            optimizer.step()
    file = io.BytesIO()
    torch.save([models[0].state_dict(), optimizers[0].state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    models[1].load_state_dict(weights)
    optimizers[1].load_state_dict(state)
    for step in range(4, 8):
        for model, optimizer in zip(models, optimizers, strict=True):
            _set_gradients(model, step)
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_that_change_groups_take_the_new_ones_settings(kind):
    """By hand, between two steps, as some schedules of unfreezing do."""
    model = Bag(("vector", "matrix"))
    optimizer = _optimizer(model, kind, params=[{"params": [model.vector], "lr": 0.1}, {"params": [model.matrix]}])
    _set_gradients(model, 0)
    optimizer.step()
    first, second = optimizer.param_groups
    optimizer.param_groups[0] = {**first, "lr": 0.0, "weight_decay": 0.0}
    before = model.vector.detach().clone()
    optimizer.step()
    assert torch.equal(model.vector, before)
    optimizer.param_groups[0]["params"], second["params"], second["lr"] = [model.matrix], [model.vector], 0.1
    still = model.matrix.detach().clone()
    optimizer.step()
    assert torch.equal(model.matrix, still)
    assert not torch.equal(model.vector, before)


def test_ngd_stands_still_where_there_are_no_residuals(monkeypatch):
    """Targets met exactly: no dispersion, no gradient, no step, and no division by zero."""
    model = Bag(("vector",))
    given = Curvature.refresh
    nothing = Moment(4, 1.0, 0.0)
    monkeypatch.setattr(Curvature, "refresh", lambda *args: given(*args)._replace(moment=nothing))
    optimizer = _optimizer(model, fishopt.DiagonalNGD)
    model.vector.grad = torch.zeros_like(model.vector)
    before = model.vector.detach().clone()
    optimizer.step()
    assert torch.equal(model.vector, before)


@pytest.mark.parametrize("refreshes", [1, 2, 5])
def test_preconditioners_by_their_formula(refreshes):
    """The estimate is the same each time, so its average, corrected for its start at zero, is too."""
    fisher = Curvature.refresh(
        Bare(Bag(("vector", "matrix"))), {"all": ("vector", "matrix")}, {}, None, None, 0
    ).diagonal
    mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
    expected = {
        fishopt.FisherAdam: {k: ((f / 4).sqrt() + 0.7 * (mean / 4).sqrt() + 1e-8).square() for k, f in fisher.items()},
        fishopt.DiagonalNGD: {k: (f + 0.7 * mean).rsqrt() for k, f in fisher.items()},
    }
    for kind, preconditioners in expected.items():
        model = Bag(("vector", "matrix"))
        optimizer = _optimizer(model, kind, damping=0.7)
        for _ in range(refreshes - 1):
            optimizer.refresh(torch.zeros(1))
        for name, p in model.named_parameters():
            torch.testing.assert_close(optimizer.state[p]["preconditioner"].detach(), preconditioners[name].detach())


class Bare:
    """All of a Curvature that the estimates given here look at."""

    def __init__(self, model):
        self._model = model


def test_estimates_that_are_not_finite_are_seen():
    fine = torch.tensor([1.0, 2.0])
    assert _all_finite([fine, torch.tensor([3])])
    for value in (math.nan, math.inf, -math.inf, 1e30):  # whose square is infinite
        assert not _all_finite([fine, torch.tensor([0.0, value])])


def test_averages_lie_in_memory_as_their_parameter_does():
    """Whatever the estimate's layout: the fused kernel is for tensors laid out alike."""
    p = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    state = {}
    averaged({"p": torch.ones(4, 6, 3, 3)}, {"p": p}, {"p": state}, {"p": 0.9})
    assert state["exp_avg"].stride() == state["fisher"].stride() == p.stride() != torch.ones(4, 6, 3, 3).stride()
