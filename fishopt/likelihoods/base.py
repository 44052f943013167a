"""The contract of a likelihood: an exponential family whose natural parameters a network predicts.

``p(y | x) = base(y) exp(t(y)^T h - F(h))`` (Soen & Sun 2024, Eq. 1), with ``h`` the network's output. Everything the
package needs of the family is here, as pure functions of ``h``: no model and no optimizer enters this room.

Shapes: ``N`` inputs, ``T`` natural parameters for each, ``M`` sampled labels for each; ``h`` is ``[N, T]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reduction = Literal["batchmean", "mean", "sum"]

COLUMN_LIMIT = 4096
"""Outputs of an input up to which there may be a column for each, as in exact values: 2^24 numbers per input."""


class Interval(NamedTuple):
    """A lower and an upper bound per input, each ``[N]``; equal where the value is known exactly."""

    lower: Tensor
    upper: Tensor


class Quartic(NamedTuple):
    """The quartic form of M = K - I (x) I as a combination of squares, for one direction u of ``R^T`` per input.

    ``M(u, u, u, u) = multiple * (u^T I u)^2 + within * sum_p (u_p^T I_p u_p)^2
    + sum_k weights[k] * (u^T columns[k])^4``, ``I_p`` the blocks of I, one for each position that labels have. With
    ``u`` the derivative of ``h`` with respect to one parameter this is that parameter's V1 (Lemma 3.1, Eq. 5), so V1
    needs only squared VJPs.

    Attributes:
        multiple: The coefficient of the squared Fisher information.
        weights: ``[K, N]``, of any sign.
        columns: ``[K, N, T]``.
        within: The coefficient of the squares of each position's own Fisher information.
        shares: Where the factor S has the same columns, each times the root of its share: the shares, ``[K, N]``.
            Whoever wants both then takes the columns back once. None if that is not so, or not known.
    """

    multiple: float
    weights: Tensor
    columns: Tensor
    within: float = 0.0
    shares: Tensor | None = None


class Likelihood(ABC):
    """An exponential family over labels, with a network's output as its natural parameters.

    Subclass it for labels whose components depend on each other; `Independent` is less work where they do not. The six
    abstract methods are enough. Override others where a closed form is at hand, above all `radius`, without which
    bounds on variances are infinite; `natural`, to refuse outputs that are no natural parameters; and `valid_targets`,
    to refuse labels outside the support.

    Attributes:
        reduction: How the training loss averages the negative log-likelihood: over observations ("batchmean"), over
            observations and outputs ("mean"), or not at all ("sum"). Only the optimizers use it, to know the gradient's
            scale. An observation is an input, or where labels have positions one of these.
        positions: Observations per input.
    """

    reduction: Reduction = "batchmean"
    positions: int = 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # --- what a family defines ---

    @abstractmethod
    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood of labels ``y``, summed over outputs: ``[N]`` (nats)."""

    @abstractmethod
    def mean(self, h: Tensor) -> Tensor:
        """The mean parameter eta = dF/dh = E[t(y)]: ``[N, T]``."""

    @abstractmethod
    def statistic(self, h: Tensor, y: Tensor) -> Tensor:
        """The sufficient statistic t(y) of valid labels: ``[..., N, T]`` for labels with leading dimensions ``...``."""

    @abstractmethod
    def sample(self, h: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Labels drawn from the model, ``samples`` for each input: ``[M, N]`` or ``[M, N, T]``, on h's device.

        Args:
            h: Natural parameters, ``[N, T]``.
            samples: Labels for each input, M.
            generator: The source of randomness, which may live on another device: `uniform` takes care of that.
        """

    @abstractmethod
    def apply_factor(self, h: Tensor, v: Tensor) -> Tensor:
        """``S v`` for vectors ``v`` of shape ``[..., N, T]``, where ``S S^T = I(h|x)``."""

    @abstractmethod
    def quartic(self, h: Tensor) -> Quartic:
        """M = K - I (x) I, in the form that turns V1 into squared VJPs."""

    def valid_targets(self, h: Tensor, y: Tensor) -> Tensor:
        """Labels from the data in the shape that `statistic` takes.

        Raises:
            ValueError: If the labels do not fit ``h`` or lie outside the family's support.
        """
        return y

    def counted(self, targets: Tensor) -> Tensor | None:
        """Which of the data's labels count, as booleans of their shape; None where the labels do not tell."""
        return None

    def leaves_out(self, outputs: Tensor) -> bool:
        """Whether some labels of a network's output may not count."""
        return False

    def counted_by(self, gradient: Tensor) -> Tensor:
        """Which labels count, from the loss's gradient at the network's output, where `leaves_out`."""
        raise NotImplementedError

    def check_gradient(self, gradient: Tensor) -> None:  # noqa: B027 - most families have nothing to check
        """Whether a loss's gradient at the network's output can be this family's, where `leaves_out`.

        Raises:
            ValueError: If it cannot.
        """

    # --- what follows from it ---

    def at(self, outputs: Tensor, mask: Tensor | None = None) -> tuple[Likelihood, Tensor]:
        """The likelihood of a network's output, and that output as its natural parameters ``[N, T]``.

        Args:
            outputs: The network's output, one row per input.
            mask: Which labels count, as booleans; all if None.

        Raises:
            ValueError: If the output's shape does not fit the family, or the mask's the output.
        """
        if mask is not None:
            raise ValueError(f"{self} has no labels to leave out; pass inputs that count alone")
        return self, self.natural(outputs)

    def natural(self, outputs: Tensor) -> Tensor:
        """The network's output as natural parameters ``[N, T]``; further output dimensions are flattened.

        Raises:
            ValueError: If the output's shape does not fit the family.
        """
        if outputs.ndim == 0:
            raise ValueError(
                f"model output has shape (): {self} needs one row per input; drop the reduction at the end of the model"
            )
        if not outputs.numel():
            raise ValueError(
                f"model output has shape {tuple(outputs.shape)}: {self} needs one output or more per input"
            )
        return outputs.reshape(outputs.shape[0], -1)

    def residual(self, h: Tensor, y: Tensor) -> Tensor:
        """The cotangent eta - t(y), which is the gradient of the NLL with respect to ``h``: ``[..., N, T]``."""
        return self.mean(h) - self.statistic(h, y)

    def factor(self, h: Tensor) -> Tensor:
        """The columns of S, ``S S^T = I(h|x)``: ``[T, N, T]``, the column's number first."""
        return self.apply_factor(h, unit_columns(h))

    def covariance(self, h: Tensor) -> Tensor:
        """I(h|x), the Fisher information of the natural parameters: ``[N, T, T]``."""
        columns = self.factor(h)
        return torch.einsum("kna,knb->nab", columns, columns)

    def covariance_diagonal(self, h: Tensor) -> Tensor:
        """The diagonal of I(h|x) = Cov[t(y)]: ``[N, T]``."""
        return self.factor(h).square().sum(0)

    def covariance_spectrum(self, h: Tensor) -> Interval:
        """The exact smallest and largest eigenvalue of I(h|x): two ``[N]``."""
        values = torch.linalg.eigvalsh(self.covariance(h)).clamp_min(0)
        return Interval(values[:, 0], values[:, -1])

    def quartic_spectrum(self, h: Tensor, *, tight: bool = False) -> Interval:
        """Bounds on the extremes of M over unit vectors (Theorem 4.1): two ``[N]``.

        By Corollary 4.2 and Proposition 4.3 unless overridden.

        Args:
            h: Natural parameters, ``[N, T]``.
            tight: Take the tightest closed form instead of the paper's, where there are two.
        """
        largest = self.covariance_spectrum(h).upper if tight else self.covariance_bound(h)
        # The product is not a number where it is infinity times zero: labels that are certain.
        upper = torch.where(largest > 0, self.radius(h) * largest, 0.0)
        return Interval(torch.zeros_like(upper), upper)

    def covariance_bound(self, h: Tensor) -> Tensor:
        """An upper bound on the largest eigenvalue of I(h|x), as cheap as the mean: ``[N]``."""
        return self.covariance_spectrum(h).upper

    def radius(self, h: Tensor) -> Tensor:
        """B = max over labels of ``|t(y) - eta|^2`` (Proposition 4.3), infinite for unbounded labels: ``[N]``."""
        return torch.full_like(h[:, 0], math.inf)

    def gradient_scale(self, observations: int, outputs: int) -> float:
        """The loss's gradient as a multiple of the gradient of the NLL averaged over observations.

        Args:
            observations: In the batch: inputs, or where labels have positions those that count.
            outputs: Natural parameters of one observation.
        """
        return {"batchmean": 1.0, "mean": 1.0 / outputs, "sum": float(observations)}[self.reduction]


def unit_columns(h: Tensor) -> Tensor:
    """The unit vectors of ``R^T`` for every input: ``[T, N, T]``, the vector's number first."""
    check_columns(h)
    n, t = h.shape
    return torch.eye(t, dtype=h.dtype, device=h.device)[:, None, :].expand(t, n, t)


def check_columns(h: Tensor) -> None:
    """Whether there may be a column for each output.

    Raises:
        ValueError: If there are too many.
    """
    if h.shape[1] > COLUMN_LIMIT:
        raise ValueError(
            f"this takes a column for each of the {h.shape[1]:,} outputs of an input, more than {COLUMN_LIMIT:,}; pass "
            "estimator='hutchinson' or 'I1' (to select_estimators and the optimizers criterion='efficiency')"
        )


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal numbers from ``generator``, wherever it lives, with ``like``'s type and device."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) from ``generator``, wherever it lives, with ``like``'s type and device."""
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
