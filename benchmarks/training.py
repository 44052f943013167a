"""One training, a few steps at a time, so that several can take turns."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import METHODS, surroundings, switch
from benchmarks.problems import PROBLEMS, objective
from benchmarks.runs import Curve, Run, Spec, environment

WARMUP = 0.05
"""The part of the steps in which the cosine schedule's learning rate rises."""


class Training:
    """A problem, a method with its arguments, and how far it has come.

    Weights, batches and labels come from generators seeded with the spec's seed: the same weights and batches for all
    methods, and the same run again whatever else runs in between.

    Args:
        spec: Which run.
        folder: Where data sets are.
    """

    def __init__(self, spec: Spec, folder: Path | None) -> None:
        self.spec, self.problem, self.method = spec, PROBLEMS[spec.problem], METHODS[spec.method]
        self._data = self.problem.data(folder)
        self._order = torch.Generator().manual_seed(spec.seed)
        torch.manual_seed(spec.seed)
        self._model, self._loss = self.problem.network(), self.problem.loss()
        config, schedule = dict(spec.config), spec.config.get("schedule", "constant")
        config.pop("schedule", None)
        self._optimizer = self.method.make(self._model, self._loss, len(self._data.train), **config)
        calls = spec.steps // self.method.iterations
        self._scheduler = None if schedule == "constant" else cosine(self._optimizer, calls)
        self._random = torch.get_rng_state()
        self._rows = torch.empty(0, dtype=torch.long)
        self._step = self._gradients = 0
        self._seconds, self._diverged, self._curve = 0.0, False, Curve()

    @property
    def is_done(self) -> bool:
        """Whether all steps are made, or no more can or need be."""
        return self._diverged or self._has_arrived or self._step >= self.spec.steps

    @property
    def _has_arrived(self) -> bool:
        goal, found = self.problem.goal, self._curve.valid_metric
        return goal is not None and bool(found) and found[-1] <= goal

    def advance(self) -> None:
        """Goes on to the next evaluation, and evaluates."""
        torch.set_rng_state(self._random)
        switch(self._optimizer, training=True)
        self._model.train()
        losses: list[Tensor] = []
        start = time.perf_counter()
        try:
            end = min(self._step + self.problem.every, self.spec.steps)
            while self._step < end:
                losses.append(self._make_step())
        except RuntimeError as error:
            if "in a row" not in str(error):  # what fishopt says once numbers stay infinite
                raise
            self._diverged = True
        self._seconds += time.perf_counter() - start
        self._random = torch.get_rng_state()
        self._evaluate(float(torch.stack(losses).mean()) if losses else math.nan)

    def _make_step(self) -> Tensor:
        some = self._data.train.of(self._next_rows())

        def closure() -> Tensor:
            self._optimizer.zero_grad()
            with surroundings(self.method, self._optimizer):
                loss = objective(self._loss, self._model(some.inputs), some.targets)
                loss.backward(create_graph=self.method.graph)
            self._gradients += 1
            return loss

        if self.method.closure:
            loss = self._optimizer.step(closure)
        else:
            loss = closure()
            self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        if self.method.graph:
            self._optimizer.zero_grad()  # the graph in the gradients would outlive them
        self._step += self.method.iterations
        return loss.detach()

    def _next_rows(self) -> Tensor | slice:
        count, batch = len(self._data.train), self.problem.batch
        if batch is None:
            return slice(None)
        if len(self._rows) < batch:
            self._rows = torch.randperm(count, generator=self._order)
        rows, self._rows = self._rows[:batch], self._rows[batch:]
        return rows

    def _evaluate(self, train_loss: float) -> None:
        switch(self._optimizer, training=False)
        loss, metric = self.problem.evaluate(self._model, self._data.valid.of(slice(self.problem.most)))
        self._diverged = self._diverged or not math.isfinite(loss)
        self._curve.add(
            step=self._step,
            gradients=self._gradients,
            seconds=self._seconds,
            train_loss=train_loss,
            valid_loss=loss,
            valid_metric=metric,
        )

    def finish(self) -> Run:
        """The run, once it `is_done`."""
        switch(self._optimizer, training=False)
        _, valid = self.problem.evaluate(self._model, self._data.valid)
        test_loss, test = self.problem.evaluate(self._model, self._data.test)
        report = self._optimizer.report() if self.method.is_ours else None
        return Run(
            spec=self.spec,
            curve=self._curve,
            final={"valid_metric": valid, "test_loss": test_loss, "test_metric": test},
            diverged=self._diverged,
            # Of its own time: others take their turns in between.
            curvature_share=round(report.curvature_seconds / self._seconds, 4) if report else 0.0,
            choices=_choices(report.history) if report else [],
            environment=environment(self.method.package),
        )


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises for a twentieth of the steps, then falls to zero by half a cosine."""
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _choices(history: list[dict[str, Any]]) -> list[Any]:
    return [[entry["step"], {c["group"]: c["estimator"] for c in entry["choices"]}] for entry in history]
