"""A shadow of the user's network: the same weights, other modules.

Curvature is computed on the shadow, so the user's modules get no hooks, no stored activations and no gradients. The
shadow runs in eval mode: a Fisher matrix is per input, and dropout or batch statistics would couple inputs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fishopt.passes.arguments import Arguments
from fishopt.passes.plain import PlainTensors, plain_attributes, widened
from fishopt.passes.structure import Structure, analyse
from fishopt.passes.tracing import Substituting, Widening, under

Readout = Callable[[Any], Any]
"""What picks the natural parameters from what the network returns."""


class Shadow:
    """A copy of a module tree whose parameters share storage with the original.

    Parameters in half precision have copies in float32 instead. What a forward may change has copies too: buffers,
    tensors that modules keep as plain attributes, and embeddings that it renormalises. `sync` brings all up to date.

    Attributes:
        module: The copy.
        changes_in_place: Set once its forward was seen to change in place what a pass has to keep.
        notes: For what the ways through the network find out about it, until that is to be found out anew.
        turns: How often the network took another way than before.
        seen: The parameters that its output ever depended on.
        proven: Parameter -> the way that was seen to be right where there was something to be seen.
        in_doubt: Whether there is a parameter of which nothing was seen yet, its gradient being zero.

    Args:
        model: The user's network; wrappers by `torch.compile` and data parallelism are looked through.
        readout: See `Readout`; the network's output itself if None.
    """

    def __init__(self, model: nn.Module, readout: Readout | None = None) -> None:
        self._model = unwrapped(model)
        self._readout = readout
        self._structure: Structure | None = None
        self.changes_in_place = False
        self.notes: dict[Any, Any] = {}
        self.turns = 0
        self.seen: frozenset[str] = frozenset()
        self.proven: dict[str, str] = {}
        self.in_doubt = False
        self._syncs = 0
        self._originals = dict(self._model.named_parameters())
        self.module = _shadow_of(self._model)
        self._looks = [(module, _look(module)) for module in self._model.modules()]
        self._copies = _copies(self._model, self.module)
        self._plain = PlainTensors(self._model, self.module)
        self._required: tuple[str, ...] = ()

    @cached_property
    def extended(self) -> nn.Module:
        """A second copy, for an engine that needs hooks of its own on the modules, which see no changes in place."""
        copied = _shadow_of(self._model)
        for module in copied.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        return copied

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The copy's parameters by name."""
        return dict(self.module.named_parameters())

    @cached_property
    def name_of(self) -> dict[int, str]:
        """Names of the copy's parameters, by identity."""
        return {id(p): name for name, p in self.parameters.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the user trains, by name."""
        return tuple(name for name, p in self._originals.items() if p.requires_grad)

    def is_current(self) -> bool:
        """Whether it still stands for the model: moves, new parts, other settings and ``p.data = ...`` end that."""
        return all(_look(module) == look for module, look in self._looks)

    def sync(self) -> None:
        """Takes over what the original has become, in what is not shared with it.

        While something is in doubt the network is looked at anew, after ever more batches.
        """
        for one in self._copies:
            one.update()
        self._plain.update()
        self._syncs += 1
        if self.in_doubt and self._syncs.bit_count() == 1:
            self.forget()

    def require(self, names: Sequence[str]) -> None:
        """Lets these of the copy's parameters have gradients, and no others."""
        if self._required != tuple(names):
            for name, p in self.parameters.items():
                p.requires_grad_(name in names)
            self._required = tuple(names)

    def run(self, inputs: Arguments, mode: Widening | None = None) -> Any:
        """The natural parameters.

        Args:
            inputs: The network's arguments.
            mode: What watches the forward.
        """
        with torch.enable_grad():  # a network may differentiate itself, as physics-informed ones do
            return under(mode or Substituting(), lambda: self.read(inputs.call(self.module)))

    def read(self, output: Any) -> Any:
        """The natural parameters in what the network returned."""
        return output if self._readout is None else self._readout(output)

    def structure(self, inputs: Arguments) -> Structure:
        """How the output depends on each parameter; found once, on a few of the inputs."""
        if self._structure is None or self._structure.names != self.names:
            self.forget()
            self.require(self.names)
            self._structure = analyse(self.run, inputs, self.parameters, self.names)
        return self._structure

    def forget(self) -> None:
        """Makes the next pass look anew: the network took another way than before."""
        self._structure = None
        self.notes.clear()


class _Copy:
    """A tensor of the shadow that does not share the original's storage."""

    def __init__(self, owner: nn.Module, name: str, copied: Tensor) -> None:
        self._owner, self._name, self._copied = owner, name, copied

    @torch.no_grad()
    def update(self) -> None:
        # Always: a tensor's version does not tell of what BatchNorm does to its running statistics, nor of `p.data`.
        self._copied.copy_(getattr(self._owner, self._name))


def _copies(model: nn.Module, copied: nn.Module) -> list[_Copy]:
    found = []
    for owner, other in zip(model.modules(), copied.modules(), strict=True):
        for name, tensor in (*owner._buffers.items(), *owner._parameters.items()):
            mine = getattr(other, name)
            if tensor is not None and tensor.data_ptr() != mine.data_ptr():
                found.append(_Copy(owner, name, mine))
    return found


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
        memo[id(p)] = nn.Parameter(widened(p.detach()), requires_grad=False)
    for module in model.modules():
        if getattr(module, "max_norm", None) is not None:  # an embedding, whose forward renormalises its rows
            own = module.parameters(recurse=False)
            memo.update((id(p), nn.Parameter(widened(p.detach()).clone(), requires_grad=False)) for p in own)
        # Hooks may hold anything, the optimizer itself included: none of it is to be copied.
        memo.update((id(hooks), OrderedDict()) for key, hooks in vars(module).items() if "_hooks" in key)
        memo.update((id(x), widened(x.detach()).clone()) for x in module._buffers.values() if x is not None)
        memo.update((id(x), widened(x.detach()).clone()) for x in _kept(module) if id(x) not in memo)
    for module in model.modules():
        kept = OrderedDict((k, hook) for k, hook in module._forward_pre_hooks.items() if _computes_weights(hook))
        memo[id(module._forward_pre_hooks)] = kept
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise TypeError(
            f"model cannot be copied, which curvature is computed on: {error}; see copy.deepcopy(model)"
        ) from error


def _kept(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a module keeps as plain attributes, or in lists and dicts there: activations, mostly."""
    return (x for x in tree_leaves(plain_attributes(module)) if isinstance(x, Tensor))


def _computes_weights(hook: object) -> bool:
    """Whether a forward pre-hook is part of the computation, as in `torch.nn.utils.weight_norm`; or one's subclass."""
    return any(kind.__module__.startswith("torch.nn.utils") for kind in type(hook).__mro__)


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
_IGNORED = {"training"}


def _place(tensor: Tensor) -> tuple[torch.device, torch.dtype, torch.Size, int]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.data_ptr()
