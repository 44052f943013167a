"""Everything by its definition, in float64: full Jacobians and Hessians, every label enumerated. Nothing of fishopt."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev


@dataclass
class Derivatives:
    """h ``[N, T]``, its Jacobian and the diagonal of its Hessians ``[N, T, P]``, over all parameters in a row."""

    h: Tensor
    first: Tensor
    second: Tensor
    model: nn.Module

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Splits the last axis by parameter."""
        shapes = {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad}
        parts = flat.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        return {
            name: part.reshape((*flat.shape[:-1], *shape))
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def columns(self, names: tuple[str, ...]) -> Tensor:
        """Which entries of the last axis belong to ``names``."""
        marks = torch.arange(self.first.shape[-1])
        return torch.cat([part.flatten() for name, part in self.by_name(marks).items() if name in names])


def derivatives(model: nn.Module, inputs: tuple[Tensor, ...]) -> Derivatives:
    was_training = model.training
    modes = {m: m.training for m in model.modules()}
    model.eval()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([p.flatten() for p in trained.values()])

    def output(theta: Tensor, *x: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in trained.values()])
        values = {name: part.reshape(p.shape) for (name, p), part in zip(trained.items(), parts, strict=False)}
        return functional_call(model, values, tuple(v[None] for v in x)).reshape(-1)

    rows = list(zip(*inputs, strict=False))
    h = torch.stack([output(flat, *x) for x in rows])
    first = torch.stack([jacrev(output)(flat, *x) for x in rows])
    second = torch.stack([hessian(output)(flat, *x).diagonal(dim1=-2, dim2=-1) for x in rows])
    for module, mode in modes.items():
        module.training = mode
    assert model.training == was_training
    return Derivatives(h.detach(), first.detach(), second.detach(), model)


def labels(family: str, h: Tensor) -> tuple[Tensor, Tensor]:
    """Sufficient statistics of all labels ``[K, N, T]`` and their probabilities ``[K, N]``.

    Unbounded labels: Poisson counts up to where the rest weighs 1e-16; Gaussian labels at the nodes of a Gauss-Hermite
    rule, exact for the polynomials of degree eight or less that variances of squared scores are made of.
    """
    n, t = h.shape
    if family == "categorical":
        return torch.eye(t, dtype=h.dtype)[:, None, :].expand(t, n, t), h.softmax(-1).T
    if family == "bernoulli":
        statistic = torch.tensor([0.0, 1.0], dtype=h.dtype)[:, None, None].expand(2, n, t)
        log_weights = torch.stack([nn.functional.logsigmoid(-h), nn.functional.logsigmoid(h)])
    elif family == "poisson":
        y = torch.arange(0.0, 60 + 12 * float(h.exp().max()), dtype=h.dtype)[:, None, None]
        statistic = y.expand(-1, n, t)
        log_weights = y * h - h.exp() - torch.lgamma(y + 1)
    else:
        nodes, weights = np.polynomial.hermite_e.hermegauss(6)
        z = torch.tensor(nodes)[:, None, None]
        statistic = (h + math.sqrt(0.7) * z) / 0.7
        log_weights = torch.tensor(weights / weights.sum()).log()[:, None, None].expand(-1, n, t)
    return _product(statistic, log_weights, keep=1e-18)


def _product(statistic: Tensor, log_weights: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Joint labels of independent outputs, all combinations that weigh more than ``keep`` for some input."""
    count, _n, t = statistic.shape
    likely = [k for k in range(count) if float(log_weights[k].max()) > math.log(keep)]
    index = torch.tensor(list(itertools.product(likely, repeat=t)))
    joint = torch.stack([statistic[index[:, a], :, a] for a in range(t)], dim=-1)
    weights = sum(log_weights[index[:, a], :, a] for a in range(t))
    return joint, weights.exp()


@dataclass
class Moments:
    """Exact moments per input: the statistic's, eta ``[N, T]`` and I ``[N, T, T]``, both estimators' ``[N, P]``."""

    eta: Tensor
    covariance: Tensor
    fisher: Tensor
    mean_i1: Tensor
    v1: Tensor
    mean_i2: Tensor
    v2: Tensor


def moments(d: Derivatives, family: str) -> Moments:
    statistic, weights = labels(family, d.h)
    eta = (weights[..., None] * statistic).sum(0)
    z = eta - statistic
    covariance = torch.einsum("kn,kna,knb->nab", weights, z, z)
    fisher = torch.einsum("nap,nab,nbp->np", d.first, covariance, d.first)
    mean_i1 = mean_i2 = v1 = v2 = torch.zeros_like(fisher)
    for zk, wk in zip(z, weights, strict=False):
        i1 = torch.einsum("nap,na->np", d.first, zk).square()
        i2 = fisher + torch.einsum("nap,na->np", d.second, zk)
        mean_i1 = mean_i1 + wk[:, None] * i1
        mean_i2 = mean_i2 + wk[:, None] * i2
    for zk, wk in zip(z, weights, strict=False):
        i1 = torch.einsum("nap,na->np", d.first, zk).square()
        i2 = fisher + torch.einsum("nap,na->np", d.second, zk)
        v1 = v1 + wk[:, None] * (i1 - mean_i1).square()
        v2 = v2 + wk[:, None] * (i2 - mean_i2).square()
    return Moments(eta, covariance, fisher, mean_i1, v1, mean_i2, v2)


def hutchinson_variance(d: Derivatives, m: Moments, family: str) -> Tensor:
    """The variance of ``(eps^T S^T d_i h)^2`` over all sign vectors; it depends on which factor S is taken."""
    if family == "categorical":
        sigma = d.h.softmax(-1)
        root = torch.diag_embed(sigma.sqrt()) - sigma[:, :, None] * sigma.sqrt()[:, None, :]
    else:
        root = torch.diag_embed(m.covariance.diagonal(dim1=1, dim2=2).sqrt())
    torch.testing.assert_close(root @ root.mT, m.covariance)
    t = d.h.shape[1]
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=t)), dtype=d.h.dtype)
    q = torch.einsum("nap,nab,kb->knp", d.first, root, signs).square()
    return (q - q.mean(0)).square().mean(0)
