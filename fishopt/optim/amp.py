"""Working with `torch.amp.GradScaler`, which hands over its scale for the step to deal with."""

from __future__ import annotations

import torch
from torch import Tensor

from fishopt.optim.record import Record
from fishopt.passes import widened


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


def unscaled(optimizer: torch.optim.Optimizer, record: Record) -> Record:
    """What was trained on as if no GradScaler had multiplied the loss, where it has handed its scale over."""
    scale = handed_over(optimizer)
    return record if scale is None else record.divided_by(scale)


def plain_gradients(optimizer: torch.optim.Optimizer, record: Record, reduction: str) -> list[Tensor] | None:
    """The gradients at the output that the losses themselves have, as if they were not multiplied by anything.

    By the gradient at the loss where the loss module tells it; elsewhere of several micro-batches each is taken to have
    its share of a mean. None where they were multiplied by zero, or ``unscale_`` has hidden a GradScaler's scale.

    Args:
        optimizer: Whose steps a GradScaler may call.
        record: What was trained on, `unscaled`.
        reduction: How the loss averages, as `Likelihood.reduction`.

    Returns:
        One for each of the micro-batches that the record's inputs are of.
    """
    if record.gradient is None:
        return None
    gradients = record.split(widened(record.gradient))
    if record.factor is None:
        is_hidden = getattr(optimizer, "found_inf", None) is not None and handed_over(optimizer) is None
        return None if is_hidden else [x * (1 if reduction == "sum" else record.parts) for x in gradients]
    factors = torch.stack(record.factors)
    return [x / factor.to(x.device) for x, factor in zip(gradients, factors, strict=True)] if factors.all() else None
