"""The only file that imports BackPACK: its exact Hessian diagonal of a chain, and our rules as extensions of it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Self

import torch
from backpack import backpack, extend, memory_cleanup
from backpack.context import CTX
from backpack.extensions import BatchDiagHessian, DiagHessian, SumGradSquared
from backpack.extensions.firstorder.base import FirstOrderModuleExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fishopt.passes.arguments import Arguments
from fishopt.passes.base import Diagonal
from fishopt.passes.reductions import SQUARES
from fishopt.passes.rules import Rule, batch_norm, convolution, linear, transposed_convolution
from fishopt.passes.shadow import Shadow

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PIECEWISE = (nn.ReLU, nn.LeakyReLU, nn.Flatten, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_SMOOTH = (nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.ELU, nn.SELU)
_KNOWN = frozenset({nn.Linear, *_CONVOLUTIONS, *_PIECEWISE, *_POOLS, *_SMOOTH, nn.ZeroPad2d})


def sum_grad_squared() -> SumGradSquared:
    """BackPACK's extension of that name with our rules in it, for ``with backpack(...)``: the same numbers, sooner."""
    extension = SumGradSquared()
    for kind in (nn.Linear, *_CONVOLUTIONS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        extension.set_module_extension(kind, _SumOfSquares(), overwrite=True)
    return extension


class _SumOfSquares(FirstOrderModuleExtension):
    """One of our rules, in the form that BackPACK calls."""

    def __init__(self) -> None:
        super().__init__(params=["weight", "bias"])

    def weight(self, ext: Any, module: Any, g_inp: Any, g_out: tuple[Tensor], quantities: None) -> Tensor:
        return self._of("weight", module, g_out[0])

    def bias(self, ext: Any, module: Any, g_inp: Any, g_out: tuple[Tensor], quantities: None) -> Tensor:
        return self._of("bias", module, g_out[0])

    def _of(self, parameter: str, module: Any, g: Tensor) -> Tensor:
        if not pads_with_zeros(module):
            raise NotImplementedError(f"{module}: pad with zeros, by a number")
        call = SimpleNamespace(**{**dict.fromkeys(_SETTINGS), **vars(module), **module._parameters, **module._buffers})
        call.input = module.input0
        return _rule(module)(call, parameter, g[None], 1).reduced(SQUARES, per_input=False)


_SETTINGS = ("stride", "padding", "output_padding", "dilation", "groups")


def _rule(module: nn.Module) -> Rule:
    if isinstance(module, nn.Linear):
        return linear
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return batch_norm
    return transposed_convolution if module.transposed else convolution


def pads_with_zeros(module: nn.Module) -> bool:
    """Whether a convolution pads with zeros, by a number, as BackPACK takes for granted; true of other modules."""
    return not isinstance(module, _ConvNd) or (module.padding_mode == "zeros" and not isinstance(module.padding, str))


_ONE_AT_A_TIME = threading.Lock()
"""BackPACK's context is one for all threads, as are filters of warnings."""


class Chain:
    """The exact Hessian diagonal of a network that is a chain of modules which BackPACK knows.

    Each smooth activation sends down a factor of each sign, with one column for each of its units: exact, and dear.

    Args:
        shadow: The network; `of` tells whether it is such a chain.
    """

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    @classmethod
    def of(cls, shadow: Shadow) -> Self | None:
        """The chain, or None if the network is not one."""
        # A module that stands twice in the chain counts twice: BackPACK would only see its last call.
        modules = [module for _, module in shadow.module.named_modules(remove_duplicate=False)]
        leaves = [module for module in modules if type(module) is not nn.Sequential]
        if len(set(leaves)) < len(leaves) or not (type(shadow.module) is nn.Sequential or len(leaves) == 1):
            return None
        return cls(shadow) if all(_is_known(leaf) and not any(leaf.children()) for leaf in leaves) else None

    def hessian_costs(self, inputs: Arguments, names: Sequence[str]) -> dict[str, int]:
        """About how many backward passes each parameter takes: two for each smooth unit above it."""
        units: dict[nn.Module, int] = {}

        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            units[module] = output[0].numel()

        modules = dict(self._shadow.module.named_modules())
        handles = [m.register_forward_hook(count) for m in modules.values() if isinstance(m, _SMOOTH)]
        try:
            with torch.no_grad():
                inputs.take(slice(1)).call(self._shadow.module)
        finally:
            for handle in handles:
                handle.remove()
        order = list(modules)
        return {
            name: sum(2 * units.get(modules[path], 0) for path in order[order.index(name.rpartition(".")[0]) :])
            for name in names
        }

    def hessian_diagonal(
        self, inputs: Arguments, names: Sequence[str], cotangent: Tensor, *, per_input: bool
    ) -> Diagonal:
        """The Hessian diagonal of ``<cotangent, h>``, no deeper than the lowest of ``names``.

        Raises:
            RuntimeError: Or an AssertionError, where BackPACK refuses on meeting some layouts and options.
        """
        with _ONE_AT_A_TIME:
            return self._hessian_diagonal(_extended(self._shadow), inputs, names, cotangent, per_input=per_input)

    def _hessian_diagonal(
        self, module: nn.Module, inputs: Arguments, names: Sequence[str], cotangent: Tensor, *, per_input: bool
    ) -> Diagonal:
        parameters = dict(module.named_parameters())
        for name, p in parameters.items():
            p.requires_grad_(name in names)
        extension = BatchDiagHessian() if per_input else DiagHessian()
        extension.set_module_extension(_InnerProduct, _NoCurvature())
        try:
            with torch.enable_grad(), _forgotten_handles():
                h = inputs.call(module)
                scalar = extend(_InnerProduct())(h, cotangent.reshape(h.shape))
            with backpack(extension), _without_input_warning():
                torch.autograd.backward(scalar)
            return {name: getattr(parameters[name], extension.savefield).detach() for name in names}
        finally:
            for p in parameters.values():
                p.grad = None
                vars(p).pop(extension.savefield, None)
            for part in module.modules():
                memory_cleanup(part)


class _InnerProduct(nn.modules.loss._Loss):
    """``<c, h>``, in the form of a loss so that BackPACK starts a Hessian's backpropagation at it."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return (h * c).sum()


class _NoCurvature(ModuleExtension):
    """A loss that is linear in its input adds nothing to the Hessian."""

    def backpropagate(self, *_: Any) -> dict[str, list[Any]]:
        return {"matrices": [], "signs": []}


def _is_known(module: nn.Module) -> bool:
    """Whether BackPACK does all that a module does.

    It looks rules up by exact class, unfolds inputs as if they were padded with zeros, averages whole windows by their
    size, and takes weights for parameters, which those that a hook computes are not.
    """
    has_own_weights = set(module._parameters) <= {"weight", "bias"} and not module._forward_pre_hooks
    whole_windows = not getattr(module, "ceil_mode", False) and getattr(module, "divisor_override", None) is None
    return type(module) in _KNOWN and pads_with_zeros(module) and has_own_weights and whole_windows


def _extended(shadow: Shadow) -> nn.Module:
    # Leaves alone, and those that BackPACK knows: it would warn at containers with a forward of their own.
    with _forgotten_handles():
        for module in shadow.extended.modules():
            if type(module) in _KNOWN:
                extend(module)
    return shadow.extended


@contextmanager
def _forgotten_handles() -> Iterator[None]:
    """BackPACK keeps every hook's handle in a global list; ours live and die with their module."""
    count = len(CTX.hook_handles)
    try:
        yield
    finally:
        del CTX.hook_handles[count:]


@contextmanager
def _without_input_warning() -> Iterator[None]:
    """Torch warns where a module's inputs need no gradient; that is how the pass stays shallow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield
