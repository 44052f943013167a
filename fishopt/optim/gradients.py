"""What a step makes sure of before it takes gradients: a NaN in one of them would end up in every parameter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fishopt.optim.buckets import Members

MAX_SKIPPED = 10
"""Steps in a row that may be skipped before training is stopped."""


WHOLE = 2**16
"""Entries up to which all of a gradient is looked at."""

STRIDE = 61
"""Of larger ones, each of so many entries: a prime, so that all columns of a matrix get their turn."""


class Skipped(NamedTuple):
    """Steps that were not made, because gradients were NaN or infinite.

    Attributes:
        total: All of them.
        in_a_row: Those since the last step that was made.
    """

    total: int = 0
    in_a_row: int = 0

    def after(self, bad: Sequence[str]) -> Self:
        """The same after one more.

        Args:
            bad: The parameters with such gradients.

        Raises:
            RuntimeError: If there are too many in a row.
        """
        listed = ", ".join(map(repr, bad[:3])) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        if self.total == 0:
            warnings.warn(
                f"the gradient of {listed} is NaN or infinite. The step is skipped, parameters and averages stay as "
                "they are; further ones are counted in report() without a warning.",
                RuntimeWarning,
                stacklevel=2,
            )
        after = self._replace(total=self.total + 1, in_a_row=self.in_a_row + 1)
        if after.in_a_row >= MAX_SKIPPED:
            raise RuntimeError(
                f"{after.in_a_row} steps in a row were skipped, as gradients were NaN or infinite; the last time that "
                f"of {listed}. Lower lr, or look for bad inputs, targets or parameters"
            )
        return after

    def after_a_step(self) -> Self:
        """The same after one that was made."""
        return self._replace(in_a_row=0) if self.in_a_row else self


def refuse_sparse(members: Members, name_of: Mapping[Tensor, str]) -> None:
    """Raises for gradients that no step can take.

    Raises:
        RuntimeError: If one is sparse.
    """
    for _, params in members:
        for p in params:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"the gradient of {name_of[p]!r} is sparse; build the module with sparse=False")


def not_finite(members: Members, name_of: Mapping[Tensor, str], *, may_wait: Callable[[], bool]) -> list[str]:
    """The names of the parameters whose gradients are NaN or infinite.

    On a CPU. On other devices only a step that waits for them anyway can tell: the others do not look.

    Args:
        members: The parameters with gradients.
        name_of: Their names.
        may_wait: Whether it is such a step.
    """
    grads = [p.grad for _, params in members for p in params if p.grad is not None]
    if not grads or not (all(g.is_cpu for g in grads) or may_wait()):
        return []
    norms = [norm.cpu() for norm in torch._foreach_norm([_sample(g) for g in grads])]
    if all(map(math.isfinite, torch.stack(norms).tolist())):
        return []
    # The square of a large number is infinite, too; the number itself is not.
    listed = [p for _, params in members for p in params]
    return [name_of[p] for p in listed if p.grad is not None and not p.grad.isfinite().all()]


def _sample(g: Tensor) -> Tensor:
    """All of a small gradient, and a part of a large one: a whole read of memory would be a seventh of the step.

    What is NaN comes from an activation or from what went back to it, and is NaN in a bias, a norm's scale, or a row or
    column of a weight, not in one entry.
    """
    if g.numel() <= WHOLE or not g.is_contiguous():
        return g
    return g.view(-1)[::STRIDE]
