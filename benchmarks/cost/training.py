"""What an optimizer costs in training: its update alone, and the whole step with its refreshes."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from rich import print as show
from torch import nn

import fishopt
from benchmarks.cost.inside import without_refreshes
from benchmarks.cost.networks import Problem, problem, square_layers
from benchmarks.cost.records import Row, Setting
from benchmarks.cost.timing import Case, Effort, free_memory, interleaved
from benchmarks.models import conv3_dense3, mlp

FUSED = "AdamW fused"
OURS: dict[str, Callable[..., Any]] = {
    "FisherAdam": fishopt.FisherAdam,
    "FisherAdam schedule-free": functools.partial(fishopt.FisherAdam, schedule_free=True),
    "DiagonalNGD": fishopt.DiagonalNGD,
}
TORCH: dict[str, dict[str, Any]] = {FUSED: {"fused": True}, "AdamW foreach": {"foreach": True}, "AdamW": {}}
ARRAYS = 24
"""Arrays of the parameters' size: two that all share, ours keep three each and AdamW's two, the rest for work."""


def update(setting: Setting) -> list[Row]:
    """``step()`` when no refresh is due. All optimizers move the same parameters, by the same gradients."""
    rows: list[Row] = []
    for size in (10_000, 100_000) if setting.quick else (10**4, 10**5, 10**6, 10**7, 10**8):
        if 4 * size * ARRAYS > free_memory(setting.device):
            show(f"update: {size:,} parameters left out, too little memory is free")
            continue
        model = square_layers(size).to(setting.device)
        cases = {name: _bare_step(model, make) for name, make in OURS.items()}
        for name, options in TORCH.items():
            cases[name] = torch.optim.AdamW(model.parameters(), **options).step
        effort = Effort(budget=0.3 if setting.quick else 10, least=3 if setting.quick else 7)
        times = interleaved(cases, TORCH, setting.device, effort, f"update, {size:,} parameters")
        for name, baseline in itertools.product(OURS, TORCH):
            rows.append(Row.of("update", name, baseline, times, size))
        rows.extend(Row.of("update", name, FUSED, times, size) for name in TORCH if name != FUSED)
    return rows


def _bare_step(model: nn.Sequential, make: Callable[..., Any]) -> Case:
    optimizer = make(model, nn.CrossEntropyLoss(), estimator="I1", refresh_every=10**9, refresh_inputs=1)
    first = next(model.parameters())
    x = torch.ones(1, first.shape[1], device=first.device)
    nn.functional.cross_entropy(model(x), torch.zeros(1, dtype=torch.long, device=x.device)).backward()
    optimizer.step()  # the one refresh
    without_refreshes(optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3) if p.grad is None else p.grad.fill_(1e-3)
    before = [row.refreshes for row in optimizer.report().rows]
    optimizer.step()
    assert before == [row.refreshes for row in optimizer.report().rows]
    return optimizer.step


def step(setting: Setting) -> list[Row]:
    """Whole training steps at the defaults, in blocks: refreshes and later selections are in, the first ones not.

    The warm-up lasts until refreshes are as far apart as they get.
    """
    rows: list[Row] = []
    for name, steps, effort in _schedule(quick=setting.quick):
        base = _workload(name, setting)
        loops = {method: _Training(base, method, steps) for method in (FUSED, *OURS)}
        times = interleaved(loops, [FUSED], setting.device, effort, f"step, {name}")
        shares = {method: loops[method].share(effort.warm_ups) for method in OURS}
        rows.extend(Row.of(name, m, FUSED, times, share=share, block=steps) for m, share in shares.items())
    return rows


def _schedule(*, quick: bool) -> list[tuple[str, int, Effort]]:
    """Name, steps in a block, effort. Blocks are whole refresh intervals."""
    if quick:
        return [("mlp, 0.3M", 10, Effort(budget=0.5, least=2, most=2, shortest=0, long=math.inf))]
    dear = Effort(budget=60, least=5, most=5, shortest=0, warm_ups=4, long=math.inf)
    cheap = Effort(budget=30, least=7, most=30, shortest=0, warm_ups=4, long=math.inf)
    return [("mlp, 0.3M", 100, cheap), ("mlp, 1.3M", 100, cheap), ("mlp, 5.8M", 100, dear), ("3c3d, 0.9M", 100, dear)]


def _workload(name: str, setting: Setting) -> Problem:
    torch.manual_seed(0)
    batch = 16 if setting.quick else 128
    if name.startswith("3c3d"):
        return problem(name, conv3_dense3(), (3, 32, 32), batch, setting.device)
    hidden = {"mlp, 0.3M": (256, 256, 128), "mlp, 1.3M": (1024, 512), "mlp, 5.8M": (2048, 2048)}[name]
    return problem(name, mlp((784, *hidden, 10)), (784,), batch, setting.device)


class _Training:
    """A training that goes on by a block of steps at each call."""

    def __init__(self, base: Problem, method: str, steps: int) -> None:
        self._model = copy.deepcopy(base.model)
        self._base = base
        # Labels that differ from step to step cannot be learnt: no loss of zero, and no arithmetic on denormals.
        self._labels = [base.y[torch.randperm(len(base.y), device=base.y.device)] for _ in range(steps)]
        self._loss_fn = nn.CrossEntropyLoss()
        self._optimizer: Any = (
            OURS[method](self._model, self._loss_fn)
            if method in OURS
            else torch.optim.AdamW(self._model.parameters(), **TORCH[method])
        )
        self._is_ours = method in OURS
        self._spent: list[float] = []
        self._clock: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        for y in self._labels:
            self._optimizer.zero_grad()
            self._loss_fn(self._model(self._base.x), y).backward()
            self._optimizer.step()
        self._clock.append(time.perf_counter() - start)
        self._spent.append(self._optimizer.report().curvature_seconds if self._is_ours else 0.0)

    def share(self, warm_ups: int) -> float:
        """The part of the time after the warm-up that went into curvature."""
        return (self._spent[-1] - self._spent[warm_ups - 1]) / sum(self._clock[warm_ups:])
