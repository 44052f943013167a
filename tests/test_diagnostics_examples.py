"""What is shown of watched runs: the picture, the example in a reduced size, and the benchmark of what it costs."""

import math

import pytest
import torch

from fishopt.plotting import Characterised, plot_characterisation
from tests.examples import loaded


def test_a_picture_of_runs(tmp_path):
    runs = [Characterised(lr, size, 10.0 * size, lr / size, 0.1 * lr) for lr in (0.1, 0.2) for size in (8, 16)]
    path = plot_characterisation([*runs, Characterised(0.3, 8, 5.0, 1.0, 0.0)], tmp_path / "runs.png")
    assert path.stat().st_size > 10_000


@pytest.fixture(scope="module")
def characterising():
    return loaded("characterising")


def test_the_example(characterising, tmp_path, capsys):
    threads = torch.get_num_threads()
    characterising.main(["--quick", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(str((tmp_path / "characterising.png").resolve()))
    checks = [line for line in printed.splitlines() if line.rstrip().endswith(("yes  │", "NO   │"))]
    assert len([line for line in checks if "row" in line or "inputs" in line or "watched" in line]) == 6
    assert all("yes" in line for line in checks if "L_K falls" not in line and "C_k rises" not in line)
    for name in ("16", "64", "256", "stages", "automatic"):
        assert f"│ {name} " in printed


def test_the_benchmark():
    from benchmarks.monitor import ratios

    pace, found = ratios(every=3, blocks=2)
    assert pace == 3
    assert len(found) == 2
    assert all(0 < ratio < math.inf for ratio in found)
