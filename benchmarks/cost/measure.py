"""What curvature costs, side by side with what else there is: ``python -m benchmarks.cost``.

Four sections: ``passes``, one estimate against one gradient, by fishopt, BackPACK, torch.func and AdaHessian's way;
``update``, ``step()`` without a refresh against AdamW's; ``step``, whole training steps; ``growth``, an estimate as
batch, width, depth and outputs grow. Every result is a ratio to a baseline timed in the same rounds: its median and
quartiles. Writes ``cost.json``, ``cost.png`` and ``cost_growth.png``, and prints tables. The whole takes about ten
minutes on two cores, and its largest update 10 GB, or is left out.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cost.growth import growth
from benchmarks.cost.passes import passes
from benchmarks.cost.plots import draw
from benchmarks.cost.records import Section, Setting, environment, write
from benchmarks.cost.tables import tables
from benchmarks.cost.training import step, update

SECTIONS: dict[str, Section] = {"passes": passes, "update": update, "step": step, "growth": growth}


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    folder = options.out or Path("out" if options.quick else "benchmarks/results")
    for name in options.device:
        setting = Setting(torch.device(name), options.quick)
        for section in options.only:
            start = time.perf_counter()
            with warnings.catch_warnings():
                # BackPACK's hooks, on networks whose inputs need no gradient.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                measured = {section: SECTIONS[section](setting)}
            console.print(f"{name}, {section}: {time.perf_counter() - start:.0f} s", style="dim")
            console.print(*tables(measured))
            # After each section, so that a run that is cut short leaves what it has.
            everything = write(folder / "cost.json", setting.device.type, measured, environment(setting))
        for path in (folder / "cost.json", *draw(everything, folder, setting.device.type)):
            console.print(f"written: {path}", soft_wrap=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everywhere = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it runs, no more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", nargs="+", default=everywhere, help="cpu, cuda; all that there are by default")
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results by default, out/ with --quick")
    return parser.parse_args(arguments)
