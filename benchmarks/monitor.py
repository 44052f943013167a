"""What `TrainingMonitor` costs: ``python -m benchmarks.monitor``.

One network of MNIST's size, batches of 128 random inputs, SGD. Steps with and without the monitor take turns. Medians
of steps that are measured, of those between and of those without give the ratio at any pace, one for each block.
"""

from __future__ import annotations

import itertools
import time
from statistics import median, quantiles

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fishopt.diagnostics import TrainingMonitor

LOSS = nn.CrossEntropyLoss()
OFTEN = 10
"""Steps between measurements while times are taken."""


class Training:
    """Steps on random data, all alike."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        widths = (784, 256, 256, 128)
        layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        self.model = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(128, 784), torch.randint(10, (128,))

    def steps(self, count: int) -> float:
        """Processor seconds that so many steps take, whatever else the machine does; of all threads together."""
        start = time.process_time()
        for _ in range(count):
            self.optimizer.zero_grad()
            LOSS(self.model(self.x), self.y).backward()
            self.optimizer.step()
        return time.process_time() - start


def ratios(every: int | None, blocks: int) -> tuple[int, list[float]]:
    """The pace, and for each block the time of so many steps with the monitor over that without."""
    plain, watched = Training(), Training()
    options = {} if every is None else {"every": every}
    monitor = TrainingMonitor(watched.model, LOSS, watched.optimizer, **options)
    pace, monitor.every = monitor.every, OFTEN
    for training in (plain, watched):
        training.steps(OFTEN)  # the first measurement also finds out how to go through the network
    found = []
    for _ in range(blocks):
        without, between, measured = [], [], []
        for _ in range(4 * OFTEN):
            without.append(plain.steps(1))
            before = len(monitor.history)
            seconds = watched.steps(1)
            (measured if len(monitor.history) > before else between).append(seconds)
        found.append(((pace - 1) * median(between) + median(measured)) / (pace * median(without)))
    return pace, found


@click.command()
@click.option("--every", type=int, default=None, help="steps between measurements; the default pace if not given")
@click.option("--blocks", type=int, default=20, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
def main(every: int | None, blocks: int, threads: int) -> None:
    """Prints the ratio of processor time with the monitor to that without."""
    torch.set_num_threads(threads)
    pace, found = ratios(every, blocks)
    low, middle, high = quantiles(found, n=4)
    table = Table("pace", "blocks", "lower quartile", "median", "upper quartile")
    table.add_row(str(pace), str(blocks), *(f"{value:.4f}" for value in (low, middle, high)))
    Console().print(table)


if __name__ == "__main__":
    main()
