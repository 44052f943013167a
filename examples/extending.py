"""What you can add to fishopt, each in one small piece: an estimator, a layer's rule, an update rule.

A likelihood, the fourth, is in `custom_likelihood.py`. Each piece is registered or subclassed here, and nothing else of
fishopt is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fishopt
from fishopt.estimators import Cotangents, Draw, estimator
from fishopt.likelihoods import normal
from fishopt.optim import checks
from fishopt.optim.averages import Average
from fishopt.optim.base import FisherOptimizer
from fishopt.optim.buckets import Bucket
from fishopt.optim.estimate import Moment
from fishopt.passes.gradients import Formed, PerInput
from fishopt.passes.rules import rule


@estimator("gauss")
def gaussian_vectors(likelihood: fishopt.Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """``S z`` with normal z: without bias, since E[z z^T] is the identity, but with more variance than random signs."""
    z = normal((draw.samples, *h.shape), h, draw.generator)
    return Cotangents(likelihood.apply_factor(h, z) / draw.samples**0.5)


@rule([functional.bilinear], "input1 input2 weight bias", "input1 input2", "weight bias")
def bilinear(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """``z_o = a^T W_o b + bias_o``: one outer product of three for each input."""
    if operand == "bias":
        return Formed(g)
    return Formed(torch.einsum("kno,ni,nj->knoij", g, call.input1**power, call.input2**power))


class PartiallyAdaptive(FisherOptimizer):
    """``m / (F/B + eps)^power``, between momentum (0) and Adam's form (1/2), as Padam has it (Chen et al., 2020).

    Args:
        model: The network.
        likelihood: The loss module in use.
        lr: Learning rate.
        momentum: Decay rate, per step, of the moving average of the gradient.
        decay: Decay rate, per refresh, of the moving average of the Fisher diagonal.
        power: See above.
        eps: See above.
        **options: As in `fishopt.FisherAdam`: ``refresh_every``, ``generator`` and others.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: fishopt.Likelihood | nn.Module | str,
        *,
        params: Any = None,
        lr: float = 0.02,
        momentum: float = 0.9,
        decay: float = 0.95,
        power: float = 0.25,
        eps: float = 1e-8,
        estimator: str = "auto",
        **options: Any,
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "decay": decay, "power": power, "eps": eps, "estimator": estimator}
        super().__init__(model, likelihood, params, own, **options)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "power", "eps"):
            checks.number(name, group[name])
        for name in ("momentum", "decay"):
            checks.number(name, group[name], high=1.0)

    def _decay(self, group: dict[str, Any]) -> float:
        return float(group["decay"])

    def _preconditioner(self, fisher: Average, group: dict[str, Any], state: dict[str, Any], moment: Moment) -> Tensor:
        unit = moment.scale**2 * moment.dispersion / moment.batch_size  # makes F the loss's second moment
        return fisher.values.mul_(fisher.correction * unit).add_(group["eps"]).pow_(-group["power"])

    def _update(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            bucket.advance()
            momentum = bucket.group["momentum"]
            params, averages = bucket.widened(bucket.params), bucket.kept("exp_avg")
            torch._foreach_lerp_(averages, bucket.widened(bucket.grads()), 1 - momentum)
            steps = torch._foreach_mul(averages, bucket.kept("preconditioner"))
            torch._foreach_add_(params, steps, alpha=-float(bucket.group["lr"]) / (1 - momentum**bucket.step))
            bucket.narrow(bucket.params, params)


class Product(nn.Module):
    """A network with a layer that fishopt has no rule for."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.pairs, self.last = nn.Bilinear(4, 4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.pairs(x, x)))


def main(steps: int = 300) -> None:
    """Trains the network with all of them, and prints what it used."""
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2] * x[:, 3], x[:, 0] * x[:, 3]], 1).argmax(1)
    model, loss_fn = Product(), nn.CrossEntropyLoss()
    optimizer = PartiallyAdaptive(model, loss_fn, estimator="gauss")
    for step in range(steps):
        rows = torch.randint(0, 512, (64,))
        optimizer.zero_grad()
        loss = loss_fn(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    print(optimizer.report())


if __name__ == "__main__":
    main()
