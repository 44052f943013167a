"""Working with `torch.amp.GradScaler`, which hands over its scale for the step to deal with."""

from __future__ import annotations

import torch
from torch import Tensor

from fishopt.optim.recorder import Record


def unscale(optimizer: torch.optim.Optimizer, record: Record | None) -> bool:
    """Takes a GradScaler's scale out of the gradients, and of the recorded gradient at the output.

    Returns:
        Whether to go on: False if a gradient overflowed, and the step is to be skipped.

    Raises:
        ValueError: If the gradient at the output is needed and the user has unscaled the others already: then the scale
            is not handed over.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is None:  # no GradScaler
        return True
    if found_inf.item():
        return False
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:
        if record is not None and record.gradient is not None:
            raise ValueError(
                "scaler.unscale_(optimizer) hides the scale of the residuals from the optimizer; pass "
                "likelihood=fishopt.Gaussian(variance=<number>), or leave unscale_ out"
            )
        return True
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_div_(grads, scale.item())
    if record is not None and record.gradient is not None:
        record.gradient = record.gradient / scale
    return True
