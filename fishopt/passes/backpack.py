"""The pass through BackPACK: the only file that imports it.

First-order quantities come from any graph, as long as each parameter is used once by its own module. BackPACK's Hessian
diagonal sees modules only, so it is taken where the network is a chain of modules that it knows; elsewhere that one
primitive goes through torch.func.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from backpack import backpack, extend, memory_cleanup
from backpack.context import CTX
from backpack.extensions import BatchDiagHessian, BatchGrad, DiagHessian, SumGradSquared
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn

from fishopt.passes.base import Diagonal, Pass
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.shadow import Shadow

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PIECEWISE = (nn.ReLU, nn.LeakyReLU, nn.Flatten, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_SMOOTH = (nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.ELU, nn.SELU)
_FIRST_ORDER = frozenset({nn.Linear, *_CONVOLUTIONS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
_SECOND_ORDER = frozenset({nn.Linear, *_CONVOLUTIONS, *_PIECEWISE, *_POOLS, *_SMOOTH, nn.ZeroPad2d})


def covers(shadow: Shadow, inputs: tuple[Tensor, ...], names: Sequence[str]) -> bool:
    """Whether BackPACK's first-order extensions are right for the parameters ``names`` of this network."""
    if not shadow.structure(inputs).hookable.issuperset(names):
        return False
    owners = [(shadow.module.get_submodule(path), own) for path, _, own in (name.rpartition(".") for name in names)]
    # Other names than these are what a reparametrisation, such as weight_norm's, makes the weight of.
    return all(_is_known(module, _FIRST_ORDER) and own in {"weight", "bias"} for module, own in owners)


class BackpackPass(Pass):
    """Both primitives through BackPACK's extensions.

    Args:
        shadow: The network; `covers` must hold.
        inputs: Its positional arguments, tensors with one row per input.
        names: The parameters to differentiate. The backward pass goes no deeper than the lowest of them.
    """

    def __init__(self, shadow: Shadow, inputs: tuple[Tensor, ...], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._shadow = shadow
        self._inputs = inputs
        self._module = _extended(shadow)
        parameters = dict(self._module.named_parameters())
        self._parameters = {name: parameters[name] for name in self.names}
        for name, p in parameters.items():
            p.requires_grad_(name in self._parameters)
        with torch.enable_grad():
            self._graph: Tensor = self._module(*inputs)
        self.outputs = self._graph.detach()

    def close(self) -> None:
        for module in self._module.modules():
            memory_cleanup(module)
        del self._graph

    def squared_vjp(self, columns: Tensor, *, per_input: bool = False) -> Diagonal:
        try:
            return self._squared_vjp(columns, per_input=per_input)
        except (RuntimeError, AssertionError):
            return self._functional().squared_vjp(columns, per_input=per_input)

    def _squared_vjp(self, columns: Tensor, *, per_input: bool) -> Diagonal:
        extension = BatchGrad() if per_input else SumGradSquared()
        total: Diagonal = {}
        for column in columns:
            found = self._run(extension, self._graph, column.reshape(self._graph.shape))
            for name, value in found.items():
                q = value.square() if per_input else value
                total[name] = total[name] + q if name in total else q
        return total

    def hessian_diagonal(self, cotangent: Tensor, *, per_input: bool = False) -> Diagonal:
        if self._is_chain:
            try:
                return self._hessian_diagonal(cotangent, per_input=per_input)
            except (RuntimeError, AssertionError):
                pass
        return self._functional().hessian_diagonal(cotangent, per_input=per_input)

    def _functional(self) -> FunctionalPass:
        """Where BackPACK refuses: some memory layouts and options of its modules, on meeting them."""
        return FunctionalPass(self._shadow, self._inputs, self.names)

    def _hessian_diagonal(self, cotangent: Tensor, *, per_input: bool) -> Diagonal:
        extension = BatchDiagHessian() if per_input else DiagHessian()
        extension.set_module_extension(_InnerProduct, _NoCurvature())
        with torch.enable_grad(), _forgotten_handles():
            scalar = extend(_InnerProduct())(self._graph, cotangent.reshape(self._graph.shape))
        return self._run(extension, scalar, None)

    def hessian_cost(self, name: str) -> int:
        if not self._is_chain:
            return 2 * self._parameters[name].numel()
        # Each smooth activation above sends down a factor of each sign, with one column for each of its units.
        paths = [path for path, _ in self._module.named_modules()]
        above = list(self._module.modules())[paths.index(name.rpartition(".")[0]) :]
        smooth: list[Any] = [module for module in above if isinstance(module, _SMOOTH)]
        return sum(2 * int(module.output[0].numel()) for module in smooth)

    @cached_property
    def _is_chain(self) -> bool:
        # A module that stands twice in the chain counts twice: BackPACK would only see its last call.
        modules = [m for _, m in self._module.named_modules(remove_duplicate=False)]
        leaves = [m for m in modules if type(m) is not nn.Sequential]
        if len(set(leaves)) < len(leaves):
            return False
        chained = type(self._module) is nn.Sequential or len(leaves) == 1
        return chained and all(_is_known(leaf, _SECOND_ORDER) and not any(leaf.children()) for leaf in leaves)

    def _run(self, extension: Any, root: Tensor, gradient: Tensor | None) -> Diagonal:
        """One backward pass; BackPACK leaves its results on the shadow's parameters, from where they are taken."""
        with backpack(extension, retain_graph=True), _without_input_warning():
            torch.autograd.backward(root, gradient, retain_graph=True)
        found = {}
        for name, p in self._parameters.items():
            found[name] = getattr(p, extension.savefield).detach()
            delattr(p, extension.savefield)
            p.grad = None
        return found


class _InnerProduct(nn.modules.loss._Loss):
    """``<c, h>``, in the form of a loss so that BackPACK starts a Hessian's backpropagation at it."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return (h * c).sum()


class _NoCurvature(ModuleExtension):
    """A loss that is linear in its input adds nothing to the Hessian."""

    def backpropagate(self, *_: Any) -> dict[str, list[Any]]:
        return {"matrices": [], "signs": []}


def _is_known(module: nn.Module, kinds: frozenset[type[nn.Module]]) -> bool:
    # BackPACK looks rules up by exact class, and unfolds inputs as if they were padded with zeros.
    plain_padding = getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(
        getattr(module, "padding", None), str
    )
    return type(module) in kinds and plain_padding


def _extended(shadow: Shadow) -> nn.Module:
    # Leaves alone, and those that BackPACK knows: it would warn at containers with a forward of their own.
    with _forgotten_handles():
        for module in shadow.extended.modules():
            if type(module) in _FIRST_ORDER | _SECOND_ORDER:
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
