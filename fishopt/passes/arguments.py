"""What a network is called with: arguments of any nesting, and in them tensors with one row per input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Rows = slice | Tensor


class Arguments:
    """One call's arguments. Tensors whose first dimension is that of the first tensor have a row for each input.

    Attributes:
        leaves: What the nesting holds, in order.
        rows: Which leaves are tensors with a row for each input.
        count: Inputs, N.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        if not kwargs and all(isinstance(x, Tensor) for x in args):  # as nearly always: three times as fast
            leaves, spec = list(args), _spec_of_leaves(len(args))
        else:
            leaves, spec = tree_flatten((tuple(args), dict(kwargs or {})))
        tensors = [x for x in leaves if isinstance(x, Tensor) and x.ndim]
        self.count = len(tensors[0]) if tensors else 0
        self.leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        self.rows = [isinstance(x, Tensor) and x.ndim > 0 and len(x) == self.count for x in leaves]
        self._spec = spec

    def call(self, function: Callable[..., Any]) -> Any:
        """``function`` of these arguments."""
        args, kwargs = tree_unflatten(self.leaves, self._spec)
        return function(*args, **kwargs)

    def take(self, rows: Rows) -> Self:
        """The same for some of the inputs."""
        return self._with(
            [x[_on(x, rows)] if own else x for x, own in zip(self.leaves, self.rows, strict=True)],
        )

    def first(self, count: int) -> Self:
        """The first ``count`` inputs, repeated if there are fewer."""
        return self.take(torch.arange(count, device="cpu") % max(self.count, 1))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """``function`` of each tensor."""
        return self._with([function(x) if isinstance(x, Tensor) else x for x in self.leaves])

    def split(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor], Callable[..., Any]], Any]]:
        """The tensors with rows, and how to call a function with others in their places."""

        def call(tensors: Sequence[Tensor], function: Callable[..., Any]) -> Any:
            values = iter(tensors)
            leaves = [next(values) if own else x for x, own in zip(self.leaves, self.rows, strict=True)]
            args, kwargs = tree_unflatten(leaves, self._spec)
            return function(*args, **kwargs)

        return [x for x, own in zip(self.leaves, self.rows, strict=True) if own], call

    def is_like(self, other: Arguments) -> bool:
        """Whether rows of the other can follow these: the same nesting, shapes of rows, and everything else."""
        return (
            self._spec == other._spec
            and self.rows == other.rows
            and all(map(_is_alike, self.leaves, other.leaves, self.rows))
        )

    @classmethod
    def joined(cls, several: Sequence[Self]) -> Self:
        """The inputs of several calls that are alike, in order."""
        first = several[0]
        if len(several) == 1:
            return first
        leaves = [
            torch.cat([one.leaves[i] for one in several]) if own else first.leaves[i]
            for i, own in enumerate(first.rows)
        ]
        return first._with(leaves)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, Any]]:
        args, kwargs = tree_unflatten(self.leaves, self._spec)
        return type(self), (args, kwargs)

    def _with(self, leaves: list[Any]) -> Self:
        other = object.__new__(type(self))
        other.leaves, other.rows, other._spec = leaves, self.rows, self._spec
        other.count = next((len(x) for x, own in zip(leaves, self.rows, strict=True) if own), 0)
        return other


def _on(x: Tensor, rows: Rows) -> Rows:
    return rows.to(x.device) if isinstance(rows, Tensor) else rows


def _is_alike(mine: Any, other: Any, has_rows: bool) -> bool:
    if isinstance(mine, Tensor) and isinstance(other, Tensor):
        kind = mine.dtype == other.dtype and mine.device == other.device
        return kind and (mine.shape[1:] == other.shape[1:] if has_rows else torch.equal(mine, other))
    same: bool = mine is other or (type(mine) is type(other) and mine == other)
    return same


@functools.cache
def _spec_of_leaves(count: int) -> TreeSpec:
    """The nesting of so many positional arguments that are no containers."""
    return tree_flatten(((None,) * count, {}))[1]
