"""Working with `torch.amp.GradScaler`, which hands over its scale for the step to deal with."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fishopt.optim.recorder import Record


class LossScale:
    """A forward hook on the loss module: what the loss is multiplied by is the gradient that arrives at it.

    A GradScaler hands its scale over to `step`, but not once the user has called ``unscale_``. With gradient
    accumulation a mean is taken to be made of shares that add up to one, times the scale, and a sum of parts with the
    scale each. Copied or pickled along with the loss it is a new one, which nobody reads.
    """

    def __init__(self) -> None:
        self._scale: Tensor | None = None

    @_disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Watches a loss that can be differentiated."""
        if isinstance(output, Tensor) and output.requires_grad and output.ndim == 0:
            output.register_hook(partial(self._keep, module.reduction == "mean"))

    def is_one(self) -> bool:
        """Whether the loss module tells that nothing was scaled since the last step."""
        return self._scale is not None and math.isclose(float(self._scale), 1.0, rel_tol=1e-3)

    def take(self) -> Tensor | None:
        """The scale of the gradients since the last step; None if they did not come by way of this loss module."""
        scale, self._scale = self._scale, None
        return scale

    def _keep(self, adds: bool, gradient: Tensor) -> None:
        self._scale = gradient.detach() if self._scale is None or not adds else self._scale + gradient.detach()

    def __reduce__(self) -> tuple[type[LossScale], tuple[()]]:
        return LossScale, ()


def unscale(optimizer: torch.optim.Optimizer, record: Record | None, at_loss: Tensor | None) -> bool:
    """Takes a GradScaler's scale out of the gradients, and of the recorded gradient at the output.

    Args:
        optimizer: The optimizer that the GradScaler steps.
        record: The last training forward.
        at_loss: The scale by the gradient at the loss, which tells it where the GradScaler does not.

    Returns:
        Whether to go on: False if a gradient overflowed, and the step is to be skipped.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is None:  # no GradScaler
        return True
    if found_inf.item():
        return False
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:  # the user has called unscale_: the gradients are done, and the scale is not handed over
        _unscale_record(record, at_loss)
        return True
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_div_(grads, scale.item())
    _unscale_record(record, scale)
    return True


def _unscale_record(record: Record | None, scale: Tensor | None) -> None:
    if record is None or record.gradient is None:
        return
    # In float32 at least: divided by the scale, a small gradient in float16 would vanish.
    wide = torch.promote_types(record.gradient.dtype, torch.float32)
    record.gradient = None if scale is None else record.gradient.to(wide) / scale
