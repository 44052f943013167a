"""A run that is killed again and again, and resumed from its last checkpoint, is the run that nobody touched.

``make soak`` kills 50 processes with SIGKILL, at random moments, in training or while they write a checkpoint.
In the end parameters, buffers, the optimizer's state, the scheduler and all random states are the same bit for bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fishopt


@dataclass
class Run:
    """All that a run consists of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loss: nn.Module
    targets: Callable[[Tensor], Tensor]
    parts: int = 1
    source: torch.Generator | None = None

    def step(self) -> None:
        """One step on a batch of fresh data, in micro-batches."""
        x = torch.randn(16, 6)
        self.optimizer.zero_grad()
        for rows in x.chunk(self.parts):
            (self.loss(self.model(rows), self.targets(rows)) / self.parts).backward()
        self.optimizer.step()
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds; fit for ``weights_only=True``."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.random.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.random.set_rng_state(state["random"])


def _labels(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


def _values(x: Tensor) -> Tensor:
    return x[:, :3].tanh() + 0.1 * torch.randn(len(x), 3)


def _dense(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), act(), nn.Linear(16, 8), act(), nn.Linear(8, 3))


def _normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(16, 3))


def _attentive() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(6, 16), nn.Unflatten(1, (2, 8)), layer, nn.Flatten(), nn.Linear(16, 3))


def _cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)


def _one_cycle(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10_000, cycle_momentum=False)


def _run(model: nn.Module, kind: Any, loss: nn.Module, schedule: Any = _cosine, parts: int = 1, **options: Any) -> Run:
    optimizer = kind(model, loss, refresh_every=7, **options)
    targets = _values if isinstance(loss, nn.MSELoss) else _labels
    return Run(model, optimizer, schedule(optimizer), loss, targets, parts)


ADAM, NGD = fishopt.FisherAdam, fishopt.DiagonalNGD

RUNS: dict[str, Callable[[], Run]] = {
    "FisherAdam, sigmoid": lambda: _run(_dense(nn.Sigmoid), ADAM, nn.CrossEntropyLoss()),
    "DiagonalNGD, ReLU": lambda: _run(_dense(nn.ReLU), NGD, nn.CrossEntropyLoss()),
    "FisherAdam, dropout, BatchNorm, one cycle": lambda: _run(_normalised(), ADAM, nn.CrossEntropyLoss(), _one_cycle),
    "DiagonalNGD, dropout, BatchNorm, squared loss": lambda: _run(_normalised(), NGD, nn.MSELoss()),
    "FisherAdam, squared loss, micro-batches": lambda: _run(_dense(nn.Tanh), ADAM, nn.MSELoss(), parts=4),
    "DiagonalNGD, micro-batches, empirical": lambda: _run(
        _dense(nn.Tanh), NGD, nn.CrossEntropyLoss(), parts=2, estimator="empirical"
    ),
    "FisherAdam, attention, LayerNorm": lambda: _run(_attentive(), ADAM, nn.CrossEntropyLoss()),
    "DiagonalNGD, attention, bfloat16": lambda: _run(_attentive().bfloat16(), NGD, nn.CrossEntropyLoss()),
}


def _fresh(name: str) -> Run:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = RUNS[name]()
    if "bfloat16" in name:
        run.model.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    return run


def train(name: str, steps: int, path: Path, every: int) -> None:
    """Trains from the last checkpoint on, writing one every so many steps, and one at the end."""
    run, done = _fresh(name), 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        run.load(saved)
        done = saved["steps"]
    for step in range(done + 1, steps + 1):
        run.step()
        if step % every == 0 or step == steps:
            _save({**run.state(), "steps": step}, path)


def _save(state: dict[str, Any], path: Path) -> None:
    """As a whole or not at all: a rename cannot be cut in two."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def differences(a: Any, b: Any, place: str = "") -> Iterator[str]:
    """Where two checkpoints differ in a single bit, but for clocks."""
    if type(a) is not type(b) or (isinstance(a, dict | list | tuple) and len(a) != len(b)):
        yield place
    elif isinstance(a, dict):
        for key in a.keys() | b.keys():
            if key != "seconds" and not (key == "fishopt" and isinstance(a[key], str)):  # a copy, with clocks in it
                yield from differences(a.get(key), b.get(key), f"{place}/{key}")
    elif isinstance(a, list | tuple):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{place}/{i}")
    elif not (a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b):
        yield place


def _start(context: Any, *args: Any) -> BaseProcess:
    process = context.Process(target=train, args=args, daemon=True)
    process.start()
    return process


def train_apart(context: Any, name: str, steps: int, path: Path, every: int) -> None:
    """`train` in a process of its own, left in peace."""
    process = _start(context, name, steps, path, every)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"training failed with exit code {process.exitcode}")


def _is_killed(process: BaseProcess, path: Path, writes: int, rest: float) -> bool:
    """Kills it after so many checkpoints and some seconds; False if it was through before."""
    seen = _written(path)
    for _ in range(writes):
        while process.is_alive() and _written(path) == seen:
            time.sleep(1e-3)
        seen = _written(path)
    process.join(rest)
    process.kill()
    process.join()
    if process.exitcode not in {0, -9}:
        raise RuntimeError(f"training failed with exit code {process.exitcode}")
    return process.exitcode != 0


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def interrupted(context: Any, name: str, steps: int, path: Path, rng: random.Random, *, kills: int, every: int) -> int:
    """Trains under fire to the end; tells how often it was killed.

    Args:
        context: What starts processes.
        name: Which of `RUNS`.
        steps: Its length.
        path: Where the checkpoint is kept.
        rng: Chooses the moments.
        kills: How often to kill it.
        every: Steps from one checkpoint to the next.
    """
    done = 0
    for _ in range(kills):
        process = _start(context, name, steps, path, every)
        done += _is_killed(process, path, rng.randint(1, max(1, steps // every // (kills + 1))), rng.uniform(0, 0.02))
    train_apart(context, name, steps, path, every)
    return done


def starter() -> Any:
    """Starts processes by forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tests.soak"])
    return context


def main() -> int:
    """The soak test: zero if all went well."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, context, failed, total = random.Random(options.seed), starter(), 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=options.kills, unit=" kill") as progress:
        for i, name in enumerate(RUNS):
            alone, killed = Path(folder) / f"{i}_alone.pt", Path(folder) / f"{i}.pt"
            train_apart(context, name, options.steps, alone, options.steps)
            share = (options.kills - total) // (len(RUNS) - i)
            done = interrupted(context, name, options.steps, killed, rng, kills=share, every=5)
            found = list(differences(*(torch.load(path, weights_only=True) for path in (alone, killed))))
            total, failed = total + done, failed + bool(found)
            progress.update(done)
            progress.write(f"{name}: {done} kills, {'differs in ' + ', '.join(found[:5]) if found else 'the same'}")
        progress.write(f"{total} kills, {len(RUNS)} runs of {options.steps} steps, {failed} of them not the same")
    return failed + (total < options.kills)
