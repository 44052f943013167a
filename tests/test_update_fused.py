"""The plain step of FisherAdam against its formula: fused and not, clipped and not, whatever the layouts."""

import math

import pytest
import torch

from fishopt.optim import fused, sampling
from fishopt.optim.curvature import Curvature
from tests.update_setup import SHAPES, Bag, _given, _optimizer, _set_gradients


@pytest.fixture(autouse=True)
def _estimates_are_given(monkeypatch):
    monkeypatch.setattr(Curvature, "refresh", _given)


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
    counts = sampling.Sample([m], [v]).counts([g], beta, limit)
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
    stride = sampling._stride(x)
    assert stride % 2 == 1
    assert stride <= 61
    part = sampling._blocks(x, stride) if stride > 1 else x
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
