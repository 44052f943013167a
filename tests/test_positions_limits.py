"""Labels at several positions: what a vocabulary of 50,000 costs or is too many for, and what is refused."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fishopt
from tests.positions_setup import IGNORED


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def test_a_vocabulary_of_50_000_builds_nothing_with_its_square():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 50_000))
    x = torch.randn(2, 2, 3)
    targets = torch.tensor([[1, IGNORED], [2, 49_999]])
    with Largest() as largest:
        for name in ("I1", "hutchinson", "empirical"):
            found = fishopt.fisher_diagonal(model, x, "categorical", estimator=name, targets=targets)
            assert all(torch.isfinite(v).all() for v in found.values())
        choices = fishopt.select_estimators(
            model, x, "categorical", criterion="efficiency", candidates=("I1", "I2", "hutchinson")
        )
    assert {choice.estimator for choice in choices} <= {"I1", "hutchinson"}
    assert 50_000 <= largest.numbers < 20_000_000  # some 16 vectors of 4 x 50,000 outputs, and the head's own gradients
    for name in ("exact", "I2"):
        with pytest.raises(ValueError, match=r"100,000 outputs.*hutchinson"):
            fishopt.fisher_diagonal(model, x, "categorical", estimator=name)
    choices = fishopt.select_estimators(model, x, "categorical")
    assert [choice.estimator for choice in choices] == ["I1", "I1"]
    assert "I2 is passed over" in choices[0].reason
    with pytest.raises(ValueError, match="criterion='efficiency'"):
        fishopt.label_variance(model, x, "categorical", estimator="I1")


HEAD = nn.Linear(4, 3)
X = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([[0, 1]] * 5)
MAPS = nn.Sequential(nn.Unflatten(2, (2, 2)), nn.Conv2d(2, 3, 1))


def _fisher(model=HEAD, inputs=X, likelihood="categorical", **options):
    return fishopt.fisher_diagonal(model, inputs, likelihood, **options)


REFUSED = [
    (lambda: fishopt.Categorical(dim=0), "dim=0"),
    (lambda: fishopt.Categorical(dim=1.0), r"dim=1\.0"),
    (lambda: fishopt.Categorical(dim=True), "dim=True"),
    (lambda: fishopt.Categorical(ignore_index=None), "ignore_index=None"),
    (lambda: _fisher(likelihood=fishopt.Categorical(dim=3)), r"\(5, 2, 3\).*dimension 3"),
    (lambda: _fisher(likelihood=fishopt.Categorical(dim=-3)), r"\(5, 2, 3\).*dimension -3"),
    (lambda: _fisher(inputs=X[:, 0], likelihood=fishopt.Categorical(dim=2)), r"\(5, 3\).*dimension 2"),
    (lambda: _fisher(model=nn.Linear(4, 1)), r"\(5, 2, 1\).*C >= 2"),
    (lambda: _fisher(targets=torch.full((5, 2), IGNORED)), "nothing but labels to be ignored"),
    (lambda: _fisher(targets=Y[:, :1]), r"\(5, 1\).*shape \(5, 2\)"),
    (lambda: _fisher(targets=Y[:, 0]), r"\(5,\).*\(5, 2\)"),
    (lambda: _fisher(targets=Y.float()), "targets is for"),
    (lambda: _fisher(likelihood="poisson", targets=Y), "targets is for"),
    (lambda: _fisher(estimator="empirical", targets=Y[:, 0]), r"\(5,\).*\(5, 2\)"),
    (lambda: _fisher(estimator="empirical", targets=Y.float()), r"\(5, 2\).*\(5, 2, 3\)"),
    (lambda: _fisher(estimator="empirical", targets=Y + 2), "targets contains 3.*0..2"),
    (lambda: _fisher(estimator="empirical", targets=Y - 1), "targets contains -1"),
    (lambda: _fisher(estimator="empirical", targets=torch.ones(5, 2, 3)), "sum to 1"),
    (lambda: _fisher(likelihood=nn.CrossEntropyLoss(weight=torch.ones(3))), r"weight.*Categorical\(\)"),
    (lambda: _fisher(MAPS, likelihood=nn.CrossEntropyLoss()), r"Categorical\(dim=1\)"),
    (lambda: _fisher(MAPS, likelihood=fishopt.Categorical(dim=1), targets=Y), r"shape \(5, 2, 2\)"),
]


@pytest.mark.parametrize("row", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_bad_input(row):
    call, match = row
    with pytest.raises(ValueError, match=match):
        call()
