"""FisherAdam damped by the standard error of its estimate: does it help? ``python -m benchmarks ablate caution``.

`Cautious` knows how uncertain a layer's averaged Fisher diagonal is, from how far each new estimate is from the
average: inputs, labels and sketches all show in that. With estimates of variance ``s^2`` the average of n of them, of
decay b, has the variance ``r s^2``, ``r = (1 - b) / (1 + b) * (1 + b^n) / (1 - b^n)``, and the next one is
``(1 + r) s^2`` away from it in mean square. It then either adds that error to F (``caution``), or moves F towards the
layer's mean by the share of the entries' variance that is noise (``shrink``, James and Stein's), so that both fade as
the average sharpens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import fishopt
from fishopt.groups import by_layer
from fishopt.optim.averages import Average
from fishopt.optim.estimate import Estimate, Moment


class Cautious(fishopt.FisherAdam):
    """`fishopt.FisherAdam` whose preconditioner allows for the standard error of what it is made of.

    Args:
        *args: As FisherAdam's.
        caution: Standard errors, root mean squares over the layer, that are added to each entry of F.
        shrink: Whether to move each entry towards the layer's mean.
        **options: As FisherAdam's.
    """

    def __init__(self, *args: Any, caution: float = 0.0, shrink: bool = False, **options: Any) -> None:
        self._caution, self._shrink = caution, shrink
        super().__init__(*args, **options)

    def _take(self, estimate: Estimate, *, trained: bool) -> None:
        parameters = {name: p for p, name in self._name_of.items()}
        decay = self._decay(self.param_groups[0])
        for names in by_layer(estimate.diagonal).values():
            size = sum(parameters[name].numel() for name in names)
            total = sum(spread(estimate.diagonal[name], self.state[parameters[name]], decay) for name in names)
            for name in names:
                self.state[parameters[name]]["error"] = (total / size) ** 0.5
        super()._take(estimate, trained=trained)

    def _preconditioner(self, fisher: Average, group: dict[str, Any], state: dict[str, Any], moment: Moment) -> Tensor:
        values = fisher.values.mul_(fisher.correction)
        if self._caution:
            values.add_(self._caution * state["error"])
        if self._shrink:
            scatter = float((values - fisher.layer).square().mean())
            signal = max(0.0, 1 - state["error"] ** 2 / scatter) if scatter else 0.0
            values.sub_(fisher.layer).mul_(signal).add_(fisher.layer)
        return super()._preconditioner(fisher._replace(correction=1.0), group, state, moment)


def spread(new: Tensor, state: dict[str, Any], decay: float) -> float:
    """The variance of a parameter's averaged estimate once ``new`` is in it, summed over entries.

    It is itself an average, kept in the state, of the same decay; zero before there is a second estimate.
    """
    count = state.get("refreshes", 0)
    if count:
        average = state["fisher"] / (1 - decay**count)
        single = float((new - average).square().sum()) / (1 + _share(decay, count))
        state["single"] = decay * state.get("single", 0.0) + (1 - decay) * single
    weight = 1 - decay**count
    return state["single"] / weight * _share(decay, count + 1) if count else 0.0


def _share(decay: float, count: int) -> float:
    """The variance of an average of so many estimates over that of one."""
    return (1 - decay) / (1 + decay) * (1 + decay**count) / (1 - decay**count)
