"""DiagonalNGD: the natural gradient with the diagonal of the Fisher information, inside a trust region."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.checks import check_flag
from fishopt.likelihoods import Likelihood
from fishopt.optim import checks
from fishopt.optim.atomic import Transaction
from fishopt.optim.auto import START, AutoStep, check_auto, refuse_distributed, refuse_scaler
from fishopt.optim.averages import Average
from fishopt.optim.base import FisherOptimizer
from fishopt.optim.buckets import Bucket, Members, in_parts
from fishopt.optim.estimate import TINY, Estimate, Moment
from fishopt.optim.units import Params
from fishopt.passes import streams_kept


class DiagonalNGD(FisherOptimizer):
    r"""Natural gradient: ``m / (F + damping * peak mean F)``, no longer than a predicted KL divergence allows.

    A step ``d`` changes the model's predictions by ``KL = d^T F d / 2`` per input, to second order. The whole step is
    scaled down to keep that, with the damped F, at most ``kl_radius``; ``lr`` is the step without that limit.

    The damping is relative to the peak, over training, of the model's mean Fisher diagonal: in classification F goes to
    zero as the predictions become certain, and steps by an ever smaller F would grow without bound. With ever more
    damping the step turns into the direction of gradient descent.

    Args:
        model: The network, whose output is the natural parameters of the likelihood.
        likelihood: The loss module in use, a `Likelihood`, or its name. For ``nn.MSELoss`` the labels' variance is
            estimated from the residuals; pass a `Gaussian` to fix it.
        params: The parameters to train, or parameter groups, as with torch.optim; all of the model's if None. Groups
            are then the units that an estimator is chosen for, and may name their own ``"estimator"``.
        lr: Learning rate. With ``"auto"`` there is none to tune: each step minimises a quadratic model of the loss over
            its size and the momentum, on the inputs trained on, and is undone where the loss rises. Where batches
            differ, the models are averaged. Call the loss module that you passed, or pass a closure to ``step``: one
            without noise, in full precision, as losses that differ by rounding alone are what steps are judged by near
            a minimum. A group's ``"lr"`` is then a factor of the step, 1 unless a scheduler changes it; ``momentum``
            and ``kl_radius`` play no part.
        momentum: Decay rate, per step, of the moving average of the gradient.
        decay: Decay rate, per refresh, of the moving average of the Fisher diagonal.
        damping: Damping relative to the peak of the model's mean Fisher diagonal; with ``lr="auto"`` to its present
            mean, as steps cannot grow without bound then.
        kl_radius: The largest predicted KL divergence of a step (nats per input).
        weight_decay: Decoupled weight decay, as in AdamW; with ``lr="auto"`` a penalty in the loss,
            ``weight_decay / 2`` times the squares of the parameters.
        estimator: ``"auto"``, ``"I1"``, ``"I2"``, ``"exact"``, ``"hutchinson"`` or ``"empirical"``.
        criterion: How ``"auto"`` chooses, see `select_estimators`: ``"efficiency"`` (variance x cost, of I1, I2,
            hutchinson and exact), ``"bound"`` or ``"exact"`` (I1 against I2).
        refresh_every: The most steps between estimates. At first each step has one, and as training goes on they come
            ever more rarely, about every tenth of the steps so far.
        refresh_inputs: Inputs of the batch that an estimate uses; if None 16, or where each has labels at several
            positions as many as have about 256 labels, between 4 and 16.
        maximize: Ascend instead.
        output: Picks the natural parameters from what the model returns, where that is not they alone: a function, a
            key such as ``"logits"``, or an attribute's name.
        generator: Source of labels and sub-batches; one of its own, seeded with ``torch.initial_seed()``, if None.

    Raises:
        ValueError: If an argument is out of range or does not fit the model.
        TypeError: If an argument is of the wrong kind.
    """

    _scalars = ("peak",)
    _renewed: tuple[str, ...] = ("_auto",)

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module | str,
        *,
        params: Params = None,
        lr: float | Tensor | str = 1e-3,
        momentum: float = 0.9,
        decay: float = 0.95,
        damping: float = 0.1,
        kl_radius: float = 1e-6,
        weight_decay: float = 0.0,
        estimator: str = "auto",
        criterion: str = "efficiency",
        refresh_every: int = 20,
        refresh_inputs: int | None = None,
        maximize: bool = False,
        output: Callable[[Any], Any] | str | int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        is_auto = isinstance(lr, str) and lr == "auto"
        defaults = {
            "lr": 1.0 if is_auto else lr,
            "auto": START if is_auto else None,
            "momentum": momentum,
            "decay": decay,
            "damping": damping,
            "kl_radius": kl_radius,
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
            output=output,
            generator=generator,
        )
        self._auto: AutoStep | None = None
        self._recorder.wants_loss = is_auto
        if is_auto:
            refuse_distributed(model)

    @property
    def _is_auto(self) -> bool:
        return self.param_groups[0]["auto"] is not None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._recorder.wants_loss = self._is_auto

    def _check_group(self, group: dict[str, Any]) -> None:
        check_flag("maximize", group["maximize"])
        for name in ("momentum", "decay"):
            checks.number(name, group[name], high=1.0)
        for name in ("lr", "weight_decay"):
            checks.number(name, group[name])
        if group["auto"] is not None:
            check_auto(group)
        checks.number("damping", group["damping"], above=True)
        checks.number("kl_radius", group["kl_radius"], above=True, infinite=True)

    def _decay(self, group: dict[str, Any]) -> float:
        return float(group["decay"])

    def _preconditioner(self, fisher: Average, group: dict[str, Any], state: dict[str, Any], moment: Moment) -> Tensor:
        is_first = "peak" not in state or group["auto"] is not None
        peak = fisher.model.clone() if is_first else torch.maximum(fisher.model, state["peak"])
        state["peak"] = peak
        least = (peak * group["damping"]).clamp_min_(torch.finfo(peak.dtype).tiny).mul_(moment.scale)
        values = fisher.values
        # The root of what the gradient is divided by: the length of m times it is the step's divergence.
        return torch.add(least, values, alpha=fisher.correction * moment.scale, out=values).rsqrt_()

    def _can_step(self, members: Members) -> bool:
        if self._is_auto:
            refuse_scaler(self)
        return super()._can_step(members)

    def _may_wait(self, members: Members) -> bool:
        return self._is_auto or super()._may_wait(members)  # a search waits for the device in any case

    def _prepared(
        self,
        estimate: Estimate | None,
        members: Members,
        closure: Callable[[], Any] | None,
        loss: Any,
        transaction: Transaction,
    ) -> Estimate | None:
        if not self._is_auto:
            return estimate
        if self._auto is None:
            known = None if self._curvature.estimates_noise else self._recorder.likelihood
            self._auto = AutoStep(self._model, self._readout, known)
        objective = self._auto.objective(self._recorder.records, closure, loss)
        if estimate is not None:
            # Before the search, which needs it; the search may fail.
            transaction.on_failure(self._restorer())
            self._take(estimate, trained=True)
        if buckets := self._sorted(members).buckets:
            self._follow_model()
            with streams_kept(p.device for p in self._model.parameters()):
                self._auto.search(buckets, self._name_of, self.param_groups[0]["auto"], objective, transaction)
        return None

    def _restorer(self) -> Callable[[], None]:
        before, moment = {p: _copied(state) for p, state in self.state.items()}, self._moment

        def restore() -> None:
            self.state.clear()
            self.state.update(before)
            self._moment, self._sorting = moment, None

        return restore

    def _update(self, buckets: list[Bucket]) -> None:
        if not self._is_auto:
            self._descend(buckets)
        elif self._auto is not None and buckets:
            self._auto.take(buckets, self.param_groups[0])

    def _descend(self, buckets: list[Bucket]) -> None:
        """Moves by the learning rate, within the trust region."""
        moves, lengths = [], []
        for bucket in buckets:
            group = bucket.group
            bucket.advance()
            parts = list(in_parts(bucket.params, bucket.grads(), bucket.kept("exp_avg"), bucket.kept("preconditioner")))
            norms: list[Tensor] = []
            for _, grads, averages, roots in parts:
                torch._foreach_lerp_(averages, bucket.widened(grads), 1 - group["momentum"])
                norms += torch._foreach_norm(torch._foreach_mul(averages, roots))
            rate = float(group["lr"]) / (1 - group["momentum"] ** bucket.step)  # corrects for the start at zero
            # d^T (F + damping) d = lr^2 m^T m / (F + damping), without another look at F.
            # Without residuals there is no dispersion: any step is too long then, but the gradient is zero as well.
            radius = 2 * group["kl_radius"] * self._moment.scale * max(self._moment.dispersion, TINY)
            lengths.append(torch.stack(norms).mul_(rate / math.sqrt(radius)))
            moves.append((bucket, parts, rate))
        if not moves:
            return
        length = torch.linalg.vector_norm(torch.cat([x.to(lengths[0].device) for x in lengths]))
        scale = length.clamp_min_(1.0).reciprocal_()
        for bucket, parts, rate in moves:
            group = bucket.group
            for params, _, averages, roots in parts:
                moved = bucket.widened(params)
                steps = torch._foreach_mul(averages, roots)
                torch._foreach_mul_(steps, scale.to(steps[0].device))
                if group["weight_decay"]:
                    torch._foreach_mul_(moved, 1 - float(group["lr"]) * group["weight_decay"])
                torch._foreach_addcmul_(moved, steps, roots, value=-rate)
                bucket.narrow(params, moved)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
