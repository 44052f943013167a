"""Working with `torch.amp.GradScaler`, which hands over its scale for the step to deal with."""

from __future__ import annotations

import torch
from torch import Tensor

from fishopt.optim.recorder import Record


def unscale(optimizer: torch.optim.Optimizer, record: Record | None) -> bool:
    """Takes a GradScaler's scale out of the gradients, and of the recorded gradient at the output.

    Returns:
        Whether to go on: False if a gradient overflowed, and the step is to be skipped.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is None:  # no GradScaler
        return True
    if found_inf.item():
        return False
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:  # the user has called unscale_, and the scale is not handed over
        if record is not None:
            record.gradient = None
        return True
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_div_(grads, scale.item())
    if record is not None and record.gradient is not None:
        # In float32 at least: divided by the scale, a small gradient in float16 would vanish.
        record.gradient = record.gradient.to(torch.promote_types(record.gradient.dtype, torch.float32)) / scale
    return True
