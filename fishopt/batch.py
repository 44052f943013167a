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

MAX_ACTIVATIONS = 2**24
"""Numbers that the modules with parameters may put out for one chunk of inputs."""


class NonFiniteError(ValueError):
    """Inputs or outputs are NaN or infinite."""


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
                raise NonFiniteError("inputs contains NaN or infinite values; remove these inputs first")

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
        """How the output depends on each parameter.

        Raises:
            ValueError: If the model cannot be run on the inputs, or its output is of no use.
        """
        return self.shadow.structure(self.inputs)

    def chunks(self, names: Sequence[str], *, per_input: bool = False) -> Iterator[Chunk]:
        """Passes over the batch for the parameters ``names``, some inputs at a time so that memory is bounded.

        No names, no passes; but the network's output is checked all the same.

        Args:
            names: Parameters.
            per_input: Whether values per input will be asked for, or sums of their squares, which can take more memory.

        Raises:
            ValueError: If the network's output does not fit the likelihood.
        """
        if not names:
            with torch.no_grad():
                self._natural(self.shadow.module(*self.inputs), len(self))
            return
        step = max(1, MAX_ACTIVATIONS // max(self.structure.activations, 1))
        if per_input:
            size = sum(self.shadow.parameters[name].numel() for name in names)
            step = max(1, min(step, MAX_ELEMENTS // max(size, 1)))
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            part = tuple(x[rows] for x in self.inputs)
            with open_pass(self.shadow, part, names) as through:
                yield Chunk(through, self._natural(through.outputs, len(part[0])), rows)

    def zeros(self, names: Sequence[str]) -> Diagonal:
        """A diagonal of zeros."""
        return {name: torch.zeros_like(self.shadow.parameters[name]) for name in names}

    def _natural(self, outputs: Tensor, count: int) -> Tensor:
        h = self.likelihood.natural(outputs)
        if len(h) != count:
            raise ValueError(f"model output has {len(h)} rows for {count} inputs; pass one row per input")
        if not torch.isfinite(h).all():
            raise NonFiniteError("model output contains NaN or infinite values; look at its parameters and inputs")
        self.width = h.shape[1]
        return h


def checked_model(model: Any) -> nn.Module:
    """The model, if curvature can be computed for it.

    Raises:
        TypeError: If it is not a module, is compiled by TorchScript, or has sparse or complex parameters.
        ValueError: If nothing in it is trainable, or it couples inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: pass the torch.nn.Module itself, not its parameters")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, which cannot be copied with shared weights; pass the nn.Module")
    _check_parts(model)
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


def _check_parts(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model part {path!r} normalises by the batch in eval mode too, which couples inputs; build it with "
                "track_running_stats=True"
            )
        if getattr(module, "sparse", False) is True:
            raise TypeError(f"model part {path!r} has sparse gradients; build it with sparse=False")


def checked_inputs(inputs: Any) -> tuple[Tensor, ...]:
    """The network's positional arguments as a tuple of tensors of the same length.

    Raises:
        TypeError: If they are not tensors.
        ValueError: If they are empty or differ in length.
    """
    parts = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not parts:
        raise ValueError(f"inputs={inputs!r} is empty; pass a tensor, or a tuple of tensors, one row per input")
    for x in parts:
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs holds a {type(x).__name__}; pass a tensor, or a tuple of them, one row per input")
        if x.ndim == 0:
            raise ValueError("inputs holds a tensor without dimensions; pass one row per input")
    lengths = sorted({len(x) for x in parts})
    if len(lengths) > 1:
        raise ValueError(f"inputs have different numbers of rows {lengths}; pass one row per input in each")
    if lengths == [0]:
        raise ValueError("inputs is empty; pass at least one input")
    # Detached: the inputs may be the outputs of something else in training, where no gradient is to go. Cloned where
    # they were made in inference mode: autograd does not save such tensors.
    return tuple(x.clone() if x.is_inference() else x.detach() for x in parts)


def checked_targets(targets: Any, count: int) -> Tensor:
    """The data's labels, if there is one for each input.

    Raises:
        TypeError: If they are not a tensor.
        ValueError: If there are more or fewer.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}; pass a tensor with one label per input")
    if targets.ndim == 0 or len(targets) != count:
        raise ValueError(f"targets has shape {tuple(targets.shape)} for {count} inputs; pass one label per input")
    return targets


def checked_samples(samples: Any) -> int:
    """The number of labels per input.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples={samples!r}: pass a whole number of labels per input, 1 or more")
    return samples


def checked_generator(generator: Any) -> torch.Generator | None:
    """The source of randomness, None for torch's own.

    Raises:
        TypeError: If it is something else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r}: pass a torch.Generator, such as torch.Generator().manual_seed(0)")
    return generator


def checked_option(name: str, value: Any, known: Sequence[str]) -> str:
    """``value`` if it is one of ``known``.

    Raises:
        ValueError: Naming the argument, the value and what is known.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is unknown; pass one of {', '.join(map(repr, known))}")
    return value
