"""Clocks: cases timed in turn within one loop, so that what disturbs one disturbs its baseline too; peak memory."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from tqdm import tqdm

Case = Callable[[], object]
Times = dict[str, dict[int, float]]
"""Case -> round -> seconds of one call in it."""

SHORTEST = 4e-3
"""Seconds that a measurement lasts at least: cheap cases are called several times in each."""


@dataclass(frozen=True)
class Spread:
    """Ratios over the rounds: their median and quartiles."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of some values."""
        listed = sorted(values)
        low, _, high = quantiles(listed, n=4, method="inclusive") if len(listed) > 1 else listed * 3
        return cls(median(listed), low, high, len(listed))

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 2
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        budget: Seconds for all cases of a loop together, more or less.
        least: Repeats of a dear case; fewer only where they would cost more than six times its share of the budget.
        most: Repeats of a cheap case.
        shortest: Seconds of a measurement, at least.
        warm_ups: Calls before it counts.
        long: Seconds from which one such call is enough.
    """

    budget: float
    least: int = 7
    most: int = 50
    shortest: float = SHORTEST
    warm_ups: int = 2
    long: float = 0.3

    def repeats(self, seconds: float, cases: int) -> int:
        """How often to measure a case that takes ``seconds``, one of so many."""
        share = self.budget / cases
        wanted = min(self.most, max(self.least, int(share / max(seconds, self.shortest))))
        return max(1, min(wanted, int(6 * share / seconds)))


def timed(case: Case, device: torch.device, calls: int = 1) -> float:
    """Seconds per call."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        case()
    _wait(device)
    return (time.perf_counter() - start) / calls


def interleaved(
    cases: Mapping[str, Case], baselines: Iterable[str], device: torch.device, effort: Effort, title: str
) -> Times:
    """Times the cases in rounds, each round from another one on and every second one backwards.

    Args:
        cases: What to time.
        baselines: Those that every round has; of the others dear ones sit some rounds out, evenly.
        device: Waited for before the clock is read.
        effort: How much to measure.
        title: Of the progress bar.
    """
    costs: dict[str, float] = {}
    for name in tqdm(cases, desc=f"{title}: warm-up", leave=False, disable=None):
        costs[name] = timed(cases[name], device)
        for _ in range(1, effort.warm_ups if costs[name] < effort.long else 1):
            costs[name] = timed(cases[name], device)
    counts = {name: effort.repeats(cost, len(cases)) for name, cost in costs.items()}
    rounds = max(counts.values())
    counts.update(dict.fromkeys(baselines, rounds))
    times: Times = {name: {} for name in cases}
    gc.collect()
    with tqdm(total=sum(counts.values()), desc=title, leave=False, disable=None) as bar:
        for turn in range(rounds):
            for name in _order(list(cases), turn):
                if turn * counts[name] // rounds < (turn + 1) * counts[name] // rounds:
                    calls = max(1, math.ceil(effort.shortest / costs[name]))
                    times[name][turn] = timed(cases[name], device, calls)
                    bar.update()
    return times


def ratio(times: Times, name: str, baseline: str) -> Spread:
    """The spread of a case's time over its baseline's in the same round."""
    return Spread.of(seconds / times[baseline][turn] for turn, seconds in times[name].items())


def seconds(times: Times, name: str) -> float:
    """The median time of a case."""
    return median(times[name].values())


def peak_memory(case: Case, device: torch.device) -> int:
    """Bytes of tensors that a call holds at its peak, beyond what was there before; not the libraries' own scratch.

    The case should have run before, so that what it keeps for good is there already.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        case()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux: nobody to ask, so nothing is ruled out
        return 2**62
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _order(names: list[str], turn: int) -> list[str]:
    start = turn // 2 % len(names)
    turned = names[start:] + names[:start]
    # Backwards too, so that no case always runs in the caches that the same other one leaves.
    return turned[::-1] if turn % 2 else turned


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Without the line that the profiler's native code writes at each start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
