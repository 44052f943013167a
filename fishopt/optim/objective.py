"""The loss of a step's batch as a function of the parameters: its value anew, and its quadratic model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fishopt.batch import apart
from fishopt.likelihoods import Likelihood
from fishopt.optim.quadratic import inner
from fishopt.optim.record import Record
from fishopt.optim.replica import Replica
from fishopt.passes import Direction


class Objective:
    """What was trained on since the last step: the sum, over micro-batches, of what the loss was multiplied by.

    Args:
        records: The micro-batches, one for each forward.
        replica: Runs the network.
        likelihood: The family behind the loss, where no calls of a loss module tell it.
        closure: Evaluates the loss, where the user has one: it may hold more than the loss module tells.
        loss: What that returned at the parameters as they were.
    """

    def __init__(
        self,
        records: Sequence[Record],
        replica: Replica,
        likelihood: Likelihood | None = None,
        closure: Callable[[], Any] | None = None,
        loss: Any = None,
    ) -> None:
        self._records, self._replica = records, replica
        self._likelihood, self._closure, self._loss = likelihood, closure, loss

    def value(self) -> float:
        """The loss at the parameters as they are."""
        if self._closure is not None:
            with torch.enable_grad():
                return _number(self._closure())
        with apart():
            return sum(float(one.loss(self._replica.outputs(one.inputs))) for one in self._records)

    @apart()
    def along(self, directions: Sequence[Direction]) -> tuple[float, Tensor | None, Tensor]:
        """The loss, its slopes ``[K]``, and ``d_i^T G d_j`` with its Gauss-Newton matrix G, ``[K, K]``.

        No slopes where only a closure tells the loss.
        """
        zeros = torch.zeros(len(directions), dtype=torch.float64, device="cpu")
        loss, slopes, curvature = 0.0, zeros, torch.diag(zeros)
        for record in self._records:
            outputs, products = self._replica.products(record.inputs, directions)
            with torch.enable_grad():
                h = outputs.requires_grad_()
                value, cotangent = self._cotangent(record, h)
                # The Hessian of a loss in natural parameters is I(h|x), whatever the labels are.
                pulled = [torch.autograd.grad(cotangent, h, v, retain_graph=True)[0] for v in products]
            loss += value
            slopes = slopes + inner(_rows(products), _rows([cotangent.detach()]))[:, 0]
            curvature = curvature + inner(_rows(products), _rows(pulled))
        if self._closure is not None:
            return _number(self._loss), None, curvature
        return loss, slopes, curvature

    def _cotangent(self, record: Record, h: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient at the output, this with a graph; up to constants if no call tells the labels."""
        if self._likelihood is None:
            loss = record.loss(h)
            return float(loss.detach()), torch.autograd.grad(loss, h, create_graph=True)[0]
        mask = record.mask
        likelihood, natural = self._likelihood.at(h, mask)
        counts = likelihood.covariance_diagonal(natural).detach() > 0  # where labels do not count it is zero
        observations = len(natural) * likelihood.positions if mask is None else int(mask.sum())
        scale = likelihood.gradient_scale(observations, natural.shape[1] // likelihood.positions) / observations
        return 0.0, (likelihood.mean(natural) * counts * scale).reshape(h.shape)


def _number(loss: Any) -> float:
    if not isinstance(loss, Tensor | float) or (isinstance(loss, Tensor) and loss.numel() != 1):
        raise ValueError(f"closure returned {loss!r}; lr='auto' needs the loss, a number, from it")
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.reshape(-1) for x in tensors])
