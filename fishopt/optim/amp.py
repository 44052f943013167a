"""Working with `torch.amp.GradScaler`, which hands over its scale for the step to deal with."""

from __future__ import annotations

import torch
from torch import Tensor

from fishopt.optim.recorder import Record


def has_overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler has found a gradient infinite or NaN, so that the step is to be skipped."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def unscale_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Takes a GradScaler's scale out of the gradients."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, scale.item())


def unscale_record(optimizer: torch.optim.Optimizer, record: Record) -> None:
    """Takes the scale out of the recorded gradient at the output; forgets this where the scale is not known."""
    before = record.gradient
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None and before is not None:
        # In float32 at least: divided by the scale, a small gradient in float16 would vanish.
        record.gradient = before.to(torch.promote_types(before.dtype, torch.float32)) / scale
    elif getattr(optimizer, "found_inf", None) is not None:  # the user has called unscale_, which hides the scale
        record.gradient = None
