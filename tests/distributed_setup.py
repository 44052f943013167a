"""What tests of several processes share: a model, each process's data, and how runs are compared."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fishopt
from tests.asserts import assert_close
from tests.ranks import gathered

KINDS = {"adam": fishopt.FisherAdam, "ngd": fishopt.DiagonalNGD}
FAST = {"adam": {"lr": 1e-2, "eps": 0.0}, "ngd": {"lr": 3e-2, "kl_radius": 1e-4}}
NEWEST = {"adam": {"betas": (0.9, 0.0)}, "ngd": {"decay": 0.0}}
ALL = 10**6
LOSSES = {
    "ce": (nn.CrossEntropyLoss, "mean"),
    "ce sum": (nn.CrossEntropyLoss, "sum"),
    "mse": (nn.MSELoss, "mean"),
    "mse sum": (nn.MSELoss, "sum"),
    "bce": (nn.BCEWithLogitsLoss, "mean"),
    "bce sum": (nn.BCEWithLogitsLoss, "sum"),
}
both = pytest.mark.parametrize("kind", KINDS)


def _loss(name):
    kind, reduction = LOSSES[name]
    return kind(reduction=reduction)


def _model(act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, 3)).double()


def _data(step, rank, loss="ce", count=6):
    """One process's batch."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    scores = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    if loss.startswith("ce"):
        return x, scores.argmax(1)
    return x, scores if loss.startswith("mse") else (scores > 0).double()


def _union(step, loss="ce", count=6):
    parts = [_data(step, rank, loss, count) for rank in range(dist.get_world_size())]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _optimizer(kind, model, loss, **options):
    return KINDS[kind](model, loss, **FAST[kind], **options)


def _step(model, optimizer, loss, batch):
    optimizer.zero_grad()
    loss(model(batch[0]), batch[1]).backward()
    optimizer.step()


def _plain(model):
    return {name.replace("module.", "").replace("_orig_mod.", ""): p.detach() for name, p in model.named_parameters()}


def _averages(optimizer, key="fisher"):
    return {name: optimizer.state[p][key] for p, name in optimizer._name_of.items() if p in optimizer.state}


def _assert_alike(model, optimizer):
    """Parameters and state are the same bit for bit in all processes."""
    own = [_plain(model), _averages(optimizer), _averages(optimizer, "preconditioner"), list(optimizer._moment)]
    own.append([optimizer._curvature.state_dict()[key] for key in ("noise", "choices", "history", "failures")])
    assert len({repr(_listed(one)) for one in gathered(own)}) == 1


def _listed(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else value


def _as_one(kind, loss, model, optimizer, other, reference):
    """A trained model is as one that was trained by one process on the union."""
    assert_close(_plain(model), _plain(other), rtol=1e-9)
    assert_close(_averages(optimizer), _averages(reference), rtol=1e-9)
    assert optimizer._moment.batch_size == reference._moment.batch_size
    # DistributedDataParallel has the mean over processes of what one process would have summed.
    share = dist.get_world_size() if loss.reduction == "sum" else 1
    assert optimizer._moment.scale * share == pytest.approx(reference._moment.scale, rel=1e-12)
    assert optimizer._moment.dispersion == pytest.approx(reference._moment.dispersion, rel=1e-9)
