"""Real processes for tests: each runs a function with a gloo process group around it.

The processes are forked from one that has everything imported, so that a group takes a fifth of a second to start.
"""

from __future__ import annotations

import inspect
import multiprocessing
import sys
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist

COLLECTIVE = timedelta(seconds=20)
"""What one meeting of processes may take: a deadlock ends then."""

LIMIT = 60.0
"""Seconds for a whole function."""


def run(size, function, **given):
    """Calls ``function(**given)`` in ``size`` processes; what goes wrong in any of them is raised here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.ranks", "fishopt", "torch._dynamo", "torch.distributed.checkpoint", function.__module__]
    )
    with TemporaryDirectory() as directory:
        ranks = [
            context.Process(
                target=_rank, args=(Path(directory), rank, size, function.__module__, function.__name__, given)
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        _join(ranks)
        told = [file.read_text() for file in sorted(Path(directory).glob("*.error"))]
        ends = [process.exitcode for process in ranks]
    if any(ends):
        pytest.fail("\n".join(told) or f"exit codes {ends}", pytrace=False)


def worlds(*sizes):
    """A decorator for tests that are to run in each process of groups of these sizes."""

    def decorate(function):
        def test(size, **given):
            run(size, function, **given)

        test.on_each_rank = function
        test.pytestmark = list(getattr(function, "pytestmark", []))
        own = inspect.Parameter("size", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *inspect.signature(function).parameters.values()])
        test.__name__, test.__doc__, test.__module__ = function.__name__, function.__doc__, function.__module__
        return pytest.mark.parametrize("size", sizes)(test)

    return decorate


def gathered(value):
    """Each process's value, in order."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _rank(directory, rank, size, module, name, given):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        function = getattr(sys.modules.get(module) or __import__(module), name)
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size, timeout=COLLECTIVE
        )
        getattr(function, "on_each_rank", function)(**given)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - pytest's own failures too
        (directory / f"{rank}.error").write_text(f"--- rank {rank} of {size}\n{traceback.format_exc()}")
        sys.exit(1)


def _join(processes):
    """Waits for all; once one has failed the others have three seconds left."""
    end = time.monotonic() + LIMIT
    while alive := [p for p in processes if p.exitcode is None]:
        wait([p.sentinel for p in alive], timeout=max(0.0, end - time.monotonic()))
        if any(p.exitcode for p in processes):
            end = min(end, time.monotonic() + 3)
        if time.monotonic() >= end:
            for process in alive:
                process.kill()
                process.join()
