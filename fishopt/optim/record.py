"""What is kept of the forwards that were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fishopt.optim.backwards import Arrival
from fishopt.optim.calls import LossCall
from fishopt.passes import Arguments, widened


@dataclass
class Record:
    """What one or several forwards were trained on.

    Attributes:
        inputs: The arguments.
        count: Inputs trained on; more than are in ``inputs`` if earlier micro-batches were dropped.
        recent: How many of these the last forward took.
        parts: Forwards.
        gradient: The gradient at the output, divided by what the loss was multiplied by, if it was asked for.
        counted: Which labels count, a row for each input, where some may not.
        factor: What the loss was multiplied by, None if the loss module does not tell; on average, of several.
        pieces: Of several, the rows and the factor of each forward that ``inputs`` are of.
        group: The processes that share this batch's gradient, None if there is one.
        calls: The loss module's calls on the output that there was a backward through, if they were asked for.
        is_within: Whether the forward was run in a backward, as by reentrant checkpoints, which the loss does not see.
    """

    inputs: Arguments
    count: int = 0
    recent: int = 0
    parts: int = 1
    gradient: Tensor | None = None
    counted: Tensor | None = None
    factor: Tensor | None = None
    pieces: list[tuple[int, Tensor | None]] = field(default_factory=list)
    group: Any = None
    calls: list[LossCall] = field(default_factory=list)
    is_within: bool = False

    def __post_init__(self) -> None:
        self.count = self.count or self.inputs.count
        self.recent = self.recent or self.inputs.count

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "group": self.group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The default group, as DistributedDataParallel has it, which is copied and pickled in no other.
        vars(self).update(state, group=dist.group.WORLD if state["group"] and dist.is_initialized() else None)

    @property
    def mask(self) -> Tensor | None:
        """Which labels count, if some do not. To be asked at a refresh alone: on a GPU the answer is waited for."""
        return leaving_out(self.counted)

    @property
    def factors(self) -> list[Tensor]:
        """What each forward's loss was multiplied by, as far as it is known."""
        found = [factor for _, factor in self.pieces] or [self.factor]
        return [factor for factor in found if factor is not None]

    @property
    def is_added_up(self) -> bool:
        """Whether the losses of several micro-batches were added up, not averaged."""
        return self.parts > 1 and self.factor is not None and abs(float(self.factor) - 1) < 1e-3

    def divided_by(self, scale: Tensor) -> Record:
        """The same if the loss had not been multiplied by a scale."""
        return replace(
            self,
            gradient=_over(scale, self.gradient),
            factor=_over(scale, self.factor),
            pieces=[(count, _over(scale, factor)) for count, factor in self.pieces],
        )

    def split(self, rows: Tensor) -> list[Tensor]:
        """What belongs to the outputs, forward by forward."""
        return list(rows.split([count for count, _ in self.pieces])) if self.pieces else [rows]

    def loss(self, outputs: Tensor) -> Tensor:
        """What was made smaller, as a function of the output: the calls of the loss module, times their factors."""
        return torch.stack([call.value(outputs) for call in self.calls]).sum()

    def take(self, arrival: Arrival, *, is_first: bool) -> None:
        """Takes in what a backward brought, the first one or a further one."""
        if is_first:
            self.factor, self.gradient, self.counted = arrival.factor, arrival.gradient, arrival.counted
            self.calls = list(arrival.calls)
        else:
            self.factor = _both(self.factor, arrival.factor, torch.add)
            self.gradient = _both(self.gradient, arrival.gradient, torch.add)
            self.counted = _both(self.counted, arrival.counted, torch.logical_or)
            self.calls.extend(arrival.calls)

    def is_of(self, inputs: Arguments) -> bool:
        """Whether these are its inputs."""
        mine, others = self.inputs.leaves, inputs.leaves
        return len(mine) == len(others) and all(map(_is_same, mine, others))


def _is_same(a: Any, b: Any) -> bool:
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def leaving_out(counted: Tensor | None) -> Tensor | None:
    """Which labels count; None where each input has one and all do, or none: predictions are all certain then."""
    is_of_no_use = counted is None or (counted.ndim < 2 and bool(counted.all() | ~counted.any()))
    return None if is_of_no_use else counted


def joined(records: Sequence[Record], dropped: int = 0, parts: int = 0) -> Record:
    """Several micro-batches as one.

    Args:
        records: In order; of those that are not like the last, whose rows cannot follow it, only the number counts.
        dropped: Inputs of earlier ones.
        parts: How many earlier ones.
    """
    last = records[-1]
    if len(records) == 1 and not parts:
        return last
    alike = [one for one in records if one.inputs.is_like(last.inputs) and _kinds(one) == _kinds(last)]
    total = dropped + sum(one.count for one in records)
    factors = [one.factor for one in records if one.factor is not None]
    return Record(
        Arguments.joined([one.inputs for one in alike]),
        count=total,
        recent=last.recent,
        parts=parts + len(records),
        gradient=_cat([one.gradient for one in alike]),
        counted=_cat([one.counted for one in alike]),
        factor=torch.stack(factors).mean() if len(factors) == len(records) else None,
        pieces=[(one.inputs.count if one.gradient is None else len(one.gradient), one.factor) for one in alike],
        group=next((one.group for one in reversed(records) if one.group is not None), None),
    )


def _over(scale: Tensor, x: Tensor | None) -> Tensor | None:
    # In float32 at least: divided by the scale, a small gradient in float16 would vanish.
    return None if x is None else widened(x) / scale.to(x.device)


def _both(a: Tensor | None, b: Tensor | None, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    return None if a is None or b is None else join(a, b)


def _kinds(record: Record) -> list[Any]:
    tensors = (record.gradient, record.counted)
    return [None if x is None else (x.shape[1:], x.dtype) for x in tensors]


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [x for x in tensors if x is not None]
    if len(present) < len(tensors) or not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
