"""One thread for each worker (two would wait for each other on two cores, at several times the cost), and Ctrl-C."""

import signal

import pytest
import torch

torch.set_num_threads(1)
# Tests send Ctrl-C to themselves, and a shell's background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread():
    """Networks of a hundred weights: on a busy machine threads that wait for each other are all that takes time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """As many threads after the test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
