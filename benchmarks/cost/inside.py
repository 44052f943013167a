"""All that the measurements of cost know of fishopt's inside; what changes there is followed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fishopt
from benchmarks.cost.timing import Case
from fishopt.batch import Batch
from fishopt.estimators import Draw, by_structure, estimate
from fishopt.passes import Shadow

Plan = Mapping[str, Sequence[str]]
"""Estimator -> the parameters that it is for."""


def estimation(model: nn.Module, x: Tensor, likelihood: fishopt.Likelihood, plan: Plan) -> Case:
    """An estimate as an optimizer's refresh makes it: the shadow is built and the structure read once, beforehand."""
    shadow = Shadow(model)
    generator = torch.Generator(x.device).manual_seed(0)

    def run() -> dict[str, Tensor]:
        batch = Batch(shadow, (x,), likelihood)
        return estimate(batch, by_structure(plan, batch.structure, batch.coverage), Draw(1, generator))

    return run


def without_refreshes(optimizer: Any) -> None:
    """Takes an optimizer that has refreshed once past the steps that refresh often; ``refresh_every`` is huge."""
    optimizer._steps = 10**9 + 1
