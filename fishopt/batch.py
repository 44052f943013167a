"""The one door: a model, a batch of inputs and a likelihood come in here, checked, and leave as passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fishopt.likelihoods import Likelihood, as_likelihood
from fishopt.passes import Diagonal, Pass, Shadow, Structure, open_pass

MAX_ELEMENTS = 2**25
"""Numbers that the per-input quantities of one chunk of inputs may hold."""


class Chunk(NamedTuple):
    """Some of the inputs, taken through the network: the open pass, their natural parameters, and which they are."""

    through: Pass
    h: Tensor
    rows: slice


class Batch:
    """Checked inputs for a network and its likelihood.

    Attributes:
        width: Natural parameters per input, T; known once a chunk has gone through.

    Args:
        shadow: The network.
        inputs: The network's argument, or a tuple of its positional arguments: tensors with one row per input.
        likelihood: The family behind the loss.

    Raises:
        ValueError: If the inputs are empty, differ in length, or contain NaN or infinite values.
        TypeError: If the inputs are not tensors.
    """

    def __init__(self, shadow: Shadow, inputs: Any, likelihood: Likelihood) -> None:
        self.shadow = shadow
        self.inputs = checked_inputs(inputs)
        self.likelihood = likelihood
        self.width = 0
        for x in self.inputs:
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise ValueError("inputs contains NaN or infinite values; remove these inputs first")

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, likelihood: Any) -> Batch:
        """A batch for one call on the user's own network."""
        return cls(Shadow(checked_model(model)), inputs, as_likelihood(likelihood))

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The trainable parameters."""
        return self.shadow.names

    @property
    def structure(self) -> Structure:
        """How the output depends on each parameter."""
        return self.shadow.structure(self.inputs)

    def chunks(self, names: Sequence[str]) -> Iterator[Chunk]:
        """Passes over the batch for the parameters ``names``, a few inputs at a time so that memory is bounded.

        No names, no passes; but the network's output is checked all the same.

        Raises:
            ValueError: If the network's output does not fit the likelihood.
        """
        if not names:
            with torch.no_grad():
                self._natural(self.shadow.module(*self.inputs), len(self))
            return
        parameters = dict(self.shadow.module.named_parameters())
        size = sum(parameters[name].numel() for name in names)
        step = max(1, MAX_ELEMENTS // size)
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            part = tuple(x[rows] for x in self.inputs)
            with open_pass(self.shadow, part, names) as through:
                yield Chunk(through, self._natural(through.outputs, len(part[0])), rows)

    def zeros(self, names: Sequence[str]) -> Diagonal:
        """A diagonal of zeros."""
        parameters = dict(self.shadow.module.named_parameters())
        return {name: torch.zeros_like(parameters[name]) for name in names}

    def _natural(self, outputs: Any, count: int) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"model output is a {type(outputs).__name__}; fishopt needs the natural parameters as one tensor"
            )
        h = self.likelihood.natural(outputs)
        if len(h) != count:
            raise ValueError(f"model output has {len(h)} rows for {count} inputs; pass one row per input")
        self.width = h.shape[1]
        return h


def checked_model(model: Any) -> nn.Module:
    """The model, if curvature can be computed for it.

    Raises:
        TypeError: If it is not a module, or has sparse or complex parameters.
        ValueError: If nothing in it is trainable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: pass the torch.nn.Module itself, not its parameters")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("model has no trainable parameter; set requires_grad on what is to be trained")
    for name, p in trainable.items():
        if is_lazy(p):
            raise ValueError(f"model parameter {name!r} is not initialized; run one forward pass first")
        if p.is_complex() or p.layout != torch.strided:
            kind = "complex" if p.is_complex() else "sparse"
            raise TypeError(f"model parameter {name!r} is {kind}; fishopt needs dense real parameters")
    return model


def checked_inputs(inputs: Any) -> tuple[Tensor, ...]:
    """The network's positional arguments as a tuple of tensors of the same length.

    Raises:
        TypeError: If they are not tensors.
        ValueError: If they are empty or differ in length.
    """
    parts = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not parts or not all(isinstance(x, Tensor) for x in parts):
        raise TypeError(f"inputs is a {type(inputs).__name__}; pass a tensor, or a tuple of tensors, one row per input")
    lengths = {len(x) if x.ndim else 0 for x in parts}
    if len(lengths) > 1:
        raise ValueError(f"inputs have different numbers of rows {sorted(lengths)}; pass one row per input in each")
    if lengths == {0}:
        raise ValueError("inputs is empty; pass at least one input")
    return parts


def checked_option(name: str, value: Any, known: Sequence[str]) -> str:
    """``value`` if it is one of ``known``.

    Raises:
        ValueError: Naming the argument, the value and what is known.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is unknown; pass one of {', '.join(map(repr, known))}")
    return value
