"""Working with `torch.amp.GradScaler`, which hands over its scale for the step to deal with."""

from __future__ import annotations

import torch
from torch import Tensor

from fishopt.optim.record import Record


def has_overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has found a gradient infinite or NaN, so that the step is to be skipped."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def unscale_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Takes a GradScaler's scale out of the gradients."""
    scale = handed_over(optimizer)
    if scale is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, scale.item())


def handed_over(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """The scale that a GradScaler leaves to the step; None if there is none, or ``unscale_`` has been called."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return scale


def plain_gradient(optimizer: torch.optim.Optimizer, record: Record) -> Tensor | None:
    """The gradient at the output that the loss itself has, as if it was not multiplied by anything.

    By the gradient at the loss where the loss module tells it, by the scale that is handed over elsewhere; None where
    ``unscale_`` has hidden it. Of several micro-batches each is taken to have its share of the loss.
    """
    gradient = record.gradient
    if gradient is None:
        return None
    # In float32 at least: divided by the scale, a small gradient in float16 would vanish.
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if record.factor is not None:
        return wide / (record.factor.to(wide) * record.parts)
    scale = handed_over(optimizer)
    if scale is not None:
        return wide / scale.to(wide)
    return None if getattr(optimizer, "found_inf", None) is not None else wide
