"""A penalty that holds parameters where they matter: elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.passes import unwrapped


def fisher_penalty(model: nn.Module, anchor: Mapping[str, Tensor], diagonal: Mapping[str, Tensor]) -> Tensor:
    """The quadratic penalty of elastic weight consolidation (Eq. 3 of Kirkpatrick et al., PNAS 2017, lambda = 1).

        1/2 sum_i max(F_i, 0) (theta_i - theta*_i)^2

    To second order, and as far as the Fisher matrix is its diagonal, this is the mean KL divergence, in nats per
    observation, between the predictions at ``anchor`` and those now. Laplace's approximation of the posterior after
    ``N_old`` observations adds ``N_old / N_new`` times it to the mean loss over ``N_new``; in practice that factor is
    tuned, and the best one is often larger. For several old tasks add up their diagonals, with the latest anchor.

    An estimate by I2 may have negative entries, under which the loss would fall without end as a parameter runs away.
    They count as zero: no Fisher information is below zero, so that brings each such entry nearer to what it
    estimates. But it biases the diagonal upwards, and leaves those parameters free at every strength: ``"exact"`` and
    ``"hutchinson"`` have no such entries, and protect better.

    Args:
        model: The network in training.
        anchor: Name of each parameter in ``diagonal`` -> its value where that was estimated, such as
            ``{n: p.detach().clone() for n, p in model.named_parameters()}``. Other names are passed over.
        diagonal: Name of a parameter -> an estimate of the Fisher diagonal, of its shape and on its device, as
            `fisher_diagonal` returns it. Parameters that it does not name are free.

    Returns:
        A scalar, differentiable in the model's parameters; on the device of the first one in ``diagonal``.

    Raises:
        TypeError: If ``model``, ``anchor`` or ``diagonal``, or a tensor in one, is of the wrong type.
        ValueError: If names, shapes, devices or values do not fit.
    """
    parameters = _parameters_of(model)
    for argument, given in (("anchor", anchor), ("diagonal", diagonal)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{argument} is a {type(given).__name__}; pass a mapping of parameter names to tensors")
    if not diagonal:
        raise ValueError("diagonal is empty, so nothing would be held; pass what fishopt.fisher_diagonal returns")
    terms, sums = [], []
    for name, fisher in diagonal.items():
        p, start = _entries(name, parameters, anchor, fisher)
        sums.append(fisher.detach().sum() + start.detach().sum())
        step = p.to(fisher.dtype) - start.detach().to(fisher.dtype)
        terms.append((fisher.detach().clamp_min(0) * step.square()).sum())
    # A sum that is not finite has a value that is not, or is too large; it is cheap, and the GPU is waited for once.
    if not bool(_together(sums).isfinite().all()):
        _check_finite(anchor, diagonal)
    return 0.5 * _together(terms).sum()


def _parameters_of(model: Any) -> dict[str, Tensor]:
    """The parameters by the names that `fisher_diagonal` gives them.

    Raises:
        TypeError: If it is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: pass the torch.nn.Module itself, not its parameters")
    return dict(unwrapped(model).named_parameters())


def _entries(
    name: str, parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor], fisher: Any
) -> tuple[Tensor, Tensor]:
    """One parameter and its anchor, if they and its part of the diagonal fit each other.

    Raises:
        ValueError: If one is missing, or the anchor is the parameter itself.
    """
    if name not in parameters:
        raise ValueError(
            f"diagonal has {name!r}, which is no parameter of model; pass a diagonal of this model, "
            f"whose parameters are {_listed(parameters)}"
        )
    if name not in anchor:
        raise ValueError(
            f"anchor has no {name!r}, which diagonal has; pass the values of all parameters in diagonal, "
            f"anchor names {_listed(anchor)}"
        )
    p, start = parameters[name], anchor[name]
    # In half precision `fisher_diagonal` returns float32.
    wider = torch.promote_types(p.dtype, torch.float32)
    _check_fits(f"anchor[{name!r}]", start, p, (p.dtype,))
    _check_fits(f"diagonal[{name!r}]", fisher, p, (p.dtype, wider))
    if _share_memory(start, p):
        raise ValueError(
            f"anchor[{name!r}] shares the parameter's memory and would move with it, as state_dict() does; "
            "pass a copy, p.detach().clone()"
        )
    return p, start


def _check_fits(what: str, x: Any, p: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} is a {type(x).__name__}; pass a tensor of shape {tuple(p.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{what} is of type {x.dtype} for a parameter of type {p.dtype}; convert it, .to({dtypes[-1]})")
    if x.shape != p.shape:
        raise ValueError(
            f"{what} has shape {tuple(x.shape)} for a parameter of shape {tuple(p.shape)}; pass one value each"
        )
    if x.device != p.device:
        raise ValueError(f"{what} is on {x.device} and the parameter on {p.device}; move it, .to({str(p.device)!r})")


def _share_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return a.numel() > 0 and a.data_ptr() == b.data_ptr()
    except RuntimeError:  # under torch.func's transforms, where tensors have no memory of their own
        return False


def _check_finite(anchor: Mapping[str, Tensor], diagonal: Mapping[str, Tensor]) -> None:
    for argument, given in (("diagonal", diagonal), ("anchor", anchor)):
        for name in diagonal:
            bad = int((~given[name].isfinite()).sum())
            if bad:
                raise ValueError(
                    f"{argument}[{name!r}] has {bad} values that are NaN or infinite; take it from a model whose "
                    "parameters and outputs are finite"
                )


def _together(values: list[Tensor]) -> Tensor:
    """Scalars from any devices, on the first one's."""
    return torch.stack([value.to(values[0].device) for value in values])


def _listed(names: Iterable[str]) -> str:
    some = list(names)
    return ", ".join(map(repr, some[:5])) + (", ..." if len(some) > 5 else "") if some else "none"
