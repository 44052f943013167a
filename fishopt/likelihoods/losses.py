"""From what a user has at hand, a torch loss or a name, to the likelihood behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fishopt.likelihoods.base import Likelihood, Reduction
from fishopt.likelihoods.families import Bernoulli, Categorical, Gaussian, Poisson

BY_NAME: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "poisson": Poisson,
}


class MeanSquaredError(Gaussian):
    """The Gaussian whose NLL, averaged over inputs, has the gradient of ``nn.MSELoss()``: variance D/2, D outputs."""

    def noise(self, h: Tensor) -> float:
        return h.shape[-1] / 2


class CrossEntropy(Categorical):
    """The categorical likelihood, from a loss that does not tell in which dimension a model's output has the classes.

    In the last, as language models do; but maps ``[N, C, H, W]`` are as likely as ``[N, H, W, C]``, so these need
    `Categorical` by name.
    """

    def at(self, outputs: Tensor, mask: Tensor | None = None) -> tuple[Likelihood, Tensor]:
        if outputs.ndim > 3:
            raise ValueError(
                f"model output has shape {tuple(outputs.shape)}, and CrossEntropyLoss does not tell where its classes "
                "are; pass fishopt.Categorical(dim=1) for [N, C, ...] or fishopt.Categorical(dim=-1) for [N, ..., C]"
            )
        return super().at(outputs, mask)


def from_loss(loss: nn.Module) -> Likelihood:
    """The likelihood whose negative log-likelihood a torch loss computes, up to constants.

    Args:
        loss: ``nn.CrossEntropyLoss`` (Categorical, with its ``ignore_index`` and the classes in the output's last
            dimension), ``nn.BCEWithLogitsLoss`` (Bernoulli), ``nn.PoissonNLLLoss`` with
            ``log_input=True`` (Poisson), or ``nn.MSELoss``: the Gaussian whose mean NLL has the loss's gradient, of
            variance D/2 over D outputs for ``reduction="mean"`` and 1/2 for ``"sum"``. ``reduction="none"`` is
            taken as a mean that the user writes.

    Raises:
        ValueError: If no likelihood stands behind the loss.
        TypeError: If ``loss`` is not a module.
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss={loss!r}: pass a torch loss module such as nn.CrossEntropyLoss()")
    for kind, convert in _CONVERSIONS.items():
        if isinstance(loss, kind):
            return convert(loss)
    hint = _HINTS.get(type(loss), "pass a Likelihood: fishopt.Categorical(), Bernoulli(), Gaussian(), Poisson()")
    raise ValueError(f"likelihood={type(loss).__name__}() stands for no likelihood that fishopt knows; {hint}")


def as_likelihood(likelihood: Any) -> Likelihood:
    """A `Likelihood` from itself, its name, or the loss module in use.

    Raises:
        ValueError: If the name or the loss is unknown.
        TypeError: If ``likelihood`` is none of the three.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        if likelihood not in BY_NAME:
            raise ValueError(f"likelihood={likelihood!r} is unknown; pass one of {sorted(BY_NAME)} or a Likelihood")
        return BY_NAME[likelihood]()
    if isinstance(likelihood, nn.Module):
        return from_loss(likelihood)
    if isinstance(likelihood, type) and issubclass(likelihood, Likelihood | nn.Module):
        raise TypeError(f"likelihood={likelihood.__name__} is a class; pass an instance, {likelihood.__name__}()")
    raise TypeError(
        f"likelihood={likelihood!r}: pass a Likelihood, one of the names {sorted(BY_NAME)}, or a torch loss module"
    )


def _reduction(loss: Any) -> Reduction:
    """Losses that reduce over outputs as well as inputs; ``"none"`` is taken as a mean that the user writes."""
    return "sum" if loss.reduction == "sum" else "mean"


def _refuse_weights(loss: Any, *names: str) -> None:
    for name in names:
        if getattr(loss, name, None) is not None:
            raise ValueError(
                f"likelihood={type(loss).__name__}({name}=...) is not a likelihood; to use the unweighted model's "
                f"Fisher information pass {_CONVERSIONS[_kind(loss)](_kind(loss)())!r}"
            )


def _kind(loss: nn.Module) -> type[nn.Module]:
    return next(kind for kind in _CONVERSIONS if isinstance(loss, kind))


def _from_cross_entropy(loss: Any) -> Likelihood:
    _refuse_weights(loss, "weight")
    likelihood = CrossEntropy(ignore_index=loss.ignore_index)
    likelihood.reduction = "sum" if loss.reduction == "sum" else "batchmean"
    return likelihood


def _from_binary_cross_entropy(loss: Any) -> Likelihood:
    _refuse_weights(loss, "weight", "pos_weight")
    likelihood = Bernoulli()
    likelihood.reduction = _reduction(loss)
    return likelihood


def _from_squared_error(loss: Any) -> Likelihood:
    if loss.reduction == "sum":
        likelihood = Gaussian(variance=0.5)
        likelihood.reduction = "sum"
        return likelihood
    return MeanSquaredError()


def _from_poisson(loss: Any) -> Likelihood:
    if not loss.log_input:
        raise ValueError(
            "likelihood=PoissonNLLLoss(log_input=False) is not in natural parameters; let the model predict the log "
            "rate and use PoissonNLLLoss(log_input=True)"
        )
    likelihood = Poisson()
    likelihood.reduction = _reduction(loss)
    return likelihood


_CONVERSIONS: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.CrossEntropyLoss: _from_cross_entropy,
    nn.BCEWithLogitsLoss: _from_binary_cross_entropy,
    nn.MSELoss: _from_squared_error,
    nn.PoissonNLLLoss: _from_poisson,
}

_HINTS: dict[type[nn.Module], str] = {
    nn.NLLLoss: "let the model return logits and use nn.CrossEntropyLoss()",
    nn.BCELoss: "let the model return logits and use nn.BCEWithLogitsLoss()",
    nn.L1Loss: "pass fishopt.Gaussian(variance='estimated') for the curvature of squared loss instead",
    nn.SmoothL1Loss: "pass fishopt.Gaussian(variance='estimated') for the curvature of squared loss instead",
    nn.HuberLoss: "pass fishopt.Gaussian(variance='estimated') for the curvature of squared loss instead",
    nn.GaussianNLLLoss: "pass fishopt.Gaussian(variance=...) and let the model predict the mean alone",
}
