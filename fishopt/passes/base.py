"""The contract of a pass: one forward through the network, then two primitives of its output's derivatives.

Every estimator, variance and bound of this package is made of these two, with other cotangents ``c`` at the output:

    squared VJP         q_i(c) = ((d h / d theta_i)^T c)^2
    Hessian diagonal    r_i(c) = sum_a c_a d^2 h_a / d theta_i^2

A new way through the network is one subclass of `Pass`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from torch import Tensor

Diagonal = dict[str, Tensor]
"""Parameter name -> tensor of the parameter's shape, or ``[N, *shape]`` for one per input."""


class Pass(ABC):
    """One batch, taken forward once; a context manager, since it holds activations. One pass per shadow at a time.

    Attributes:
        outputs: The network's output, ``[N, ...]``, detached.
        names: The parameters that the primitives cover.
    """

    outputs: Tensor
    names: tuple[str, ...]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - not every engine holds any
        """Lets go of the activations."""

    @abstractmethod
    def squared_vjp(self, columns: Tensor, *, per_input: bool = False) -> Diagonal:
        """``sum_k q(columns[k])``, summed over inputs too unless ``per_input``.

        Args:
            columns: Cotangents of shape ``[K, N, T]``, T the number of outputs per input.
            per_input: Return one value per input, ``[N, *shape]``.
        """

    @abstractmethod
    def hessian_diagonal(self, cotangent: Tensor, *, per_input: bool = False) -> Diagonal:
        """``r(cotangent)``, summed over inputs unless ``per_input``.

        Args:
            cotangent: Of shape ``[N, T]``; ``r`` is linear in it, so several labels go in as their mean.
            per_input: Return one value per input, ``[N, *shape]``.
        """

    @abstractmethod
    def hessian_cost(self, name: str) -> int:
        """About how many backward passes the Hessian diagonal of one parameter takes, for decisions by cost."""
