"""What is read off the eigenvalues of a Fisher information matrix; no network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a Fisher information matrix.

    Attributes:
        eigenvalues: Those that are not zero, in descending order, in float64; the largest unless `is_complete`.
        trace: The sum of all of them.
        parameters: The matrix's size, P; what is not listed of a complete spectrum is zero.
        is_complete: Whether all of them are listed.
    """

    eigenvalues: Tensor
    trace: float
    parameters: int
    is_complete: bool

    @property
    def largest(self) -> float:
        """The largest eigenvalue; gradient descent on the quadratic model is stable below a rate of 2 over it."""
        return float(self.eigenvalues[0]) if len(self.eigenvalues) else 0.0

    @property
    def condition_number(self) -> float:
        """The largest eigenvalue over the smallest that is not zero.

        Raises:
            ValueError: If not all are known.
        """
        self._check_complete("condition_number")
        return self.largest / float(self.eigenvalues[-1]) if len(self.eigenvalues) else math.nan

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the eigenvalues over their sum (Roy & Vetterli, 2007).

        Raises:
            ValueError: If not all are known.
        """
        self._check_complete("effective_rank")
        shares = self.eigenvalues / self.eigenvalues.sum()
        return float(torch.special.entr(shares).sum().exp()) if len(shares) else 0.0

    @property
    def stable_rank(self) -> float:
        """The trace over the largest eigenvalue."""
        return self.trace / self.largest if self.largest else 0.0

    def _check_complete(self, what: str) -> None:
        if not self.is_complete:
            raise ValueError(
                f"{what} takes all eigenvalues, and there are the {len(self.eigenvalues)} largest of "
                f"{self.parameters:,}; pass method='gram', or fewer inputs"
            )


def nonzero_eigenvalues(gram: Tensor) -> Tensor:
    """The eigenvalues of a Gram matrix that are not zero, in descending order, in float64.

    Args:
        gram: ``[N, N]``.
    """
    if not (rank := _rank(gram)):
        return torch.zeros(0, dtype=torch.float64, device=gram.device)
    values = torch.linalg.eigvalsh(gram.double()).flip(0)[:rank]
    # What is small enough is lost in these, though it would not be in those of the cosines.
    return values[values > len(gram) * torch.finfo(values.dtype).eps * values[:1]]


def _rank(gram: Tensor) -> int:
    """How many eigenvalues of a Gram matrix are not zero.

    Vectors may differ in length by orders of magnitude, and short ones are still known to as many digits. So this is
    told from their cosines, not from their products: as many eigenvalues are zero as those of the cosines are lost in
    rounding (the scaling of Demmel & Veselic, 1992).
    """
    products = gram.double()
    norms = products.diagonal().clamp_min(0).sqrt()
    kept = norms > 0
    if not kept.any():
        return 0
    cosines = products[kept][:, kept] / norms[kept] / norms[kept][:, None]
    return int((torch.linalg.eigvalsh(cosines) > 4 * len(cosines) * torch.finfo(gram.dtype).eps).sum())
