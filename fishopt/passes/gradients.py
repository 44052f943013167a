"""Per-input gradients of one parameter, and what is summed from them, without ever holding them for a whole batch.

A layer's weight gradient is, for one input, a sum over positions of outer products ``g[:, p] u[:, p]^T``: ``g`` what
comes down to the layer's output, ``u`` what the weight multiplies. With one position, any product of powers of it
factors, and a sum over inputs is one matrix product; with several, it is formed for a few inputs at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fishopt.passes.base import gram_of
from fishopt.passes.batching import quiet_fallbacks
from fishopt.passes.reductions import Reduction

MAX_ELEMENTS = 2**21
"""Numbers in the per-input gradients, or in their factors, that are formed at a time: few enough for a cache."""

MAX_GRAM_ELEMENTS = 2**26
"""Numbers in the gradients that are formed at a time where any two inputs meet: few enough for the memory."""


class PerInput(ABC):
    """The per-input gradients of one parameter for K cotangents and N inputs, ``[K, N, *shape]``.

    Args:
        shape: The parameter's.
        columns: K.
        count: N.
        width: Numbers that have to be there for one input's gradients, if these are more.
    """

    def __init__(self, shape: torch.Size, columns: int, count: int, width: int = 0) -> None:
        self.shape = shape
        self.columns = columns
        self.count = count
        self.width = max(shape.numel() * columns, width, 1)

    @abstractmethod
    def formed(self, rows: slice) -> Tensor:
        """Those of some inputs, as they are: ``[K, n, *shape]``."""

    @abstractmethod
    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        """The reduction's value for each input, ``[N, *shape]``, or its sum over inputs, ``[*shape]``."""

    def sums(self, reductions: Sequence[Reduction]) -> Tensor:
        """The sums over inputs of several, ``[len(reductions), *shape]``."""
        return torch.stack([self.reduced(reduction, per_input=False) for reduction in reductions])

    def gram(self) -> Tensor:
        """Inner products of any two of them: ``[K, N, K, N]``."""
        step = max(1, MAX_GRAM_ELEMENTS // self.width)
        blocks = [slice(start, min(start + step, self.count)) for start in range(0, self.count, step)]
        if len(blocks) == 1:
            return gram_of(self.formed(blocks[0]))
        return torch.cat([self._gram_rows(self.formed(rows), blocks) for rows in blocks], dim=1)

    def _gram_rows(self, some: Tensor, blocks: Sequence[slice]) -> Tensor:
        return torch.cat([gram_of(some, self.formed(rows)) for rows in blocks], dim=3)


class Forming(PerInput):
    """Has to form gradients to reduce them, for a few inputs at a time."""

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        if not per_input:
            return self.sums([reduction])[0]
        parts = [reduction.per_input(self.formed(rows), rows) for rows in self._blocks()]
        return torch.cat(parts).reshape(self.count, *self.shape)

    def sums(self, reductions: Sequence[Reduction]) -> Tensor:
        total: Tensor | None = None
        for rows in self._blocks():
            g = self.formed(rows)
            found = torch.stack([reduction.per_input(g, rows).sum(0) for reduction in reductions])
            total = found if total is None else total.add_(found)
        assert total is not None, "no inputs"
        return total.reshape(len(reductions), *self.shape)

    def _blocks(self) -> Iterator[slice]:
        step = max(1, MAX_ELEMENTS // self.width)
        step -= step % 2 if step > 2 else 0  # an even number of products, one for each thread
        return (slice(start, min(start + step, self.count)) for start in range(0, self.count, step))


class Formed(PerInput):
    """Small enough to be there as a whole, as a bias's are: ``values`` is ``[K, N, *shape]``."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape[2:], *values.shape[:2])
        self._values = values

    def formed(self, rows: slice) -> Tensor:
        return self._values[:, rows]

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        found = reduction.per_input(self._values, slice(0, self.count))
        return found if per_input else found.sum(0)


class RankOne(PerInput):
    """One position: ``g[k, n] u[n]^T``, with ``g`` ``[K, N, O]`` and ``u`` ``[N, J]``."""

    def __init__(self, g: Tensor, u: Tensor, shape: torch.Size) -> None:
        super().__init__(shape, len(g), len(u))
        self._g, self._u = g, u

    def formed(self, rows: slice) -> Tensor:
        return self._g[:, rows, :, None] * self._u[rows, None, :]

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        # Homogeneity: reduction(g u^T) = reduction(g) (u^degree)^T, and the sum over inputs is a matrix product.
        left = reduction.per_input(self._g, slice(0, self.count))
        right = self._u**reduction.degree
        if per_input:
            return (left[:, :, None] * right[:, None, :]).reshape(self.count, *self.shape)
        return (left.mT @ right).reshape(self.shape)

    def gram(self) -> Tensor:
        # <g u^T, g' u'^T> = <g, g'> <u, u'>
        return gram_of(self._g) * (self._u @ self._u.T)[:, None]


class Summed(Forming):
    """Several positions: ``sum_p g[k, n, :, p] u[n, :, p]^T``, in groups of channels that do not meet.

    Args:
        g: Some inputs' left factors, ``[K, n, G, O, P]``.
        u: Some inputs' right factors, ``[n, G, J, P]`` or, where these depend on the cotangent, ``[K, n, G, J, P]``.
        columns: K.
        count: N.
        shape: The parameter's, ``G * O * J`` entries.
        width: Numbers that one input's right factors hold.
    """

    def __init__(
        self,
        g: Callable[[slice], Tensor],
        u: Callable[[slice], Tensor],
        columns: int,
        count: int,
        shape: torch.Size,
        width: int,
    ) -> None:
        super().__init__(shape, columns, count, width)
        self._g, self._u = g, u

    def formed(self, rows: slice) -> Tensor:
        g, u = self._g(rows), self._u(rows)
        if u.ndim == g.ndim or len(g) == 1:
            found = g @ u.mT
        else:  # one product per input for all cotangents: u is read once
            k, n, groups, o, p = g.shape
            joined = g.permute(1, 2, 0, 3, 4).reshape(n, groups, k * o, p) @ u.mT
            found = joined.reshape(n, groups, k, o, -1).permute(2, 0, 1, 3, 4)
        return found.reshape(*found.shape[:2], *self.shape)


class Scattered(PerInput):
    """One row of a table at each position, as an embedding's: few rows of many, summed where they come again.

    Args:
        index: Rows of the table, ``[N, P]``.
        g: Cotangents there, ``[K, N, P, D]``.
        shape: The table's.
        without: A row that has no gradient, as for padding.
    """

    def __init__(self, index: Tensor, g: Tensor, shape: torch.Size, without: int | None) -> None:
        super().__init__(shape, len(g), len(index))
        inputs = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
        if without is not None:
            g = g * (index != without)[..., None].to(g.dtype)
        pairs, place = (inputs * shape[0] + index).flatten().unique(return_inverse=True)
        self._inputs, self._rows = pairs // shape[0], pairs % shape[0]
        values = g.new_zeros(len(g), len(pairs), shape[1])
        self._values = values.index_add_(1, place, g.flatten(1, 2))

    def formed(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.count)
        own = (self._inputs >= start) & (self._inputs < stop)
        found = self._values.new_zeros(self.columns, stop - start, *self.shape)
        found[:, self._inputs[own] - start, self._rows[own]] = self._values[:, own]
        return found

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        # What is homogeneous takes zeros to zeros: only the rows that are there need it.
        found = reduction.per_input(self._values, self._inputs)
        if per_input:
            whole = found.new_zeros(self.count, *self.shape)
            whole[self._inputs, self._rows] = found
            return whole
        return found.new_zeros(self.shape).index_add_(0, self._rows, found)

    def gram(self) -> Tensor:
        used, place = self._rows.unique(return_inverse=True)
        step = max(1, MAX_GRAM_ELEMENTS // (self.columns * self.count * self.shape[1]))
        total = self._values.new_zeros(self.columns, self.count, self.columns, self.count)
        for start in range(0, len(used), step):
            own = (place >= start) & (place < start + step)
            found = self._values.new_zeros(self.columns, self.count, min(step, len(used) - start), self.shape[1])
            found[:, self._inputs[own], place[own] - start] = self._values[:, own]
            total += gram_of(found)
        return total


class Transposed(PerInput):
    """Those of a matrix's transpose."""

    def __init__(self, inner: PerInput) -> None:
        super().__init__(inner.shape[::-1], inner.columns, inner.count)
        self._inner = inner

    def formed(self, rows: slice) -> Tensor:
        return self._inner.formed(rows).mT

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        return self._inner.reduced(reduction, per_input=per_input).mT

    def gram(self) -> Tensor:
        return self._inner.gram()


class Joined(Forming):
    """A parameter used several times: what each use brings, added up."""

    def __init__(self, parts: Sequence[PerInput]) -> None:
        first = parts[0]
        super().__init__(first.shape, first.columns, first.count, max(part.width for part in parts))
        self._parts = parts

    def formed(self, rows: slice) -> Tensor:
        total = self._parts[0].formed(rows)
        for part in self._parts[1:]:
            total = total + part.formed(rows)
        return total


class Pulled(Forming):
    """Of a parameter, from those of what is made of it.

    Args:
        inner: Per-input gradients of ``made``.
        made: What is computed from the parameter, with its graph.
        parameter: The parameter.
    """

    def __init__(self, inner: PerInput, made: Tensor, parameter: Tensor) -> None:
        super().__init__(parameter.shape, inner.columns, inner.count, inner.width)
        self._inner, self._made, self._parameter = inner, made, parameter

    def formed(self, rows: slice) -> Tensor:
        g = self._inner.formed(rows)
        flat = g.reshape(-1, *self._made.shape)
        try:
            with quiet_fallbacks():
                (found,) = self._grad(flat, is_grads_batched=True)
        except RuntimeError:  # an operation that vmap does not know
            found = torch.stack([self._grad(one)[0] for one in flat])
        return found.reshape(*g.shape[:2], *self.shape)

    def _grad(self, g: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._made, self._parameter, g, retain_graph=True, **options)


class Local(Forming):
    """By torch.func, one call for each input.

    Args:
        pull: Takes some inputs' cotangents, ``[K, n, ...]`` each, to gradients ``[K, n, *shape]``.
        g: The cotangents of all inputs.
        shape: The parameter's.
    """

    def __init__(
        self, pull: Callable[[slice, Sequence[Tensor]], Tensor], g: Sequence[Tensor], shape: torch.Size
    ) -> None:
        width = sum(x[:, 0].numel() for x in g)
        super().__init__(shape, len(g[0]), g[0].shape[1], width)
        self._pull, self._g = pull, g

    def formed(self, rows: slice) -> Tensor:
        return self._pull(rows, [x[:, rows] for x in self._g])
