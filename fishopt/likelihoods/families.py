"""The four families that torch's losses stand for: Categorical, Bernoulli, Gaussian, Poisson."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fishopt.likelihoods.base import Interval, Likelihood, Quartic, normal, uniform, unit_columns
from fishopt.likelihoods.independent import Independent
from fishopt.likelihoods.positions import Positions


class Categorical(Likelihood):
    """One of C classes, from logits: the likelihood of `torch.nn.CrossEntropyLoss`.

    Labels are integers ``[N]``, or class probabilities ``[N, C]``. A network's output of more dimensions has a label at
    each position, ``[N, ...]``, independent of the others given the input (see `Positions`).

    Args:
        dim: Which dimension of the network's output holds the classes: the last, as in language models ``[N, L, C]``,
            or 1, as in segmentation ``[N, C, H, W]``.
        ignore_index: The label that marks a position, or an input, as one that does not count.

    Raises:
        ValueError: If ``dim`` or ``ignore_index`` is no whole number, or ``dim`` that of the inputs.
    """

    def __init__(self, dim: int = -1, ignore_index: int = -100) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim == 0:
            raise ValueError(f"dim={dim!r}: pass the output's dimension of classes, -1 for the last, 1 for [N, C, ...]")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index={ignore_index!r}: pass the whole number that marks labels to leave out")
        self.dim = dim
        self.ignore_index = ignore_index

    def __repr__(self) -> str:
        options = {"dim": (self.dim, -1), "ignore_index": (self.ignore_index, -100)}
        return f"Categorical({', '.join(f'{k}={v}' for k, (v, usual) in options.items() if v != usual)})"

    def counted(self, targets: Tensor) -> Tensor | None:
        if targets.is_floating_point() or targets.is_complex():
            return None
        return targets != self.ignore_index

    def leaves_out(self, outputs: Tensor) -> bool:
        if outputs.ndim == 2 and self.ignore_index == -100:
            # In float16 the gradient at a label that is all but certain is zero as well.
            return outputs.shape[1] > 1 and outputs.dtype != torch.float16
        return outputs.ndim > 2 or self.ignore_index != -100

    def counted_by(self, gradient: Tensor) -> Tensor:
        # At a label that counts some class's gradient is not zero, unless the prediction is certain to the last digit.
        return gradient.any(self._axis(gradient))

    def check_gradient(self, gradient: Tensor) -> None:
        # Probabilities sum to one, so over the classes the gradient sums to zero.
        sizes = gradient.abs().sum()
        totals = {axis: gradient.sum(axis).abs().sum() for axis in range(1, gradient.ndim)}
        classes = [axis for axis, total in totals.items() if total <= 1e-2 * sizes]
        if sizes > 0 and classes and self._axis(gradient) not in classes:
            raise ValueError(
                f"model output has shape {tuple(gradient.shape)}, and by the loss's gradient its classes are in "
                f"dimension {classes[0]}, not {self.dim}; pass likelihood=fishopt.Categorical(dim={classes[0]})"
            )

    def at(self, outputs: Tensor, mask: Tensor | None = None) -> tuple[Likelihood, Tensor]:
        if outputs.ndim < 3 and mask is None:
            return self, self.natural(outputs)
        axis = self._axis(outputs)
        expected = (*outputs.shape[:axis], *outputs.shape[axis + 1 :])
        if mask is not None and mask.shape != expected:
            raise ValueError(
                f"targets has shape {tuple(mask.shape)} for a model output of shape {tuple(outputs.shape)}, whose "
                f"classes are in dimension {axis}; pass one class index per position, shape {tuple(expected)}, or say "
                "where the classes are by Categorical(dim=...)"
            )
        flat = None if mask is None else mask.to(outputs.device).reshape(len(outputs), -1)
        return Positions(self, tuple(outputs.shape[1:]), axis - 1, flat), outputs.reshape(len(outputs), -1)

    def _axis(self, outputs: Tensor) -> int:
        """The dimension of the classes, counted from the first.

        Raises:
            ValueError: If the output has no such dimension, or fewer than two classes there.
        """
        axis = self.dim if self.dim > 0 else outputs.ndim + self.dim
        if not 1 <= axis < outputs.ndim or outputs.shape[axis] < 2:
            raise ValueError(
                f"model output has shape {tuple(outputs.shape)}: {self} needs logits of C >= 2 classes in dimension "
                f"{self.dim}; pass Categorical(dim=...) with their dimension"
            )
        return axis

    def natural(self, outputs: Tensor) -> Tensor:
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"model output has shape {tuple(outputs.shape)}: {self} needs logits [N, C] with C >= 2; "
                "for one yes-or-no output use Bernoulli() (BCEWithLogitsLoss)"
            )
        self._axis(outputs)
        return outputs

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        return -(self.statistic(h, y) * h.log_softmax(-1)).sum(-1)

    def mean(self, h: Tensor) -> Tensor:
        return h.softmax(-1)

    def statistic(self, h: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point():
            return y.to(h.dtype)
        return functional.one_hot(y.long(), h.shape[1]).to(h.dtype)

    def sample(self, h: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        cdf = h.softmax(-1).cumsum(-1)
        # Scaled by the last entry, so that rounding in the sum can never select a class of probability zero.
        u = uniform((samples, h.shape[0]), h, generator) * cdf[:, -1]
        return torch.searchsorted(cdf, u.T.contiguous(), right=True).clamp_max(h.shape[1] - 1).T

    def residual(self, h: Tensor, y: Tensor) -> Tensor:
        p = h.softmax(-1)
        if y.is_floating_point():
            return p - y.to(h.dtype)
        return torch.where(functional.one_hot(y.long(), h.shape[1]).bool(), -_others(p, p), p)

    def covariance_diagonal(self, h: Tensor) -> Tensor:
        p = h.softmax(-1)
        return p * _others(p, p)

    def apply_factor(self, h: Tensor, v: Tensor) -> Tensor:
        # S = Diag(sqrt p) - p sqrt(p)^T, so that S S^T = Diag(p) - p p^T.
        p = h.softmax(-1)
        scaled = p.sqrt() * v
        return scaled * _others(p, p) - p * _others(scaled, p)

    def covariance_spectrum(self, h: Tensor) -> Interval:
        # Adding a constant to the logits changes nothing, so (1, ..., 1) is always in the kernel.
        upper = torch.linalg.eigvalsh(self.covariance(h))[:, -1]
        return Interval(torch.zeros_like(upper), upper)

    def covariance_bound(self, h: Tensor) -> Tensor:
        """m(x) = min(p_max, 1 - |p|^2), Theorem 5.2."""
        return torch.minimum(h.softmax(-1).amax(-1), self.covariance_diagonal(h).sum(-1))

    def radius(self, h: Tensor) -> Tensor:
        """B = max_y |e_y - p|^2 = 1 - 2 p_min + |p|^2 [ours]."""
        p = h.softmax(-1)
        return 1 - 2 * p.amin(-1) + p.square().sum(-1)

    def quartic(self, h: Tensor) -> Quartic:
        # E_y[(u^T (e_y - p))^4] - (u^T I u)^2, the label enumerated.
        p = h.softmax(-1)
        return Quartic(-1.0, p.T, torch.where(unit_columns(h).bool(), _others(p, p), -p), shares=p.T)

    def quartic_spectrum(self, h: Tensor, *, tight: bool = False) -> Interval:
        """Theorem 5.2: ``2 m(x)``. With ``tight``: ``B m(x)`` [ours], and the exact value for two classes."""
        if tight and h.shape[1] == 2:
            p = h.softmax(-1)
            upper = 4 * p.prod(-1) * (p[:, 0] - p[:, 1]).square()
        else:
            upper = (self.radius(h) if tight else 2.0) * self.covariance_bound(h)
        return Interval(torch.zeros_like(upper), upper)

    def valid_targets(self, h: Tensor, y: Tensor) -> Tensor:
        n, classes = h.shape
        if y.is_complex():
            raise ValueError(f"targets has type {y.dtype}; pass class indices as integers")
        if y.is_floating_point():
            if y.shape != h.shape:
                raise ValueError(
                    f"targets has shape {tuple(y.shape)} and type {y.dtype}; pass class indices [{n}] as integers, "
                    f"or class probabilities [{n}, {classes}]"
                )
            if not ((y >= 0).all() and torch.allclose(y.sum(-1), torch.ones_like(y[:, 0]), atol=1e-4)):
                raise ValueError("targets holds class probabilities that are negative or do not sum to 1")
            return y
        if y.shape != (n,):
            raise ValueError(f"targets has shape {tuple(y.shape)}; pass one class index per input, shape ({n},)")
        if y.numel() and (int(y.min()) < 0 or int(y.max()) >= classes):
            wrong = y[(y < 0) | (y >= classes)][0].item()
            raise ValueError(f"targets contains {wrong}, outside the classes 0..{classes - 1} of the model's output")
        return y


def _others(values: Tensor, p: Tensor) -> Tensor:
    """For each class the sum of the other classes' ``values``: of p itself that is 1 - p.

    Not by subtraction for the likeliest class: it is what a certain prediction leaves of it that the Fisher information
    is made of, and ``1 - p`` has no digits there.
    """
    top = p.argmax(-1, keepdim=True).expand(*values.shape[:-1], 1)
    rest = values.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    return (rest + values.gather(-1, top) - values).scatter(-1, top, rest)


class Bernoulli(Independent):
    """Independent yes-or-no labels, from logits: the likelihood of `torch.nn.BCEWithLogitsLoss`."""

    def log_partition(self, h: Tensor) -> Tensor:
        return functional.softplus(h)

    def mean(self, h: Tensor) -> Tensor:
        return h.sigmoid()

    def second_cumulant(self, h: Tensor) -> Tensor:
        return h.sigmoid() * (-h).sigmoid()

    def fourth_cumulant(self, h: Tensor) -> Tensor:
        v = self.second_cumulant(h)
        return v * (1 - 6 * v)

    def radius(self, h: Tensor) -> Tensor:
        return h.abs().sigmoid().square().sum(-1)

    def sample(self, h: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        return (uniform((samples, *h.shape), h, generator) < h.sigmoid()).to(h.dtype)

    def valid_targets(self, h: Tensor, y: Tensor) -> Tensor:
        y = super().valid_targets(h, y)
        if ((y < 0) | (y > 1)).any():
            raise ValueError("targets contains values outside [0, 1]; Bernoulli() takes probabilities or 0/1 labels")
        return y


class Gaussian(Independent):
    """Real labels around the predicted mean, the likelihood of squared loss.

    Args:
        variance: The variance of each label, the same for all; or ``"estimated"``, which the optimizers read off the
            residuals as training goes on (functions without labels refuse it).

    Raises:
        ValueError: If ``variance`` is neither a positive number nor ``"estimated"``.
    """

    def __init__(self, variance: float | str = 1.0) -> None:
        valid = (isinstance(variance, str) and variance == "estimated") or (
            isinstance(variance, int | float)
            and not isinstance(variance, bool)
            and math.isfinite(variance)
            and variance > 0
        )
        if not valid:
            raise ValueError(f"variance={variance!r}: pass a positive number or 'estimated'")
        self.variance = variance

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance!r})"

    def with_variance(self, variance: float | str) -> Gaussian:
        """The same with another variance, for the same loss."""
        other = Gaussian(variance)
        other.reduction = self.reduction
        return other

    def noise(self, h: Tensor) -> float:
        """The variance of each label given ``h``.

        Raises:
            ValueError: If the variance is to be estimated: that takes residuals, which only an optimizer sees.
        """
        if isinstance(self.variance, str):
            raise ValueError(
                "Gaussian(variance='estimated') has no variance outside an optimizer; pass Gaussian(variance=<number>)"
            )
        return float(self.variance)

    def log_partition(self, h: Tensor) -> Tensor:
        return h.square() / (2 * self.noise(h))

    def log_base_measure(self, y: Tensor) -> Tensor:
        noise = self.noise(y)
        return -y.square() / (2 * noise) - 0.5 * math.log(2 * math.pi * noise)

    def statistic(self, h: Tensor, y: Tensor) -> Tensor:
        return super().statistic(h, y) / self.noise(h)

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        # The completed square: the general form loses digits where h and y are large and close.
        noise = self.noise(h)
        squares = (h - y.to(h.dtype).reshape(h.shape)).square()
        return (squares / (2 * noise) + 0.5 * math.log(2 * math.pi * noise)).sum(-1)

    def mean(self, h: Tensor) -> Tensor:
        return h / self.noise(h)

    def second_cumulant(self, h: Tensor) -> Tensor:
        return torch.full_like(h, 1 / self.noise(h))

    def fourth_cumulant(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)

    def sample(self, h: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        return h + math.sqrt(self.noise(h)) * normal((samples, *h.shape), h, generator)


class Poisson(Independent):
    """Independent counts, from log rates: the likelihood of `torch.nn.PoissonNLLLoss` with ``log_input=True``."""

    def log_partition(self, h: Tensor) -> Tensor:
        return h.exp()

    def log_base_measure(self, y: Tensor) -> Tensor:
        return -torch.lgamma(y + 1)

    def mean(self, h: Tensor) -> Tensor:
        return h.exp()

    def second_cumulant(self, h: Tensor) -> Tensor:
        return h.exp()

    def fourth_cumulant(self, h: Tensor) -> Tensor:
        return h.exp()

    def sample(self, h: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        device = h.device if generator is None else generator.device
        rate = h.exp().expand(samples, *h.shape).to(device)
        return torch.poisson(rate, generator=generator).to(h.device)

    def valid_targets(self, h: Tensor, y: Tensor) -> Tensor:
        y = super().valid_targets(h, y)
        if (y < 0).any():
            raise ValueError("targets contains negative values; Poisson() takes counts")
        return y
