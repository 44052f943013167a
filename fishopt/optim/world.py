"""Several processes that train one model: their estimates become one, and so do their choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fishopt.optim.averages import precision
from fishopt.passes import Diagonal

T = TypeVar("T")


class World:
    """The processes that share a batch's gradient; one alone if there is no group.

    Every process calls the same methods in the same order, whatever has failed on it.

    Args:
        group: The process group of `torch.nn.parallel.DistributedDataParallel`, or None.
        device: Where the processes exchange tensors.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self.size: int = dist.get_world_size(group) if group is not None else 1
        self.rank: int = dist.get_rank(group) if group is not None else 0

    def generator(self, shared: torch.Generator) -> torch.Generator:
        """This process's own source of randomness.

        ``shared`` first becomes what the first process has, if each started from another seed: a checkpoint may be of
        any of them, and the run that is resumed from it is to go on as it would have.
        """
        if self.size == 1:
            return shared
        state = shared.get_state().to(self._device)
        dist.broadcast(state, dist.get_global_rank(self._group, 0), group=self._group)
        shared.set_state(state.cpu())
        seed = int(torch.randint(2**62, (), generator=shared, device=shared.device))
        return torch.Generator(shared.device).manual_seed(seed + self.rank)

    def first(self, value: T | None) -> T | None:
        """The value of the first process that has one."""
        if self.size == 1:
            return value
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return next((x for x in values if x is not None), None)

    def sums(self, numbers: list[float]) -> list[float]:
        """Each number summed over the processes."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def mean(self, diagonal: Diagonal | None, params: Mapping[str, Tensor], weight: float) -> Diagonal:
        """The weighed mean of the processes' diagonals.

        Args:
            diagonal: This one's; None if it has none.
            params: The parameters that any process has an estimate of, in the order that all have them in.
            weight: This one's share, all shares adding up to 1.
        """
        if self.size == 1:
            assert diagonal is not None
            return diagonal
        found: Diagonal = {}
        for dtype in dict.fromkeys(map(precision, params.values())):
            alike = {name: p for name, p in params.items() if precision(p) == dtype}
            sizes = [p.numel() for p in alike.values()]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=self._device)
            if diagonal is not None:
                torch._foreach_copy_(list(flat.split(sizes)), [diagonal[name].reshape(-1) for name in alike])
                flat.mul_(weight)
            dist.all_reduce(flat, group=self._group)
            parts = zip(alike.items(), flat.split(sizes), strict=True)
            found.update({name: x.view(p.shape) for (name, p), x in parts})
        return {name: found[name] for name in params}


def group_of(model: nn.Module) -> Any:
    """The processes that train a model which is being called, or has just been; None if this one does alone.

    Raises:
        RuntimeError: If some of them may stop before others, which would leave these waiting.
    """
    wrapper = _data_parallel(model) or DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return None
    joins = wrapper._join_config
    if joins.enable and not joins.throw_on_early_termination:
        raise RuntimeError(
            "model.join() is on: curvature needs all processes, and would wait for those that have run out of inputs; "
            "give each process the same number of batches, as DistributedSampler does, or pass "
            "throw_on_early_termination=True"
        )
    return wrapper.process_group


def _data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)  # by torch.compile
        if inner is None:
            return None
        model = inner
    return model
