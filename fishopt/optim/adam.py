"""FisherAdam: Adam's update with the Fisher diagonal in the place of the squared gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.checks import check_flag
from fishopt.likelihoods import Likelihood
from fishopt.optim import checks
from fishopt.optim.averages import Average
from fishopt.optim.averaging import schedule_free_update
from fishopt.optim.buckets import Bucket
from fishopt.optim.estimate import Moment
from fishopt.optim.fused import adamw_with_frozen_square, can_fuse, laid_out_as, unlimited
from fishopt.optim.sampling import Sample
from fishopt.optim.schedule_free import ScheduleFree
from fishopt.optim.units import Params

LR, AVERAGED_LR = 1e-3, 6e-3
"""Default learning rates, of single iterates and of averaged ones: the latter is what the benchmarks' tuning range is
centred at, and the largest that a deep ReLU network without normalisation bears."""


class FisherAdam(ScheduleFree):
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
        lr: Learning rate; if None 1e-3, AdamW's own, or with ``schedule_free`` 6e-3, as an average stands larger steps.
        betas: Decay rates of the moving averages: of the gradient, per step, and of the Fisher diagonal, per refresh.
        eps: Added to the denominator.
        damping: Damping relative to the layer's own root mean Fisher diagonal.
        clip: Limit on the root mean square of each tensor's update, before ``lr``: without one the first steps diverge,
            as the Fisher diagonal of an untrained network is tiny. A safeguard, not a normaliser: of a large float32
            tensor a regular sample is measured, a 61st of it but at least 8192 entries.
        weight_decay: Decoupled weight decay, as in AdamW.
        schedule_free: Average the iterates instead of decaying ``lr`` (Defazio et al., 2024): gradients are taken
            between the last iterate and the average, ``betas[0]`` of the way, without other momentum. The parameters
            hold the average while the model is called in eval mode without gradients, and from there until the next
            training forward; see `eval` and `train` for other occasions. Not between a forward and its backward, whose
            weights that would change: evaluate before or after both. Weights that the model loads are evaluated as
            they are.
        warmup: With ``schedule_free``, the steps in which the learning rate rises to ``lr``. Such steps are long, and
            the first ones may take a network to where it is slow to come back from.
        estimator: ``"auto"``, ``"I1"``, ``"I2"``, ``"exact"``, ``"hutchinson"`` or ``"empirical"``.
        criterion: How ``"auto"`` chooses, see `select_estimators`: ``"efficiency"`` (variance x cost, of I1, I2,
            hutchinson and exact), ``"bound"`` or ``"exact"`` (I1 against I2).
        refresh_every: The most steps between estimates. At first each step has one, and as training goes on they come
            ever more rarely, about every tenth of the steps so far.
        refresh_inputs: Inputs of the batch that an estimate uses; if None 16, or where each has labels at several
            positions as many as have about 256 labels, between 4 and 16.
        scale: Where the size of F is from; its shape is the model's in any case. ``"likelihood"``: the model as well.
            ``"dispersion"``: times the labels' squared residuals over what the model expects of them.
            ``"gradient"``: each layer's mean of F/B is the moving average of its training gradients' mean square.
            ``"auto"``: ``"dispersion"`` for ``nn.MSELoss``; ``"gradient"`` where an input has labels at several
            positions, which are not as independent as the likelihood has them; else ``"likelihood"``. A `Gaussian`
            whose variance is to be estimated has it estimated under any.
        maximize: Ascend instead.
        output: Picks the natural parameters from what the model returns, where that is not they alone: a function, a
            key such as ``"logits"``, or an attribute's name.
        generator: Source of labels and sub-batches; one of its own, seeded with ``torch.initial_seed()``, if None.

    Raises:
        ValueError: If an argument is out of range or does not fit the model.
        TypeError: If an argument is of the wrong kind.
    """

    _grafts_by_default = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module | str,
        *,
        params: Params = None,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        damping: float = 0.1,
        clip: float = 1.0,
        weight_decay: float = 1e-2,
        schedule_free: bool = False,
        warmup: int = 100,
        estimator: str = "auto",
        criterion: str = "efficiency",
        refresh_every: int = 50,
        refresh_inputs: int | None = None,
        scale: str = "auto",
        maximize: bool = False,
        output: Callable[[Any], Any] | str | int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr if lr is not None else AVERAGED_LR if schedule_free is True else LR,
            "betas": betas,
            "eps": eps,
            "damping": damping,
            "clip": clip,
            "weight_decay": weight_decay,
            "schedule_free": schedule_free,
            "warmup": warmup,
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
            output=output,
            generator=generator,
            scale=scale,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_flag("maximize", group["maximize"])
        check_flag("schedule_free", group["schedule_free"])
        checks.pair("betas", group["betas"])
        checks.whole("warmup", group["warmup"], low=0)
        for name in ("lr", "eps", "damping", "weight_decay"):
            checks.number(name, group[name])
        checks.number("clip", group["clip"], above=True, infinite=True)

    def _decay(self, group: dict[str, Any]) -> float:
        return float(group["betas"][1])

    def _preconditioner(self, fisher: Average, group: dict[str, Any], state: dict[str, Any], moment: Moment) -> Tensor:
        # Var of the batch's gradient: that of the mean NLL is F/B, times the loss's scale and dispersion.
        factor = torch.full_like(fisher.layer, moment.scale**2 * moment.dispersion / moment.batch_size)
        if fisher.energy is not None and (self._scale == "gradient" or moment.positions > 1):
            tiny = torch.finfo(factor.dtype).tiny
            known = (fisher.energy > tiny) & (fisher.layer > tiny)
            factor = torch.where(known, fisher.energy / fisher.layer, factor)
        least = (fisher.layer * factor).sqrt().mul_(group["damping"]).add_(group["eps"])
        # Not zero, which no gradient may be divided by, nor is its square.
        least.clamp_min_(torch.finfo(least.dtype).tiny ** 0.5)
        root = fisher.values.sqrt_()
        denominator = torch.addcmul(least, root, (factor * fisher.correction).sqrt(), out=root)
        # Squared, as Adam keeps its second moment.
        return denominator.reciprocal_() if group["schedule_free"] else denominator.square_()

    def _update(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            bucket.advance()
            (schedule_free_update if bucket.group["schedule_free"] else adam_update)(bucket)


def adam_update(bucket: Bucket) -> None:
    """One step in place: average, correct for the start, precondition, clip, decay, move."""
    params, grads = bucket.widened(bucket.params), bucket.widened(bucket.grads())
    averages, squares = bucket.kept("exp_avg"), bucket.kept("preconditioner")
    is_fused = can_fuse(params, averages, squares, bucket.group["betas"][0])
    (_fused if is_fused else _in_turn)(bucket, params, grads, averages, squares)
    bucket.narrow(bucket.params, params)


def _fused(
    bucket: Bucket, params: list[Tensor], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor]
) -> None:
    group, step, beta = bucket.group, bucket.step, bucket.group["betas"][0]
    grads = laid_out_as(params, grads)
    if group["clip"] == math.inf:
        counts = unlimited(params)
    else:
        sample = bucket.measured(Sample, averages, squares)
        counts = sample.counts(grads, beta, group["clip"] * (1 - beta**step))
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    adamw_with_frozen_square(
        params, grads, averages, squares, lr=lr, beta=beta, weight_decay=weight_decay, step=step, counts=counts
    )


def _in_turn(
    bucket: Bucket, params: list[Tensor], grads: list[Tensor], averages: list[Tensor], squares: list[Tensor]
) -> None:
    group, step = bucket.group, bucket.step
    lr, beta, clip, weight_decay = float(group["lr"]), group["betas"][0], group["clip"], group["weight_decay"]
    torch._foreach_lerp_(averages, grads, 1 - beta)
    correction = 1 - beta**step
    directions = list(torch._foreach_sqrt(squares))
    torch._foreach_reciprocal_(directions)
    torch._foreach_mul_(directions, averages)
    if clip != math.inf:
        excess = torch._foreach_norm(directions)
        torch._foreach_div_(excess, [clip * correction * math.sqrt(max(p.numel(), 1)) for p in params])
        torch._foreach_clamp_min_(excess, 1.0)
        torch._foreach_div_(directions, excess)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, directions, alpha=-lr / correction)
