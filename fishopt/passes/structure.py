"""What the autograd graph tells about how the output depends on each parameter.

Where ``h`` is affine in every single weight, V2 is zero by structure (Remark 4.4 for the last layer; theory beyond the
paper for piecewise-linear networks, whose kinks are met with probability zero). The graph shows it for any
architecture, custom ``forward`` included, where a list of modules would not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishopt.passes.arguments import Arguments

# Operations through which the output is linear in each differentiable operand, or multilinear in several.
_LINEAR = {
    *("Add", "Sub", "Neg", "Sum", "Mean", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias"),
    *("Squeeze", "Unsqueeze", "Expand", "Cat", "Stack", "Slice", "Select", "Clone", "Alias", "Split", "Unbind"),
    *("SplitWithSizes", "Index", "IndexSelect", "Gather", "Flip", "Roll", "Repeat"),
    *("ConstantPadNd", "AvgPool1D", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D"),
    *("ReflectionPad1D", "ReflectionPad2D", "ReplicationPad2D", "UpsampleNearest2D", "UpsampleBilinear2D"),
    *("PixelShuffle", "Unfold", "Im2Col", "Embedding", "ToCopy", "UnsafeSplit", "Diagonal"),
    *("Addmm", "Mm", "Mv", "Addmv", "Dot", "Bmm", "Baddbmm", "Linear", "Convolution", "Mul", "NativeBatchNorm"),
}
# Operations that are piecewise linear in their one differentiable operand.
_PIECEWISE = {
    *("Relu", "LeakyRelu", "Hardtanh", "Abs", "Threshold", "Clamp", "ClampMin", "Max", "Amax", "Min", "Amin"),
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "Maximum", "Minimum", "PreluKernel"),
    *("Hardsigmoid", "Where"),
}
# Those of the above that keep coordinates apart: each entry of the output depends on one entry of each operand.
_COORDINATEWISE = _PIECEWISE | {
    *("Add", "Sub", "Neg", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"),
    *("Expand", "Cat", "Stack", "Slice", "Select", "Clone", "Alias", "Split", "Unbind", "SplitWithSizes", "Flip"),
    *("Roll", "Repeat", "ConstantPadNd", "PixelShuffle", "ToCopy", "Mul", "NativeBatchNorm", "Div"),
}
# Smooth functions of single entries.
_SMOOTH = {
    *("Sigmoid", "Tanh", "Elu", "Celu", "Gelu", "Silu", "Mish", "Softplus", "LogSigmoid", "Exp", "Log", "Pow", "Sqrt"),
    *("Sin", "Cos", "Erf", "Square", "Reciprocal", "Log1P", "Expm1", "Atan"),
}
# Of these each entry of the output comes from one operand.
_JOINS = {"Cat", "Stack", "Where", "Maximum", "Minimum"}
_WEIGHT_VIEWS = {"T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze"}
_TRANSPARENT = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias"}

LOOKED_AT = 64
"""Inputs whose graph is read, at most: a branch that a few inputs alone send the batch through is seen if these do."""


@dataclass(frozen=True)
class Structure:
    """How the output depends on each parameter.

    Attributes:
        names: The parameters that were looked at.
        reached: Those that the output depends on.
        affine: Those in which ``h`` is affine, entry by entry: the last layer (Remark 4.4). V2 = 0.
        piecewise: Those in which ``h`` is affine almost everywhere, entry by entry; includes `affine`. V2 = 0.
        separable: Those whose entries each move one output only (weight and bias of a last linear layer). There the
            exact Fisher diagonal takes a single cotangent, the root of the diagonal of I(h|x).
        diagonal: Those of a module with nothing but one smooth function of single entries, and then affine maps,
            between its output and ``h``: the second derivatives of ``h`` in that output are a diagonal matrix
            (Remark 4.5).
        needs_all: Whether the network runs on whole batches alone.
        outputs: Numbers that it puts out for each input.
    """

    names: tuple[str, ...]
    reached: frozenset[str]
    affine: frozenset[str]
    piecewise: frozenset[str]
    separable: frozenset[str]
    diagonal: frozenset[str]
    needs_all: bool
    outputs: int


def analyse(
    run: Callable[[Arguments], Any], inputs: Arguments, parameters: Mapping[str, Tensor], names: tuple[str, ...]
) -> Structure:
    """Runs a network forward once on a few inputs and reads its autograd graph.

    Args:
        run: The network.
        inputs: Its arguments.
        parameters: Its parameters; of these, ``names`` require gradients.
        names: The parameters to look at.

    Raises:
        ValueError: If the network cannot be run, its output is not a real tensor with one row per input, the output
            depends on none of the parameters, or on parameters that are not reached through modules.
    """
    outputs, needs_all = _forward(run, inputs)
    _check_outputs(outputs)
    bits = {id(p): 0 for p in parameters.values()}
    bits.update((id(parameters[name]), 1 << i) for i, name in enumerate(names))
    graph = _Graph(outputs, bits)
    if graph.has_strangers:
        raise ValueError(
            "model reaches parameters past its modules (in a plain list, a closure, or a replaced forward), where a "
            "copy cannot follow; register them as attributes of the module that uses them"
        )

    def where(mask: int) -> frozenset[str]:
        return frozenset(name for i, name in enumerate(names) if mask >> i & 1)

    if not graph.reached:
        raise ValueError("model output does not depend on any trainable parameter; look for a detach() in forward")
    return Structure(
        names=names,
        reached=where(graph.reached),
        affine=where(graph.reached & ~(graph.curved | graph.kinked)),
        piecewise=where(graph.reached & ~graph.curved),
        separable=where(graph.separable),
        diagonal=where(graph.curved & ~graph.crossed),
        needs_all=needs_all,
        outputs=outputs.numel() // max(len(outputs), 1),
    )


def _forward(run: Callable[[Arguments], Any], inputs: Arguments) -> tuple[Any, bool]:
    """The output for some inputs, or, where a batch size is written into the network, for all; and whether it was so.

    Raises:
        ValueError: If the network runs on neither.
        MemoryError: If there is not the memory. Or an OutOfMemoryError.
        OutOfMemoryError: See above.
    """
    for some, needs_all in ((inputs.first(2), False), (inputs, True)):
        try:
            with torch.enable_grad():
                outputs = run(some)
                return (outputs if needs_all else _of_more(run, inputs, outputs)), needs_all
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a user's network may raise anything
            failure = error
    shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs.leaves if isinstance(x, Tensor))
    raise ValueError(f"model could not be run on (some of the) inputs, {shapes}: {failure}") from failure


def _of_more(run: Callable[[Arguments], Any], inputs: Arguments, outputs: Any) -> Any:
    """The output for more inputs than two; what is known of two, where there is not the memory or anything fails."""
    if inputs.count <= 2:
        return outputs
    try:
        return run(inputs.first(min(LOOKED_AT, inputs.count)))
    except Exception:  # noqa: BLE001 - a user's network may raise anything
        return outputs


def _check_outputs(outputs: Any) -> None:
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"model output is a {type(outputs).__name__}; fishopt needs the natural parameters as one tensor"
        )
    if outputs.ndim == 0 or not outputs.is_floating_point():
        raise ValueError(
            f"model output has shape {tuple(outputs.shape)} and type {outputs.dtype}; fishopt needs real natural "
            "parameters, one row per input"
        )


class _Path(NamedTuple):
    """What lies between parameters and a node of the graph, as bit masks.

    Attributes:
        fresh: Parameters that came here by views alone: what uses them next is their module.
        mixed: Those whose module's output has had its entries mixed.
        bent: Those whose module's output has gone through a smooth function.
    """

    fresh: int = 0
    mixed: int = 0
    bent: int = 0


class _Graph:
    """The autograd graph below ``outputs``; sets of parameters are bit masks."""

    def __init__(self, outputs: Tensor, bits: dict[int, int]) -> None:
        self.curved = self.kinked = self.separable = self.reached = self.crossed = 0
        self.has_strangers = False
        self._bits = bits
        self._below: dict[Any, int] = {}
        self._paths: dict[Any, _Path] = {}
        if outputs.grad_fn is not None:
            for node in _children_first(outputs.grad_fn):
                self._visit(node)
            self.reached = self._below[outputs.grad_fn]
            self.separable = self._separable(outputs)

    def _visit(self, node: Any) -> None:
        below = [self._below[child] for child, _ in node.next_functions if child is not None]
        everything = _union(below)
        kind = _kind(node)
        if kind in _LINEAR and not getattr(node, "_saved_training", False):
            # A product of two things that both depend on a weight is quadratic in it; a sum of them is not.
            self.curved |= 0 if kind in {"Add", "Sub", "Cat", "Stack"} else _overlap(below)
        elif kind in _PIECEWISE:
            self.kinked |= everything
            self.curved |= _overlap(below) if kind == "PreluKernel" else 0
        elif kind == "Div" and len(below) == 1 and node.next_functions[0][0] is not None:
            pass  # a constant divisor
        elif kind != "AccumulateGrad":
            self.curved |= everything
        self._below[node] = everything | self._bit(node)
        self._follow(node, kind)

    def _follow(self, node: Any, kind: str) -> None:
        """Whether second derivatives in a module's output can mix its entries: they are then `crossed`."""
        if bit := self._bit(node):
            self._paths[node] = _Path(fresh=bit)
            return
        paths = [self._paths[child] for child, _ in node.next_functions if child is not None]
        fresh, mixed, bent = (_union(getattr(path, part) for path in paths) for part in ("fresh", "mixed", "bent"))
        if kind in _WEIGHT_VIEWS and len(paths) == 1:
            self._paths[node] = paths[0]
            return
        active = [
            0 if child is None else self._below[child] & ~self._paths[child].fresh for child, _ in node.next_functions
        ]
        entries = _union(active)
        if kind in _SMOOTH and not fresh:
            self.crossed |= entries & (mixed | bent) | (entries if sum(map(bool, active)) > 1 else 0)
            bent |= entries
        elif getattr(node, "_saved_training", False) or (kind == "Div" and any(active[1:])):
            self.crossed |= entries | fresh
        elif kind in {"Add", "Sub"}:
            mixed |= _overlap(active)
        elif kind in _LINEAR | _PIECEWISE | {"Div"}:
            # A product of two activations has second derivatives in the one and the other.
            self.crossed |= entries if sum(map(bool, active)) > 1 and kind not in _JOINS else 0
            mixed |= 0 if kind in _COORDINATEWISE else entries
        elif kind != "AccumulateGrad":
            self.crossed |= entries | fresh
        self._paths[node] = _Path(mixed=mixed, bent=bent)

    def _bit(self, node: Any) -> int:
        if node is None or not hasattr(node, "variable"):
            return 0
        # A leaf that the forward made, to differentiate in it, is no parameter.
        stranger = isinstance(node.variable, nn.Parameter) and id(node.variable) not in self._bits
        self.has_strangers = self.has_strangers or stranger
        return self._bits.get(id(node.variable), 0)

    def _separable(self, outputs: Tensor) -> int:
        """Weight and bias of a linear layer that is the output itself, one row per input."""
        node: Any = outputs.grad_fn
        while _kind(node) in _TRANSPARENT and _rows(node) == outputs.shape[0]:
            node = node.next_functions[0][0]
        width = outputs.numel() // max(outputs.shape[0], 1)
        if _kind(node) not in {"Addmm", "Mm"} or tuple(node._input_metadata[0].shape) != (outputs.shape[0], width):
            return 0
        *bias, features, weight = (child for child, _ in node.next_functions)
        # A bias of another size is broadcast, and moves every output.
        own = _union(self._bit(child) for child in bias if self._bit(child) and child.variable.numel() == width)
        if weight is not None and _kind(weight) == "T":
            own |= self._bit(weight.next_functions[0][0])
        return own & ~(self._below[features] if features is not None else 0)


def _children_first(root: Any) -> list[Any]:
    """The graph's nodes, each after all that it depends on (iterative: networks can be deeper than the stack)."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None)
    return order


def _kind(node: Any) -> str:
    """``AddmmBackward0`` -> ``Addmm``; a user's own function has no number, and no kind that we know."""
    name = str(node.name()).rpartition("::")[2]
    if name[-1].isdigit():
        return name.rstrip("0123456789").removesuffix("Backward")
    return name if name == "AccumulateGrad" else ""


def _rows(node: Any) -> int:
    shape = node._input_metadata[0].shape
    return int(shape[0]) if len(shape) else 0


def _union(masks: Any) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _overlap(masks: list[int]) -> int:
    """Parameters that at least two operands depend on."""
    seen = twice = 0
    for mask in masks:
        twice |= seen & mask
        seen |= mask
    return twice
