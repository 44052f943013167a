"""What is shown to users runs: the examples in a reduced size, the README's code, the benchmark's pieces."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

import fishopt
from tests.asserts import assert_at_most, assert_close
from tests.examples import loaded
from tests.reference import derivatives

ROOT = Path(__file__).parent.parent


def test_digits(tmp_path, capsys):
    digits = loaded("digits")
    threads = torch.get_num_threads()
    digits.main(["--epochs", "3", "--seeds", "2", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "digits_choices.png"}
    assert printed.rstrip().endswith(str((tmp_path / "digits.png").resolve()))
    for word in ("AdamW", "FisherAdam", "DiagonalNGD", "structural"):
        assert word in printed


def test_distributed():
    """As users start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, str(ROOT / "examples" / "distributed.py"), "--epochs", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("2 processes, training error 0.0") == 1
    assert ran.stdout.count("FisherAdam") == 1


def test_custom_likelihood_runs(capsys):
    loaded("custom_likelihood").main(steps=30)
    assert capsys.readouterr().out.count("held-out") == 2


def test_a_likelihood_of_two_methods_is_right_everywhere():
    """The negative binomial of the example, its labels enumerated."""
    likelihood = loaded("custom_likelihood").NegativeBinomial(r=3)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    model.append(loaded("custom_likelihood").NegativeSoftplus())
    x = torch.randn(2, 2, dtype=torch.float64)
    d = derivatives(model, (x,))
    y = torch.arange(0.0, 200, dtype=torch.float64)[:, None]
    weights = torch.stack([-likelihood.nll(d.h, label.expand(2, 1)) for label in y]).exp()
    torch.testing.assert_close(weights.sum(0), torch.ones(2, dtype=torch.float64))
    eta = (weights * y).sum(0)[:, None]
    torch.testing.assert_close(likelihood.mean(d.h), eta)
    scores = torch.einsum("nap,kna->knp", d.first, eta - y[:, None]).square()
    fisher = torch.einsum("kn,knp->np", weights, scores)
    assert_close(fishopt.fisher_diagonal(model, x, likelihood, estimator="exact"), d.by_name(fisher.mean(0)))
    v1 = torch.einsum("kn,knp->np", weights, (scores - fisher).square())
    assert_close(fishopt.label_variance(model, x, likelihood, estimator="I1"), d.by_name(v1.mean(0)))
    v2 = torch.einsum("kn,knp->np", weights, torch.einsum("nap,kna->knp", d.second, eta - y[:, None]).square())
    found = fishopt.label_variance(model, x, likelihood, estimator="I2")
    assert_close(found, d.by_name(v2.mean(0)))
    assert_at_most(found, fishopt.variance_bound(model, x, likelihood, estimator="I2"))
    draws = likelihood.sample(d.h, 50_000, torch.Generator().manual_seed(0))
    z = (draws.mean(0) - eta) / (likelihood.second_cumulant(d.h) / 50_000).sqrt()
    assert z.abs().max() < 4.5


def test_the_readmes_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert "structural" in capsys.readouterr().out


def test_the_benchmark_of_cost(tmp_path, capsys):
    from benchmarks.cost.measure import main

    threads = torch.get_num_threads()
    main(["--quick", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    measured = json.loads((tmp_path / "cost.json").read_text())
    assert {"cost.png", "cost_growth.png"} < {path.name for path in tmp_path.iterdir()}
    assert all(
        name in json.dumps(measured) for name in ("passes", "update", "step", "growth", "hutchinson", "AdaHessian")
    )
    assert "BackPACK SumGradSquared" in capsys.readouterr().out
