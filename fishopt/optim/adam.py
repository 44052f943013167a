"""FisherAdam: Adam's update with the Fisher diagonal in the place of the squared gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.likelihoods import Likelihood
from fishopt.optim import checks
from fishopt.optim.base import FisherOptimizer, Means, Work
from fishopt.optim.curvature import Moment
from fishopt.optim.units import Params


class FisherAdam(FisherOptimizer):
    r"""Adam-like: ``m / (sqrt(F/B) + damping * rms + eps)`` with decoupled weight decay.

    ``F/B``, the Fisher diagonal over the batch size, is the second moment of the gradient that Adam's ``v`` estimates
    from the gradients themselves, so a learning rate tuned for AdamW carries over. ``rms`` is the root of the mean of
    ``F/B`` over the layer, which makes the damping carry over between layers and networks.

    Args:
        model: The network, whose output is the natural parameters of the likelihood.
        likelihood: The loss module in use, a `Likelihood`, or its name. For ``nn.MSELoss`` the labels' variance is
            estimated from the residuals; pass a `Gaussian` to fix it.
        params: The parameters to train, or parameter groups, as with torch.optim; all of the model's if None. Groups
            are then the units that an estimator is chosen for, and may name their own ``"estimator"``.
        lr: Learning rate.
        betas: Decay rates of the moving averages: of the gradient, per step, and of the Fisher diagonal, per refresh.
        eps: Added to the denominator.
        damping: Damping relative to the layer's own root mean Fisher diagonal.
        clip: Limit on the root mean square of each tensor's update, before ``lr``.
        weight_decay: Decoupled weight decay, as in AdamW.
        estimator: ``"auto"``, ``"I1"``, ``"I2"``, ``"exact"``, ``"hutchinson"`` or ``"empirical"``.
        criterion: How ``"auto"`` chooses, see `select_estimators`: ``"efficiency"`` (variance x cost), ``"bound"`` or
            ``"exact"``.
        refresh_every: Steps between estimates, after the first ten.
        refresh_inputs: Inputs of the batch that an estimate uses.
        maximize: Ascend instead.
        generator: Source of labels and sub-batches; one of its own, seeded with ``torch.initial_seed()``, if None.

    Raises:
        ValueError: If an argument is out of range or does not fit the model.
        TypeError: If an argument is of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module | str,
        *,
        params: Params = None,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        damping: float = 1.0,
        clip: float = 1.0,
        weight_decay: float = 1e-2,
        estimator: str = "auto",
        criterion: str = "efficiency",
        refresh_every: int = 10,
        refresh_inputs: int = 32,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "damping": damping,
            "clip": clip,
            "weight_decay": weight_decay,
            "estimator": estimator,
            "maximize": maximize,
        }
        super().__init__(
            model,
            likelihood,
            params,
            defaults,
            criterion=criterion,
            refresh_every=refresh_every,
            refresh_inputs=refresh_inputs,
            generator=generator,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        checks.pair("betas", group["betas"])
        for name in ("lr", "eps", "damping", "weight_decay"):
            checks.number(name, group[name])
        checks.number("clip", group["clip"], above=True, infinite=True)

    def _decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][1])

    def _preconditioner(
        self, fisher: Tensor, means: Means, group: dict[str, Any], state: dict[str, Any], moment: Moment
    ) -> Tensor:
        # Var of the batch's gradient: that of the mean NLL is F/B, times the loss's scale and dispersion.
        factor = moment.scale**2 * moment.dispersion / moment.batch_size
        denominator = (
            (fisher * factor).sqrt_().add_((means.layer * factor).sqrt() * group["damping"]).add_(group["eps"])
        )
        return denominator.reciprocal_()

    def _update(self, work: list[Work]) -> None:
        for group, params, grads, states in work:
            adam_update(
                params,
                grads,
                states,
                lr=float(group["lr"]),
                beta=group["betas"][0],
                clip=group["clip"],
                weight_decay=group["weight_decay"],
            )


def adam_update(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    *,
    lr: float,
    beta: float,
    clip: float,
    weight_decay: float,
) -> None:
    """One step in place: average, correct for the start, precondition, clip, decay, move."""
    directions = averaged(grads, states, beta)
    torch._foreach_mul_(directions, [state["preconditioner"] for state in states])
    if clip != math.inf:
        # Without a limit the first steps diverge: the Fisher diagonal of an untrained network is tiny.
        excess = torch._foreach_norm(directions)
        torch._foreach_div_(excess, [clip * math.sqrt(max(p.numel(), 1)) for p in params])
        torch._foreach_clamp_min_(excess, 1.0)
        torch._foreach_div_(directions, excess)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr)


def averaged(grads: list[Tensor], states: list[dict[str, Any]], beta: float) -> list[Tensor]:
    """The moving averages of the gradients, updated in their states and corrected for their start at zero."""
    averages = [state["exp_avg"] for state in states]
    torch._foreach_lerp_(averages, grads, 1 - beta)
    for state in states:
        state["step"] += 1
    return list(torch._foreach_div(averages, [1 - beta ** state["step"] for state in states]))
