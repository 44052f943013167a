"""What ``lr="auto"`` adds to a rule: it collects what a search takes, and refuses what cannot be searched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.likelihoods import Likelihood
from fishopt.optim.amp import handed_over
from fishopt.optim.atomic import Transaction
from fishopt.optim.buckets import Bucket
from fishopt.optim.checks import number
from fishopt.optim.objective import Objective
from fishopt.optim.record import Record
from fishopt.optim.replica import Replica
from fishopt.optim.search import Found, Memory, Point, flat, search, split
from fishopt.optim.world import group_of

START = tuple(Memory())
"""What the first group keeps for the next search."""

GAP = 0.1
"""The part of the gradient's slope that may have another source than the loss before there is a warning."""


class AutoStep:
    """The searches of one optimizer.

    Args:
        model: The user's network.
        readout: What picks the natural parameters from the model's output.
        likelihood: The family behind the loss; None if the labels' variance, and so the loss's scale, is not known.
    """

    def __init__(self, model: nn.Module, readout: Callable[[Any], Any] | None, likelihood: Likelihood | None) -> None:
        self._replica = Replica(model, readout)
        self._likelihood = likelihood
        self._found: Found | None = None
        self._has_warned = False

    def search(
        self,
        buckets: Sequence[Bucket],
        names: Mapping[Tensor, str],
        kept: Sequence[Any],
        objective: Objective,
        undo: Transaction,
    ) -> None:
        """Moves the parameters; `take` then keeps what was found.

        Args:
            buckets: The parameters.
            names: Parameter -> its name.
            kept: What `take` put into the first group.
            objective: The loss.
            undo: Takes the parameters back if something fails before it commits.
        """
        self._found = search(_point(buckets, names), objective, Memory(*kept), undo)
        if self._found.gap > GAP and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"lr='auto': {self._found.gap:.0%} of the gradient is not of the loss as it is evaluated after a step; "
                "if that is a penalty, pass a closure to step(), else dropout or other noise in the network",
                RuntimeWarning,
                stacklevel=2,
            )

    def take(self, buckets: Sequence[Bucket], first: dict[str, Any]) -> None:
        """Takes the last search's outcome into the states and into the first group."""
        assert self._found is not None
        steps = iter(split(self._found.step, [p for bucket in buckets for p in bucket.params]))
        for bucket in buckets:
            bucket.advance()
            for last in bucket.kept("exp_avg"):
                last.copy_(next(steps))
        first["auto"] = tuple(self._found.memory)
        self._found = None

    def objective(self, records: Sequence[Record], closure: Callable[[], Any] | None, loss: Any) -> Objective:
        """The loss of what was trained on since the last step.

        Args:
            records: The forwards.
            closure: The user's.
            loss: What it returned.

        Raises:
            ValueError: If there is nothing that it can be evaluated by anew.
        """
        if not records:
            raise ValueError(
                "step() came before any backward of this step's loss, which lr='auto' looks at; call it first"
            )
        if any(record.group is not None for record in records):
            raise ValueError(NOT_DISTRIBUTED)
        if all(record.calls for record in records):
            return Objective(records, self._replica, None, closure, loss)
        if closure is None:
            raise ValueError(
                "lr='auto' looks at the loss after a step, and no call of a loss module on the model's output was "
                "seen; pass the loss module in use as likelihood and call that, or pass a closure to step()"
            )
        if self._likelihood is None or len(records) > 1:
            what = (
                "the labels' variance is not known"
                if self._likelihood is None
                else f"there were {len(records)} forwards"
            )
            raise ValueError(
                f"lr='auto' cannot tell the scale of closure's loss, as {what}; pass the loss module in use"
            )
        return Objective(records, self._replica, self._likelihood, closure, loss)


NOT_DISTRIBUTED = "lr='auto' with DistributedDataParallel: each process would take another step; pass a number as lr"


def check_auto(group: Mapping[str, Any]) -> None:
    """Checks the options of a group whose step is searched.

    Raises:
        ValueError: If one does not go with that.
    """
    kept = group["auto"]
    if not isinstance(kept, tuple | list) or len(kept) != len(START):
        raise ValueError(f"auto={kept!r}: pass lr='auto' to the optimizer, which sets it")
    number("auto", kept[0], above=True)
    if group["maximize"]:
        raise ValueError("maximize=True with lr='auto', which looks for the least loss; minimize the negative loss")


def refuse_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Raises where gradients are not the loss's.

    Raises:
        ValueError: If a GradScaler is in use.
    """
    if handed_over(optimizer) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise ValueError("lr='auto' with a GradScaler, whose scale it would take for the loss's; train in bfloat16")


def refuse_distributed(model: nn.Module) -> None:
    """Raises for a model of several processes.

    Raises:
        ValueError: If it is one.
    """
    if group_of(model) is not None:
        raise ValueError(NOT_DISTRIBUTED)


def _point(buckets: Sequence[Bucket], names: Mapping[Tensor, str]) -> Point:
    params = [p for bucket in buckets for p in bucket.params]
    rate = max(float(bucket.group["lr"]) for bucket in buckets)

    def of_groups(value: Callable[[dict[str, Any]], float]) -> Tensor | float:
        """A number for each entry, or one for all where groups agree."""
        values = {value(bucket.group) for bucket in buckets}
        if len(values) == 1:
            return values.pop()
        return flat([torch.full_like(p, value(bucket.group)) for bucket in buckets for p in bucket.params])

    return Point(
        names=[names[p] for p in params],
        params=params,
        gradient=flat([g for bucket in buckets for g in bucket.widened(bucket.grads())]),
        inverse=flat([root for bucket in buckets for root in bucket.kept("preconditioner")]).square_(),
        last=flat([last for bucket in buckets for last in bucket.kept("exp_avg")]),
        decay=of_groups(lambda group: group["weight_decay"]),
        shares=of_groups(lambda group: float(group["lr"]) / rate if rate else 1.0),
        rate=rate,
    )
