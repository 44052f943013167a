"""A shadow of the user's network: the same tensors, other modules.

Curvature is computed on the shadow, so the user's modules get no hooks, no stored activations and no gradients. The
shadow runs in eval mode: a Fisher matrix is per input, and dropout or batch statistics would couple inputs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.passes.structure import Structure, analyse


class Shadow:
    """A copy of a module tree whose parameters and buffers share storage with the original.

    Attributes:
        module: The copy.
        covered: For an engine's own notes on which sets of parameters it covers.
        takes_hooks: Cleared once a forward with hooks on the modules has failed.

    Args:
        model: The user's network; wrappers by `torch.compile` and data parallelism are looked through.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._structure: Structure | None = None
        self.takes_hooks = True
        self._originals = dict(self._model.named_parameters())
        self.covered: dict[tuple[str, ...], bool] = {}
        self.module = _shadow_of(self._model)
        self._looks = [(module, _look(module)) for module in self._model.modules()]

    @cached_property
    def extended(self) -> nn.Module:
        """A second copy, for an engine that needs hooks of its own on the modules."""
        return _shadow_of(self._model)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The copy's parameters by name."""
        return dict(self.module.named_parameters())

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the user trains, by name."""
        return tuple(name for name, p in self._originals.items() if p.requires_grad)

    def is_current(self) -> bool:
        """Whether it still stands for the model: moves, new parts, other settings and ``p.data = ...`` end that."""
        return all(_look(module) == look for module, look in self._looks)

    def structure(self, inputs: tuple[Any, ...]) -> Structure:
        """How the output depends on each parameter; found once, on a few of the inputs."""
        if self._structure is None or self._structure.names != self.names:
            two, three = (analyse(self.module, _rows(inputs, count), self.names) for count in (2, 3))
            # Of two batch sizes only one can be mistaken for another dimension of the same size.
            self._structure = replace(two, hookable=two.hookable & three.hookable)
        return self._structure


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _shadow_of(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    for module in model.modules():
        # Hooks may hold anything, the optimizer itself included: none of it is to be copied.
        memo.update((id(hooks), OrderedDict()) for key, hooks in vars(module).items() if "_hooks" in key)
        for value in (*module._buffers.values(), *vars(module).values()):
            if isinstance(value, Tensor):
                memo.setdefault(id(value), value.detach())
    for module in model.modules():
        kept = OrderedDict((k, hook) for k, hook in module._forward_pre_hooks.items() if _computes_weights(hook))
        memo[id(module._forward_pre_hooks)] = kept
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        if getattr(module, "inplace", False):  # a backward hook on the module cannot see through in-place changes
            module.inplace = False  # type: ignore[assignment]
    return copied


def _computes_weights(hook: object) -> bool:
    """Whether a forward pre-hook is part of the computation, as in `torch.nn.utils.weight_norm`."""
    return type(hook).__module__.startswith("torch.nn.utils")


def _rows(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The first ``count`` rows of each tensor, repeated if there are fewer."""
    return tuple(
        x[torch.arange(count, device=x.device) % len(x)] if isinstance(x, Tensor) and x.ndim else x for x in inputs
    )


def _look(module: nn.Module) -> tuple[Any, ...]:
    """All of one module that a copy of it rests on: its parts, plain attributes such as a temperature, and storage."""
    attributes = vars(module)
    return (
        type(module),
        tuple(module._modules.items()),
        {k: v for k, v in attributes.items() if isinstance(v, _PLAIN) and k not in _IGNORED},
        [(k, _place(t)) for own in (module._parameters, module._buffers) for k, t in own.items() if t is not None],
    )


_PLAIN = (bool, int, float, str, NoneType)
_IGNORED = {"training", "inplace"}


def _place(tensor: Tensor) -> tuple[torch.device, torch.dtype, torch.Size, int]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.data_ptr()
