"""One model in several processes: its batches are split, its curvature is everyone's.

    torchrun --nproc-per-node 2 examples/distributed.py

On GPUs it is the same with ``backend="nccl"`` and everything on ``cuda:{LOCAL_RANK}``.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fishopt


def main() -> None:
    """Trains on points around four centres, and reports in the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    labels = torch.arange(1024) % 4
    points = 3 * torch.randn(4, 8)[labels] + torch.randn(1024, 8)
    data = TensorDataset(points, labels)
    sampler: DistributedSampler[TensorDataset] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)

    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4)))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = fishopt.FisherAdam(model, loss_fn)  # built on the wrapped model
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

    if dist.get_rank() == 0:
        with torch.no_grad():
            wrong = (model.module(points).argmax(1) != labels).double().mean()
        print(f"{dist.get_world_size()} processes, training error {wrong:.3f}")
        print(optimizer.report())
    dist.barrier()  # gloo's threads let go of the last gradients before Python ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
