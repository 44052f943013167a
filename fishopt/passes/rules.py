"""How each kind of module turns what comes down to its output into its parameters' per-input gradients.

A new layer is one function here, entered into `RULES`. It must be affine in each of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from fishopt.passes.gradients import Formed, PerInput, RankOne, Summed

Rule = Callable[[Any, str, Tensor, Tensor, int], PerInput]
"""``rule(module, parameter, a, g, power)``.

Args:
    module: The module.
    parameter: Its parameter's own name, such as "weight".
    a: The module's input, ``[N, ...]``.
    g: Cotangents at its output, ``[K, N, ...]``.
    power: Take what the parameter multiplies to this power: 1 for gradients. With 2, and ``g`` the diagonal of the
        output's Hessian, the result is the diagonal of the parameter's.
"""


def linear(module: nn.Linear, parameter: str, a: Tensor, g: Tensor, power: int) -> PerInput:
    """``z = W a + b``, at one or more positions per input."""
    if parameter == "bias":
        return Formed(g.flatten(2, -2).sum(2) if g.ndim > 3 else g)
    if a.ndim == 2:
        return RankOne(g, a**power, module.weight.shape)
    left, right = g.flatten(2, -2).mT[:, :, None], a.flatten(1, -2).mT[:, None]
    shape = module.weight.shape
    return Summed(lambda rows: left[:, rows], lambda rows: right[rows] ** power, len(g), len(a), shape, a[0].numel())


def convolution(module: Any, parameter: str, a: Tensor, g: Tensor, power: int) -> PerInput:
    """``z = W * a + b``: one outer product for each position of the kernel."""
    g = g.flatten(3)
    if parameter == "bias":
        return Formed(g.sum(3))
    groups = module.groups
    left = g.unflatten(2, (groups, -1))
    return Summed(
        lambda rows: left[:, rows],
        lambda rows: _patches(module, a[rows] ** power).unflatten(1, (groups, -1)),
        len(g),
        len(a),
        module.weight.shape,
        module.in_channels * prod(module.kernel_size) * g.shape[-1],
    )


def transposed_convolution(module: Any, parameter: str, a: Tensor, g: Tensor, power: int) -> PerInput:
    """The convolution that takes ``g`` back to the input's positions, with ``a`` in the place of its cotangent."""
    if parameter == "bias":
        return Formed(g.flatten(3).sum(3))
    groups, columns, positions = module.groups, len(g), a[0, 0].numel()
    left = (a.flatten(2) ** power).unflatten(1, (groups, -1))

    def patches(rows: slice) -> Tensor:
        found = _patches(module, g[:, rows].flatten(0, 1))[..., :positions]
        return found.reshape(columns, -1, groups, found.shape[1] // groups, positions)

    return Summed(
        lambda rows: left[rows].expand(columns, *left[rows].shape),
        patches,
        columns,
        len(a),
        module.weight.shape,
        columns * module.out_channels * prod(module.kernel_size) * positions,
    )


def batch_norm(module: Any, parameter: str, a: Tensor, g: Tensor, power: int) -> PerInput:
    """In eval mode: a scale and a shift of each channel."""
    if parameter == "weight":
        shape = (1, -1, *[1] * (a.ndim - 2))
        mean, variance = module.running_mean.view(shape), module.running_var.view(shape)
        g = g * ((a - mean) / (variance + module.eps).sqrt()) ** power
    return Formed(g.flatten(3).sum(3) if g.ndim > 3 else g)


def _patches(module: Any, a: Tensor) -> Tensor:
    """What each position of the kernel sees: ``[n, C * kernel, P]``."""
    # Views, and one copy at the end: several times as fast as im2col on a CPU.
    axes = len(module.kernel_size)
    seen = functional.pad(a, [p for p in reversed(module.padding) for _ in range(2)])
    for axis, (size, dilation, stride) in enumerate(
        zip(module.kernel_size, module.dilation, module.stride, strict=True), start=2
    ):
        seen = seen.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    n, channels = a.shape[:2]
    positions, kernel = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    patches = seen.permute(0, 1, *kernel, *positions)
    return patches.reshape(n, channels * prod(module.kernel_size), -1)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), batch_norm),
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module, by its exact class: a subclass may compute something else."""
    return RULES.get(type(module)) if pads_with_zeros(module) else None


def pads_with_zeros(module: nn.Module) -> bool:
    """Whether a convolution pads with zeros, by a number, as patches of its input are; true of other modules."""
    return not isinstance(module, _ConvNd) or (module.padding_mode == "zeros" and not isinstance(module.padding, str))
