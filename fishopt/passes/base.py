"""The contract of a pass: one forward through the network, then two primitives of its output's derivatives.

Every estimator, variance and bound of a diagonal is made of these two, with other cotangents ``c`` at the output:

    squared VJP         q_i(c) = ((d h / d theta_i)^T c)^2
    Hessian diagonal    r_i(c) = sum_a c_a d^2 h_a / d theta_i^2

and of their squares, summed over inputs. What relates two inputs, as the Gram matrix of scores does, takes the VJPs
themselves. A new way through the network is one subclass of `Pass`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

Diagonal = dict[str, Tensor]
"""Parameter name -> tensor of the parameter's shape, or ``[N, *shape]`` for one per input."""


SKETCH_COST = 4
"""Backward passes of a product with the Hessian, about: there, and back through the way there."""


@dataclass(frozen=True)
class Sketch:
    """Leave to estimate a Hessian diagonal, without bias, where its exact value is dear.

    Random signs ``v`` at what a layer puts out, one for each input and unit, give ``v (H v)``: the diagonal of the
    Hessian ``H`` plus noise of mean zero, whose variance is the sum of squares of the row's other entries. It takes a
    few backward passes whatever the width.

    Attributes:
        generator: The source of the signs; torch's global one if None.
        exact_up_to: Backward passes that an exact value may take before it is sketched.
    """

    generator: torch.Generator | None = None
    exact_up_to: int = 256

    def replaces(self, cost: int) -> bool:
        """Whether it stands in for an exact value of so many backward passes."""
        return cost > self.exact_up_to


class Pass(ABC):
    """One batch, taken forward once; a context manager, since it holds activations. One pass per shadow at a time.

    ``names`` in its methods are the parameters that are asked for; all that the pass covers if None.

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
    def vjp(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        """``(d h / d theta_i)^T c``, the squared VJP before its square: ``[K, N, *shape]``.

        Args:
            columns: Cotangents of shape ``[K, N, T]``.
            names: The parameters.
        """

    def gram(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Tensor:
        """Inner products, over all parameters, of the VJPs of any two inputs and columns: ``[K, N, K, N]``.

        Args:
            columns: Cotangents of shape ``[K, N, T]``.
            names: The parameters.
        """
        total = columns.new_zeros(*columns.shape[:2], *columns.shape[:2])
        for name in self.names if names is None else names:
            total += gram_of(self.vjp(columns, names=[name])[name])
        return total

    @abstractmethod
    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        """``sum_k q(columns[k])``, summed over inputs too unless ``per_input``.

        Args:
            columns: Cotangents of shape ``[K, N, T]``, T the number of outputs per input.
            names: The parameters.
            per_input: Return one value per input, ``[N, *shape]``.
        """

    @abstractmethod
    def hessian_diagonal(
        self,
        cotangent: Tensor,
        *,
        names: Sequence[str] | None = None,
        per_input: bool = False,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        """``r(cotangent)``, summed over inputs unless ``per_input``.

        Args:
            cotangent: Of shape ``[N, T]``; ``r`` is linear in it, so several labels go in as their mean.
            names: The parameters.
            per_input: Return one value per input, ``[N, *shape]``.
            sketch: Permission to estimate what is dear; exact throughout if None.
        """

    @abstractmethod
    def hessian_cost(self, name: str, sketch: Sketch | None = None) -> int:
        """About how many backward passes the Hessian diagonal of one parameter takes, for decisions by cost."""

    def fourth_vjp(self, columns: Tensor, weights: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        """``sum_s sum_n weights[s, n] (sum_m q_n(columns[s, m]))^2``: squares per input, summed over the inputs.

        Args:
            columns: Cotangents of shape ``[S, M, N, T]``.
            weights: ``[S, N]``, of any sign, or ``[R, S, N]`` for R such sums, ``[R, *shape]``.
            names: The parameters.
        """
        total: Diagonal = {}
        for group, w in zip(columns, weights.movedim(-2, 0), strict=True):
            add(total, _weighed_squares(self.squared_vjp(group, names=names, per_input=True), w))
        return total

    def quartic_sums(
        self, columns: Tensor, shares: Tensor, weights: Tensor, *, names: Sequence[str] | None = None
    ) -> Diagonal:
        """Four sums at the price of one: of ``q_n(columns[k])``, each column taken back once, ``[4, *shape]``.

        ``sum_nk s q``, ``sum_n (sum_k s q)^2``, ``sum_nk (s q)^2`` and ``sum_nk w q^2``, s the shares, w the weights.

        Args:
            columns: Cotangents of shape ``[K, N, T]``.
            shares: ``[K, N]``.
            weights: ``[K, N]``, of any sign.
            names: The parameters.
        """
        linear: Diagonal = {}
        signs: Diagonal = {}
        weighed: Diagonal = {}
        for column, s, w in zip(columns, shares, weights, strict=True):
            q = self.squared_vjp(column[None], names=names, per_input=True)
            add(weighed, _weighed_squares(q, w))
            shared = {name: value.mul_(s.reshape(-1, *[1] * (value.ndim - 1))) for name, value in q.items()}
            add(signs, {name: value.square().sum(0) for name, value in shared.items()})
            add(linear, shared)
        return {
            name: torch.stack([value.sum(0), value.square().sum(0), signs[name], weighed[name]])
            for name, value in linear.items()
        }

    def hessian_square(
        self,
        columns: Tensor,
        weights: Tensor,
        *,
        names: Sequence[str] | None = None,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        """``sum_s sum_n weights[s, n] r_n(columns[s])^2``.

        With a sketch its own variance is part of the value: the mean of a noisy square is the square plus the variance.

        Args:
            columns: Cotangents of shape ``[S, N, T]``.
            weights: ``[S, N]``.
            names: The parameters.
            sketch: As in `hessian_diagonal`.
        """
        total: Diagonal = {}
        for column, w in zip(columns, weights, strict=True):
            r = self.hessian_diagonal(column, names=names, per_input=True, sketch=sketch)
            add(total, _weighed_squares(r, w))
        return total


class NoSecondDerivativesError(RuntimeError):
    """An operation in the network has no second derivative that torch knows."""


class CoupledInputsError(ValueError):
    """Derivatives per input are asked for where a network's outputs cannot be told apart by inputs."""


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Names the cause where torch has none.

    Raises:
        NoSecondDerivativesError: If it has none.
    """
    try:
        yield
    except RuntimeError as error:
        raise NoSecondDerivativesError(
            f"an operation in the model has no second derivative, which estimator='I2' needs ({error}); use another "
            "estimator, or 'auto', for this layer"
        ) from error


def add(total: Diagonal, found: Diagonal) -> Diagonal:
    """Adds ``found`` to ``total``, in place; what is new there is taken over, and not to be used elsewhere."""
    for name, value in found.items():
        if name in total:
            total[name] += value
        else:
            total[name] = value
    return total


def trace(diagonal: Diagonal) -> float:
    """The sum of all entries."""
    return sum(float(value.sum()) for value in diagonal.values())


def gram_of(gradients: Tensor, others: Tensor | None = None) -> Tensor:
    """Inner products of gradients ``[K, n, *shape]`` with others ``[K, m, *shape]``: ``[K, n, K, m]``."""
    k, n = gradients.shape[:2]
    left = gradients.reshape(k * n, -1)
    right = left if others is None else others.reshape(k * others.shape[1], -1)
    return (left @ right.T).reshape(k, n, k, -1)


def cost_with(sketch: Sketch | None, exact: int) -> int:
    """Backward passes of a Hessian diagonal whose exact value takes ``exact``, if it may be sketched."""
    return SKETCH_COST if sketch is not None and sketch.replaces(exact) else exact


def signs(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs from ``generator``, wherever it lives, with ``like``'s type and device."""
    device = like.device if generator is None else generator.device
    drawn = torch.randint(0, 2, tuple(shape), generator=generator, device=device)
    return drawn.to(like).mul_(2).sub_(1)


def _weighed_squares(per_input: Diagonal, weights: Tensor) -> Diagonal:
    return {name: torch.tensordot(weights.to(value.dtype), value.square(), dims=1) for name, value in per_input.items()}
