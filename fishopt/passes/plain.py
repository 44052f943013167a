"""Tensors that modules keep as plain attributes: copies of them for the shadow, which follow the originals."""

from __future__ import annotations

import copy
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_OWN = frozenset(vars(nn.Module()))


def widened(x: Tensor) -> Tensor:
    """In half precision there are not the digits for a sum of squares."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Those of the user's: not torch's own, such as hooks, parameters and submodules."""
    return {name: vars(module)[name] for name in vars(module).keys() - _OWN}


class PlainTensors:
    """What the modules of a network and its copy keep besides parameters and buffers.

    A temperature that is annealed, a cache, a list that two modules share: each update copies anew all that holds
    tensors, together, so that what was one object for the original's modules is one for the copy's.

    Args:
        model: The user's network.
        copied: Its copy.
    """

    def __init__(self, model: nn.Module, copied: nn.Module) -> None:
        self._pairs = list(zip(model.modules(), copied.modules(), strict=True))
        self._clones: dict[int, _Clone] = {}
        self._without: dict[tuple[int, str], tuple[int, int]] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Takes over what the original's have become."""
        holding = [
            (copied, name, value)
            for i, (owner, copied) in enumerate(self._pairs)
            for name, value in plain_attributes(owner).items()
            if self._holds_tensors((i, name), value)
        ]
        if not holding:
            return
        memo: dict[int, Any] = {}
        for owner, copied in self._pairs:
            memo[id(owner)] = copied
            for own, mine in ((owner._parameters, copied._parameters), (owner._buffers, copied._buffers)):
                memo.update((id(x), mine[name]) for name, x in own.items() if x is not None)
        before, self._clones = self._clones, {}
        for x in tree_leaves([value for _, _, value in holding]):
            if isinstance(x, Tensor) and id(x) not in memo:
                clone = before.get(id(x)) or _Clone()
                self._clones[id(x)], memo[id(x)] = clone, clone.of(x)
        for copied, name, value in holding:
            vars(copied)[name] = copy.deepcopy(value, memo)

    def _holds_tensors(self, where: tuple[int, str], value: Any) -> bool:
        if isinstance(value, Tensor):
            return True
        if not isinstance(value, list | tuple | dict | deque):
            return False
        known = id(value), len(value)
        if self._without.get(where) == known:  # a vocabulary is looked through once
            return False
        found = any(isinstance(x, Tensor) for x in tree_leaves(value))
        if not found:
            self._without[where] = known
        return found


class _Clone:
    """A copy of a tensor, made again only where either was changed."""

    def __init__(self) -> None:
        self._original: weakref.ref[Tensor] | None = None
        self._copied = torch.empty(0)
        self._versions: tuple[int, int] | None = None

    def of(self, x: Tensor) -> Tensor:
        """The copy as the original is now."""
        is_known = self._original is not None and self._original() is x and not x.is_inference()
        if is_known and self._versions == (x._version, self._copied._version):
            return self._copied
        self._original, self._copied = weakref.ref(x), widened(x.detach()).clone()
        self._versions = None if x.is_inference() else (x._version, self._copied._version)
        return self._copied
