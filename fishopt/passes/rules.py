"""How each kind of call turns what comes down to its output into the per-input gradients of a parameter in it.

A new layer is one function with the `rule` decorator, here or in your own code. It must be affine in each of its
operands. One that raises, or disagrees with autograd, is passed over: the log tells, at the level of debugging. Where
`structure.py` does not list the name of its node in autograd's graph, I2 takes it for curved, which is dearer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fishopt.passes.gradients import Formed, PerInput, RankOne, Scattered, Summed, Transposed

Rule = Callable[[Any, str, Tensor, int], PerInput]
"""``rule(call, operand, g, power)``.

Args:
    call: The call's arguments by name, None where one was not given; tensors of data have their inputs in front,
        ``[N, ...]``. Also ``function``, what was called; ``shape``, of its output; ``layout``, where inputs lie there.
    operand: Which of them is the parameter.
    g: Cotangents at the output, ``[K, N, ...]``.
    power: Take what the parameter multiplies to this power: 1 for gradients. With 2, and ``g`` the diagonal of the
        output's Hessian, the result is the diagonal of the parameter's.

Returns:
    `Formed` for gradients that are small; `RankOne` where each is one outer product, `Summed` of several; `Scattered`
    for rows of a table.
"""


@dataclass(frozen=True)
class Entry:
    """A rule and what it is for.

    Attributes:
        rule: The rule.
        data: Arguments that may be data.
        operands: Arguments that may be parameters.
        names: All arguments that it takes, in order.
        positions: Whether it takes tensors with several positions per input in front, ``[N, P, ...]``.
        entrywise: Whether, where the output is ``[N, O]``, each gradient is one entry of ``g`` times something.
    """

    rule: Rule
    data: tuple[str, ...]
    operands: tuple[str, ...]
    names: tuple[str, ...]
    positions: bool
    entrywise: bool


RULES: dict[Any, list[Entry]] = {}


def rule(
    functions: list[Any], names: str, data: str, operands: str, *, positions: bool = False, entrywise: bool = False
) -> Any:
    """Registers a rule for functions of torch.

    Args:
        functions: As a program calls them.
        names: Their arguments in order.
        data: Those that may be data.
        operands: Those that may be parameters.
        positions: See `Entry`.
        entrywise: See `Entry`.
    """

    def register(function: Rule) -> Rule:
        for called in functions:
            listed = [tuple(words.split()) for words in (data, operands, names)]
            entry = Entry(function, listed[0], listed[1], listed[2], positions=positions, entrywise=entrywise)
            RULES.setdefault(called, []).append(entry)
        return function

    return register


@rule([functional.linear], "input weight bias", "input", "weight bias", positions=True, entrywise=True)
def linear(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """``z = W a + b``, at one or more positions per input."""
    if operand == "bias":
        return Formed(g.flatten(2, -2).sum(2) if g.ndim > 3 else g)
    return _outer(g, call.input, call.weight.shape, power)


@rule(
    [torch.matmul, torch.mm, Tensor.matmul, Tensor.mm], "input other", "input", "other", positions=True, entrywise=True
)
def product(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """``z = a W``, at one or more positions per input."""
    return Transposed(_outer(g, call.input, call.other.mT.shape, power))


@rule([torch.addmm, Tensor.addmm], "input mat1 mat2", "mat1", "mat2", positions=True, entrywise=True)
@rule([torch.addmm, Tensor.addmm], "input mat1 mat2", "mat1", "input", positions=True)
def added_product(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """``z = a W + b``, as some transformers write it."""
    if operand == "input":
        return Formed(_summed_to(g, call.input.shape))
    return Transposed(_outer(g, call.mat1, call.mat2.mT.shape, power))


def _outer(g: Tensor, a: Tensor, shape: torch.Size, power: int) -> PerInput:
    if a.ndim == 2:
        return RankOne(g, a**power, shape)
    left, right = g.flatten(2, -2).mT[:, :, None], a.flatten(1, -2).mT[:, None]
    return Summed(lambda rows: left[:, rows], lambda rows: right[rows] ** power, len(g), len(a), shape, a[0].numel())


_CONVOLUTION = "input weight bias stride padding dilation groups"


@rule([torch.conv1d, torch.conv2d, torch.conv3d], _CONVOLUTION, "input", "weight bias")
def convolution(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """``z = W * a + b``: one outer product for each position of the kernel."""
    g = g.flatten(3)
    if operand == "bias":
        return Formed(g.sum(3))
    how = _Kernel.of(call, call.weight.shape[2:])
    left = g.unflatten(2, (how.groups, -1))
    return Summed(
        lambda rows: left[:, rows],
        lambda rows: how.patches(call.input[rows] ** power).unflatten(1, (how.groups, -1)),
        len(g),
        len(call.input),
        call.weight.shape,
        call.input.shape[1] * prod(how.size) * g.shape[-1],
    )


_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"


@rule([torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d], _TRANSPOSED, "input", "weight bias")
def transposed_convolution(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """The convolution that takes ``g`` back to the input's positions, with ``a`` in the place of its cotangent."""
    if operand == "bias":
        return Formed(g.flatten(3).sum(3))
    a, columns, positions = call.input, len(g), call.input[0, 0].numel()
    how = _Kernel.of(call, call.weight.shape[2:])
    left = (a.flatten(2) ** power).unflatten(1, (how.groups, -1))

    def patches(rows: slice) -> Tensor:
        found = how.patches(g[:, rows].flatten(0, 1))[..., :positions]
        return found.reshape(columns, -1, how.groups, found.shape[1] // how.groups, positions)

    return Summed(
        lambda rows: left[rows].expand(columns, *left[rows].shape),
        patches,
        columns,
        len(a),
        call.weight.shape,
        columns * g.shape[2] * prod(how.size) * positions,
    )


@rule(
    [functional.batch_norm],
    "input running_mean running_var weight bias training momentum eps",
    "input",
    "weight bias",
    entrywise=True,
)
def batch_norm(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """In eval mode: a scale and a shift of each channel."""
    if operand == "weight":
        a = call.input
        shape = (1, -1, *[1] * (a.ndim - 2))
        mean, variance = call.running_mean.view(shape), call.running_var.view(shape)
        g = g * ((a - mean) / (variance + call.eps).sqrt()) ** power
    return Formed(_of_channels(g))


@rule([functional.prelu, torch.prelu], "input weight", "input", "weight")
def prelu(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """A slope of each channel, or of all, for what is negative."""
    g = _of_channels(g * call.input.clamp_max(0) ** power)
    return Formed(g if call.weight.numel() > 1 else g.sum(2, keepdim=True))


@rule([functional.group_norm], "input num_groups weight bias eps", "input", "weight bias")
def group_norm(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """A scale and a shift of each channel, after each group of them was normalised."""
    if operand == "weight":
        g = g * functional.group_norm(call.input, call.num_groups, eps=_number(call.eps, 1e-5)) ** power
    return Formed(_of_channels(g))


@rule([functional.layer_norm], "input normalized_shape weight bias eps", "input", "weight bias", positions=True)
def layer_norm(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """A scale and a shift of each entry, after they were normalised together."""
    shape = tuple(call.normalized_shape)
    if operand == "weight":
        g = g * functional.layer_norm(call.input, shape, eps=_number(call.eps, 1e-5)) ** power
    return Formed(_summed_to(g, torch.Size(shape)))


@rule([functional.rms_norm], "input normalized_shape weight eps", "input", "weight", positions=True)
def rms_norm(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """A scale of each entry, after they were divided by their root mean square."""
    shape = tuple(call.normalized_shape)
    return Formed(_summed_to(g * functional.rms_norm(call.input, shape, eps=call.eps) ** power, torch.Size(shape)))


@rule(
    [functional.embedding],
    "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "input",
    "weight",
    positions=True,
)
def embedding(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """A row of a table at each position; that of the padding has no gradient."""
    padding = call.padding_idx
    without = None if padding is None else padding % call.weight.shape[0]
    index = call.input.reshape(len(call.input), -1)
    return Scattered(index, g.reshape(*g.shape[:2], index.shape[1], -1), call.weight.shape, without)


@rule([torch.add, Tensor.add, torch.sub, Tensor.sub], "input other alpha", "input other", "input other", positions=True)
def addition(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """``z = a + alpha b``, broadcast."""
    factor = 1 if operand == "input" or call.alpha is None else call.alpha
    minus = operand == "other" and call.function in {torch.sub, Tensor.sub}
    return Formed(_broadcast(call, operand, g) * (-factor if minus else factor) ** power)


@rule([torch.mul, Tensor.mul], "input other", "input other", "input other", positions=True)
def multiplication(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """``z = a b``, entry by entry, broadcast."""
    a = call.other if operand == "input" else call.input
    if not isinstance(a, Tensor) or a.ndim != g.ndim - 1:
        raise NotImplementedError
    return Formed(_broadcast(call, operand, g * a**power))


@rule([Tensor.expand, Tensor.repeat, torch.broadcast_to], "input", "", "input", positions=True)
def expansion(call: Any, operand: str, g: Tensor, power: int) -> PerInput:
    """The same for every input."""
    return Formed(_broadcast(call, operand, g))


def _broadcast(call: Any, operand: str, g: Tensor) -> Tensor:
    """Cotangents at what an operand was broadcast to, summed over what it was broadcast along."""
    shape = getattr(call, operand).shape
    full = (1,) * (len(call.shape) - len(shape)) + tuple(shape)
    fits = all(own in (1, size) for own, size in zip(full, call.shape, strict=True))
    if not fits or full[call.layout.axis] != 1:
        raise NotImplementedError
    rest = (*([1] if call.layout.merged else []), *full[: call.layout.axis], *full[call.layout.axis + 1 :])
    return _summed_to(g, torch.Size(rest)).reshape(*g.shape[:2], *shape)


def _of_channels(g: Tensor) -> Tensor:
    return g.flatten(3).sum(3) if g.ndim > 3 else g


def _summed_to(g: Tensor, shape: torch.Size) -> Tensor:
    """``[K, N, ...]`` summed to ``[K, N, *shape]``, as what was broadcast from that shape is."""
    g = g.reshape(*g.shape[:2], *[1] * (len(shape) - g.ndim + 2), *g.shape[2:])
    extra = g.ndim - 2 - len(shape)
    if extra:
        g = g.flatten(2, 1 + extra).sum(2)
    repeated = [i + 2 for i, size in enumerate(shape) if size == 1 and g.shape[i + 2] > 1]
    return g.sum(repeated, keepdim=True) if repeated else g


def _number(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass(frozen=True)
class _Kernel:
    """A convolution's window."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, call: Any, size: torch.Size) -> _Kernel:
        stride, dilation = (_tuple(value, 1, len(size)) for value in (call.stride, call.dilation))
        if call.padding == "same":
            total = [d * (s - 1) for d, s in zip(dilation, size, strict=True)]
            padding = tuple((t // 2, t - t // 2) for t in total)
        else:
            padding = tuple((p, p) for p in _tuple(0 if call.padding == "valid" else call.padding, 0, len(size)))
        return cls(tuple(size), stride, padding, dilation, 1 if call.groups is None else call.groups)

    def patches(self, a: Tensor) -> Tensor:
        """What each position of the kernel sees: ``[n, C * kernel, P]``."""
        # Views, and one copy at the end: several times as fast as im2col on a CPU.
        axes = len(self.size)
        seen = functional.pad(a, [p for both in reversed(self.padding) for p in both])
        for axis, (size, dilation, stride) in enumerate(zip(self.size, self.dilation, self.stride, strict=True), 2):
            seen = seen.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        n, channels = a.shape[:2]
        positions, kernel = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
        return seen.permute(0, 1, *kernel, *positions).reshape(n, channels * prod(self.size), -1)


def _tuple(value: Any, default: int, length: int) -> tuple[int, ...]:
    value = default if value is None else value
    listed = (value,) * length if isinstance(value, int) else tuple(value)
    return listed * length if len(listed) == 1 else listed
