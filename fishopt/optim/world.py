"""Several processes that train one model: their estimates become one, and so do their choices."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fishopt.passes import Diagonal

T = TypeVar("T")


class World:
    """The processes that share a batch's gradient; one alone if there is no group.

    Every process calls the same methods in the same order, whatever has failed on it.

    Args:
        group: The process group of `torch.nn.parallel.DistributedDataParallel`, or None.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.size: int = dist.get_world_size(group) if group is not None else 1
        self.rank: int = dist.get_rank(group) if group is not None else 0

    def generator(self, shared: torch.Generator) -> torch.Generator:
        """This process's own source of randomness, from one that stands alike in all of them."""
        if self.size == 1:
            return shared
        seed = int(torch.randint(2**62, (), generator=shared, device=shared.device))
        return torch.Generator(shared.device).manual_seed(seed + self.rank)

    def first(self, value: T | None) -> T | None:
        """The value of the first process that has one."""
        if self.size == 1:
            return value
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return next((x for x in values if x is not None), None)

    def sums(self, numbers: list[float], device: torch.device) -> list[float]:
        """Each number summed over the processes."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self._group)
        return [float(x) for x in total]

    def mean(self, diagonal: Diagonal | None, weight: float) -> Diagonal:
        """The weighed mean of the processes' diagonals.

        Args:
            diagonal: This one's; None if it has none.
            weight: This one's share, all shares adding up to 1.
        """
        if self.size == 1:
            assert diagonal is not None
            return diagonal
        kinds = None if diagonal is None else {name: (x.shape, x.dtype) for name, x in diagonal.items()}
        agreed = self.first(kinds)
        assert agreed is not None
        device = self._device(diagonal)
        found: Diagonal = {}
        for dtype in dict.fromkeys(dtype for _, dtype in agreed.values()):
            shapes = {name: shape for name, (shape, own) in agreed.items() if own == dtype}
            flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=dtype, device=device)
            if diagonal is not None:
                torch.cat([diagonal[name].reshape(-1) for name in shapes], out=flat).mul_(weight)
            dist.all_reduce(flat, group=self._group)
            parts = flat.split([shape.numel() for shape in shapes.values()])
            found.update({name: x.reshape(shapes[name]) for name, x in zip(shapes, parts, strict=True)})
        return found

    def _device(self, diagonal: Diagonal | None) -> torch.device:
        if diagonal:
            return next(iter(diagonal.values())).device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
