"""The one door: a model, a batch of inputs and a likelihood come in here, checked, and leave as passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishopt.checks import check_dense, checked_model, checked_targets
from fishopt.likelihoods import Likelihood, as_likelihood
from fishopt.passes import Arguments, Coverage, Diagonal, Pass, Shadow, Structure, coverage_of, open_pass, widened

MAX_ELEMENTS = 2**25
"""Numbers that the per-input quantities of one chunk of inputs may hold."""

MAX_ACTIVATIONS = 2**24
"""Numbers that the modules with parameters may put out for one chunk of inputs."""


@contextmanager
def apart() -> Iterator[None]:
    """Out of the user's inference mode and autocast: curvature takes derivatives, in full precision.

    Also a decorator.
    """
    with ExitStack() as left:
        # Only where it is on: leaving it brings back the grad mode of then, which after an interrupt would come late.
        if torch.is_inference_mode_enabled():
            left.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                left.enter_context(torch.autocast(device, enabled=False))
        yield


class NonFiniteError(ValueError):
    """Inputs or outputs are NaN or infinite."""


class Chunk(NamedTuple):
    """Some of the inputs, taken through the network.

    Attributes:
        through: The open pass.
        likelihood: The family of their labels, with the positions that these have and which of them count.
        h: Its natural parameters, ``[N, T]``.
        rows: Which inputs they are.
    """

    through: Pass
    likelihood: Likelihood
    h: Tensor
    rows: slice


class Batch:
    """Checked inputs for a network and its likelihood.

    Attributes:
        width: Natural parameters per input, T; known once a chunk has gone through.
        positions: Positions of an input's labels, those that do not count included; known by then too.
        may_mask: Whether it was given labels of the kind that tell which of them count.

    Args:
        shadow: The network.
        inputs: The network's argument, a tuple of its positional or a dict of its keyword arguments: tensors with one
            row per input. Or `Arguments` of any kind.
        likelihood: The family behind the loss.
        mask: Which labels count, as booleans of the labels' shape, ``[N, ...]``; all if None.
        targets: The data's labels, to be checked against the network's output.

    Raises:
        ValueError: If the inputs are empty, differ in length, or contain NaN or infinite values, or if no label counts.
        TypeError: If the inputs are not tensors.
    """

    def __init__(
        self,
        shadow: Shadow,
        inputs: Any,
        likelihood: Likelihood,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self.shadow = shadow
        self.inputs = in_full_precision(inputs if isinstance(inputs, Arguments) else checked_inputs(inputs))
        self.likelihood = likelihood
        self.width = 0
        self.positions = 1
        self.may_mask = mask is not None
        if mask is not None and not mask.any():
            raise ValueError("targets holds nothing but labels to be ignored; pass a batch where some label counts")
        # Of one label each that all count nothing is left out, and none of them has positions.
        self._mask = None if mask is None or (mask.ndim < 2 and bool(mask.all())) else mask
        self._targets = targets
        check_finite(self.inputs)
        shadow.sync()

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, likelihood: Any, targets: Any = None) -> Batch:
        """A batch for one call on the user's own network; the data's labels, if given, tell which of them count.

        Raises:
            ValueError: If an argument does not fit.
            TypeError: If one is of the wrong kind.
        """
        shadow, parts, family = Shadow(checked_model(model)), checked_inputs(inputs), as_likelihood(likelihood)
        mask = None if targets is None else family.counted(checked_targets(targets, parts.count))
        return cls(shadow, parts, family, mask, targets)

    def __len__(self) -> int:
        return self.inputs.count

    @property
    def observations(self) -> int:
        """Labels that count, one for each input or position; what a mean loss is the mean over.

        Known once a chunk has gone through.
        """
        return len(self) * self.positions if self._mask is None else int(self._mask.sum())

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

    @property
    def coverage(self) -> Coverage:
        """By which way each parameter's derivatives are found.

        Raises:
            ValueError: If the model overwrites its inputs, or what its gradient needs.
            RuntimeError: As torch raises it.
        """
        if "keeps inputs" not in self.shadow.notes:
            self._check_keeps_inputs()
            self.shadow.notes["keeps inputs"] = True
        try:
            return coverage_of(self.shadow, self.inputs)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise ValueError(f"model overwrites what its gradient needs; use inplace=False there ({error})") from error

    def _check_keeps_inputs(self) -> None:
        """Inputs are used several times; a ReLU in place does no harm, since once is the same as twice.

        Raises:
            ValueError: If using them twice is not the same.
        """
        some = (self.inputs if self.structure.needs_all else self.inputs.first(2)).map(Tensor.clone)
        before = some.map(Tensor.clone)
        with torch.no_grad():
            once, twice = self.shadow.run(some), self.shadow.run(some)
        pairs = zip(before.leaves, some.leaves, strict=True)
        kept = all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
        if not kept and not torch.equal(once, twice):
            raise ValueError("model changes its inputs in place; use inplace=False in its first module")

    def chunks(self, names: Sequence[str], *, per_input: bool = False, columns: bool = False) -> Iterator[Chunk]:
        """Passes over the batch for the parameters ``names``, some inputs at a time so that memory is bounded.

        No names, no passes; but the network's output is checked all the same.

        Args:
            names: Parameters.
            per_input: Whether values per input will be asked for, or sums of their squares, which can take more memory.
            columns: Whether there will be a cotangent for each output of an input.

        Raises:
            ValueError: If the network's output does not fit the likelihood.
        """
        if not names:
            self.look()
            return
        limits = []
        if per_input:
            size = sum(self.shadow.parameters[name].numel() for name in names)
            limits.append(MAX_ELEMENTS // max(size, 1))
        if columns:
            limits.append(MAX_ELEMENTS // self.structure.outputs**2)
        for rows, part in self.parts(*limits):
            with open_pass(self.shadow, part, names) as through:
                yield Chunk(through, *self.bound(through.outputs, rows), rows)

    def look(self) -> None:
        """Takes all of the inputs through the network, so that ``width`` and ``positions`` are known.

        Raises:
            ValueError: If it cannot be run, or its output does not fit the likelihood.
        """
        _ = self.structure  # which says so if the model cannot be run
        with torch.no_grad():
            self.bound(self.shadow.run(self.inputs), slice(0, len(self)))

    def parts(self, *limits: int) -> Iterator[tuple[slice, Arguments]]:
        """The inputs, as many at a time as the memory for activations takes, and no more than any of ``limits``.

        All of them where they cannot be apart, as the network runs on all of them alone, or couples them.
        """
        if self.structure.needs_all or any(map(self.coverage.is_pooled, self.coverage.ways)):
            step = len(self)
        else:
            step = max(1, min(MAX_ACTIVATIONS // max(self.coverage.activations, 1), *limits, len(self)))
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            yield rows, self.inputs if step >= len(self) else self.inputs.take(rows)

    @contextmanager
    def whole(self) -> Iterator[Chunk]:
        """One pass over all of the inputs, for what relates any two of them.

        Raises:
            ValueError: If the network's output does not fit the likelihood.
        """
        rows = slice(0, len(self))
        with open_pass(self.shadow, self.inputs, self.names) as through:
            yield Chunk(through, *self.bound(through.outputs, rows), rows)

    def zeros(self, names: Sequence[str]) -> Diagonal:
        """A diagonal of zeros."""
        return {name: torch.zeros_like(self.shadow.parameters[name]) for name in names}

    def bound(self, outputs: Tensor, rows: slice) -> tuple[Likelihood, Tensor]:
        """The likelihood of some of the inputs, and their natural parameters.

        Raises:
            ValueError: If the output does not fit the likelihood, the inputs or the targets.
            NonFiniteError: If it is NaN or infinite.
        """
        likelihood, h = self.likelihood.at(outputs, None if self._mask is None else self._mask[rows])
        count = len(range(*rows.indices(len(self))))
        if len(h) != count:
            raise ValueError(f"model output has {len(h)} rows for {count} inputs; pass one row per input")
        if not torch.isfinite(h).all():
            raise NonFiniteError("model output contains NaN or infinite values; look at its parameters and inputs")
        if self._targets is not None:
            likelihood.valid_targets(h, self._targets[rows])
        self.width, self.positions = h.shape[1], likelihood.positions
        return likelihood, h


def checked_inputs(inputs: Any) -> Arguments:
    """The network's arguments: tensors of the same length.

    Raises:
        TypeError: If they are not tensors.
        ValueError: If they are empty or differ in length.
    """
    if isinstance(inputs, Mapping | tuple | list) and not inputs:
        raise ValueError(f"inputs={inputs!r} is empty; pass a tensor, or a tuple of tensors, one row per input")
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    parts = tuple(inputs) if isinstance(inputs, tuple | list) else () if named else (inputs,)
    check_rows([*parts, *named.values()])
    return Arguments(parts, named)


def check_rows(listed: Sequence[Any]) -> None:
    """Whether a network's arguments are tensors of the same length.

    Raises:
        TypeError: If they are not tensors.
        ValueError: If they are empty or differ in length.
    """
    if not listed:
        raise ValueError("inputs is empty; pass a tensor, or a tuple of tensors, one row per input")
    for x in listed:
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs holds a {type(x).__name__}; pass a tensor, or a tuple of them, one row per input")
        check_dense("inputs", x)
        if x.ndim == 0:
            raise ValueError("inputs holds a tensor without dimensions; pass one row per input")
    lengths = sorted({len(x) for x in listed})
    if len(lengths) > 1:
        raise ValueError(f"inputs have different numbers of rows {lengths}; pass one row per input in each")
    if lengths == [0]:
        raise ValueError("inputs is empty; pass at least one input")


def check_finite(inputs: Arguments) -> None:
    """Minus infinity passes: attention masks hold it; whether that is of use shows in the output.

    Raises:
        NonFiniteError: If the inputs contain NaN or infinity.
    """
    for x in inputs.leaves:
        if isinstance(x, Tensor) and not (x.isfinite() if x.is_complex() else x < math.inf).all():
            raise NonFiniteError("inputs contains NaN or infinite values; remove these inputs first")


def in_full_precision(inputs: Arguments) -> Arguments:
    """Such that a network in full precision takes them; what inference mode made takes no part in derivatives."""

    def usable(x: Tensor) -> Tensor:
        check_dense("inputs", x)
        return widened(x.clone() if x.is_inference() else x)

    return inputs.map(usable)
