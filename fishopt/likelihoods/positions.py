"""Labels at several positions of one input: a sentence's tokens, an image's pixels.

Given the input they are independent, ``p(y | x_n) = prod_p p(y_p | h_np)`` over the positions ``p`` that count, so the
Fisher information of an input is the sum over these: I(h|x) has a block for each. Nothing here but the columns of its
factor and what is made of them (`factor`, `covariance`, `quartic`, tight spectra) grows with a square of the outputs.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fishopt.likelihoods.base import Interval, Likelihood, Quartic, check_columns


class Positions(Likelihood):
    """The product of one family over the positions of a network's output.

    Natural parameters ``h`` are ``[N, P * T]`` in the order of the network's output, which may have the T of a position
    in any dimension. Labels are integers ``[..., N, P]``, or real and then ``[..., N, P, T]``. Where a position does
    not count, residuals, factor and covariance are zero.

    Args:
        base: The family at one position.
        shape: The network's output for one input, such as ``(L, T)`` or ``(T, H, W)``.
        axis: Which dimension of ``shape`` holds the T natural parameters of a position.
        mask: Which positions count, ``[N, P]`` of booleans; all if None.
    """

    def __init__(self, base: Likelihood, shape: tuple[int, ...], axis: int, mask: Tensor | None = None) -> None:
        self._base = base
        self._shape, self._axis = tuple(shape), axis
        self._before, self._width, self._after = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
        self._mask = mask
        self.positions = self._before * self._after

    def __repr__(self) -> str:
        return f"{self._base!r} at {self.positions} positions"

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        return self._masked(self._base.nll(self._rows(h), self._flat(y)).reshape(len(h), -1)).sum(-1)

    def mean(self, h: Tensor) -> Tensor:
        return self._joined(self._base.mean(self._rows(h)))

    def statistic(self, h: Tensor, y: Tensor) -> Tensor:
        return self._joined(self._base.statistic(self._rows(h), self._flat(y)))

    def residual(self, h: Tensor, y: Tensor) -> Tensor:
        return self._joined(self._base.residual(self._rows(h), self._flat(y)), masked=True)

    def sample(self, h: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        y = self._base.sample(self._rows(h), samples, generator)
        return y.reshape(samples, len(h), self.positions, *y.shape[2:])

    def valid_targets(self, h: Tensor, y: Tensor) -> Tensor:
        places = self._shape[: self._axis] + self._shape[self._axis + 1 :]
        expected = (len(h), *(self._shape if y.is_floating_point() else places))
        if y.shape != expected:
            raise ValueError(
                f"targets has shape {tuple(y.shape)} and type {y.dtype}; pass one class index per position, shape "
                f"{(len(h), *places)}, or class probabilities {(len(h), *self._shape)}"
            )
        if y.is_floating_point():
            y = self._rows(y.flatten(1))
        elif self._mask is None:
            y = y.reshape(-1)
        else:  # what stands where nothing counts, such as ignore_index, is no label
            y = y.reshape(-1).masked_fill(~self._mask.reshape(-1), 0)
        y = self._base.valid_targets(self._rows(h), y)
        return y.reshape(len(h), self.positions, *y.shape[1:])

    def covariance_diagonal(self, h: Tensor) -> Tensor:
        return self._joined(self._base.covariance_diagonal(self._rows(h)), masked=True)

    def apply_factor(self, h: Tensor, v: Tensor) -> Tensor:
        return self._joined(self._base.apply_factor(self._rows(h), self._rows(v)), masked=True)

    def factor(self, h: Tensor) -> Tensor:
        """The columns of S, ``[P * T, N, P * T]``: the first position's first, then the second's, and so on."""
        check_columns(h)
        return self._spread(self._base.factor(self._rows(h)))

    def covariance_spectrum(self, h: Tensor) -> Interval:
        lower, upper = self._of_blocks(self._base.covariance_spectrum(self._rows(h)), h)
        return Interval(lower.amin(-1), upper.amax(-1))

    def covariance_bound(self, h: Tensor) -> Tensor:
        return self._masked(self._base.covariance_bound(self._rows(h)).reshape(len(h), -1)).amax(-1)

    def radius(self, h: Tensor) -> Tensor:
        return self._masked(self._base.radius(self._rows(h)).reshape(len(h), -1)).sum(-1)

    def quartic(self, h: Tensor) -> Quartic:
        """M of a sum of independent terms [ours].

        Fourth cumulants add up, and M is the fourth cumulant plus ``2 (u^T I u)^2``, for one position as for all:
        ``M(u) = 2 (u^T I u)^2 + sum_p [M_p(u_p) - 2 (u_p^T I_p u_p)^2]``.
        """
        check_columns(h)
        base = self._base.quartic(self._rows(h))
        weights = base.weights.reshape(-1, len(h), self.positions).movedim(-1, 0).flatten(0, 1)
        return Quartic(2.0, weights, self._spread(base.columns), within=base.multiple - 2.0)

    def quartic_spectrum(self, h: Tensor, *, tight: bool = False) -> Interval:
        """With ``m`` and ``l`` bounds on the largest and the smallest I_p, and ``M_p`` those on its M [ours].

        Let ``w_p = |u_p|^2``, which add up to 1, and ``s = sum_p w_p^2``, between 1/P and 1. Then `quartic` is
        ``sum_p M_p(u_p) + sum_{p != q} (u_p^T I_p u_p) (u_q^T I_q u_q)``, the second sum twice, so it is at most
        ``s max_p M_p + 2 (1 - s) m^2``, which is linear in s and largest at one of its ends. The same from below.
        """
        rows = self._rows(h)
        lower, upper = self._of_blocks(self._base.quartic_spectrum(rows, tight=tight), h)
        least, most = lower.amin(-1), upper.amax(-1)
        if tight:
            smallest, largest = self.covariance_spectrum(h)
        else:  # the smallest eigenvalue is not cheap, and zero is below it
            smallest, largest = torch.zeros_like(least), self.covariance_bound(h)
        share = 1 / self._count(h)
        return Interval(
            torch.minimum(least, share * least + 2 * (1 - share) * smallest.square()),
            torch.maximum(most, share * most + 2 * (1 - share) * largest.square()),
        )

    # --- between [N, P * T] in the network's order and one row per position ---

    def _rows(self, h: Tensor) -> Tensor:
        """``[..., N, P * T]`` -> ``[..., N * P, T]``."""
        split = h.unflatten(-1, (self._before, self._width, self._after)).movedim(-2, -1)
        return split.reshape(*h.shape[:-2], -1, self._width)

    def _joined(self, rows: Tensor, *, masked: bool = False) -> Tensor:
        """The way back; with ``masked`` positions that do not count become zero."""
        split = rows.unflatten(-2, (-1, self.positions))
        if masked and self._mask is not None:
            split = split.masked_fill(~self._mask[..., None], 0.0)
        return self._in_order(split)

    def _in_order(self, split: Tensor) -> Tensor:
        """``[..., N, P, T]`` -> ``[..., N, P * T]`` in the network's order."""
        return split.unflatten(-2, (self._before, self._after)).movedim(-1, -2).flatten(-3)

    def _spread(self, columns: Tensor) -> Tensor:
        """One column for each of each position's, zero elsewhere: ``[K, N * P, T]`` -> ``[P * K, N, P * T]``."""
        split = columns.unflatten(1, (-1, self.positions))
        if self._mask is not None:
            split = split.masked_fill(~self._mask[..., None], 0.0)
        # [K, N, T, P] -> [P, K, N, P, T]
        return self._in_order(torch.diag_embed(split.mT, dim1=0, dim2=3)).flatten(0, 1)

    def _flat(self, y: Tensor) -> Tensor:
        """Labels in the base family's shape."""
        return y.flatten(-3, -2) if y.is_floating_point() else y.flatten(-2)

    def _masked(self, values: Tensor) -> Tensor:
        """``[N, P]``, zero where a position does not count."""
        return values if self._mask is None else values.masked_fill(~self._mask, 0.0)

    def _of_blocks(self, interval: Interval, h: Tensor) -> Interval:
        return Interval(*(self._masked(end.reshape(len(h), -1)) for end in interval))

    def _count(self, h: Tensor) -> Tensor | int:
        """Positions that count, for each input; 1 where none does, and all is zero."""
        return self.positions if self._mask is None else self._mask.sum(-1).clamp_min(1).to(h.dtype)
