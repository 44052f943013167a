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
        takes_hooks: Cleared once a forward with backward hooks on the modules has failed.

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
        self._settings = _settings(self.module)

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
        return _settings(self._model) == self._settings and all(
            _aliases(_tensors(self._model), _tensors(copied))
            for copied in (self.module, self.__dict__.get("extended"))
            if copied is not None
        )

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


def _settings(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Each module's kind and plain attributes, such as a temperature that changes in training."""
    plain = (bool, int, float, str, NoneType)
    return [
        (path, type(m), {k: v for k, v in vars(m).items() if isinstance(v, plain) and k not in {"training", "inplace"}})
        for path, m in model.named_modules()
    ]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _aliases(originals: list[tuple[str, Tensor]], copies: list[tuple[str, Tensor]]) -> bool:
    return len(originals) == len(copies) and all(
        name == other and _place(a) == _place(b) for (name, a), (other, b) in zip(originals, copies, strict=True)
    )


def _place(tensor: Tensor) -> tuple[torch.device, torch.dtype, torch.Size, int]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.data_ptr()
