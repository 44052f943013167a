"""What users add: that the pieces which `examples/extending.py` shows are enough, and right."""

import copy
import sys

import pytest
import torch
from torch import nn

import fishopt
from fishopt.estimators import ESTIMATORS, Cotangents, estimator
from fishopt.likelihoods import Categorical, Likelihood
from fishopt.passes.rules import RULES
from tests.asserts import assert_close
from tests.examples import loaded

LOSS = nn.CrossEntropyLoss()


@pytest.fixture
def extending():
    """The example, and everything as it was afterwards."""
    estimators, rules = dict(ESTIMATORS), {called: list(entries) for called, entries in RULES.items()}
    yield loaded("extending")
    sys.modules.pop("extending")
    for registry, before in ((ESTIMATORS, estimators), (RULES, rules)):
        registry.clear()
        registry.update(before)


def _data(count=12):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] * x[:, 1] > 0).long()


def _train(model, optimizer, steps):
    x, y = _data()
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()


def test_the_example(extending, capsys):
    extending.main(steps=120)
    printed = capsys.readouterr().out
    first, last = (float(line.rpartition(" ")[2]) for line in printed.splitlines()[:2])
    assert last < 0.7 * first
    assert "set by the user" in printed
    assert "way 'rule'" in printed
    assert "way 'call'" not in printed


def test_the_rule_is_right(extending):
    torch.manual_seed(0)
    model = extending.Product(width=2).double()  # few enough entries that nothing is sketched
    x = _data()[0].double()
    optimizer = fishopt.FisherAdam(model, LOSS)
    LOSS(model(x), _data()[1]).backward()
    optimizer.step()
    assert {way for row in optimizer.report().rows for way in row.ways.values()} == {"rule"}
    by_rule = [fishopt.fisher_diagonal(model, x, LOSS, estimator=which, generator=_seeded()) for which in ("I1", "I2")]
    by_rule.append(fishopt.label_variance(model, x, LOSS, estimator="I2"))
    RULES.pop(nn.functional.bilinear)
    others = [fishopt.fisher_diagonal(model, x, LOSS, estimator=which, generator=_seeded()) for which in ("I1", "I2")]
    others.append(fishopt.label_variance(model, x, LOSS, estimator="I2"))
    for found, expected in zip(by_rule, others, strict=True):
        assert_close(found, expected)


def _seeded():
    return torch.Generator().manual_seed(3)


def test_the_estimator_has_no_bias(extending):
    torch.manual_seed(0)
    model, x = extending.Product().double(), _data()[0].double()
    found = fishopt.fisher_diagonal(model, x, LOSS, estimator="gauss", samples=20_000, generator=_seeded())
    assert_close(found, fishopt.fisher_diagonal(model, x, LOSS, estimator="exact"), rtol=0.15, atol=1e-5)


def test_the_optimizer_is_copied_saved_and_resumed(extending):
    torch.manual_seed(0)
    model = extending.Product()
    optimizer = extending.PartiallyAdaptive(model, LOSS, generator=_seeded())
    _train(model, optimizer, 13)
    copied, other = copy.deepcopy((model, optimizer))
    torch.manual_seed(1)
    resumed = extending.Product()
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    loaded_one = extending.PartiallyAdaptive(resumed, LOSS)
    loaded_one.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, own in ((model, optimizer), (copied, other), (resumed, loaded_one)):
        _train(one, own, 9)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), model.parameters(), strict=True))
    assert optimizer.param_groups[0]["maximize"] is False
    with pytest.raises(ValueError, match=r"momentum=1\.0"):
        extending.PartiallyAdaptive(model, LOSS, momentum=1.0)


def test_copies_keep_what_a_subclass_names(extending):
    class Noting(extending.PartiallyAdaptive):
        _kept = ("notes",)
        _renewed = ("cache",)

        def __init__(self, *args):
            super().__init__(*args)
            self.notes, self.cache, self.other = [1], [2], [3]

    _, copied = copy.deepcopy((model := extending.Product(), Noting(model, LOSS)))
    assert copied.notes == [1]
    assert copied.cache is None
    assert not hasattr(copied, "other")


def test_a_report_of_an_estimator_of_the_users_own(monkeypatch):
    monkeypatch.setattr("fishopt.estimators.ESTIMATORS", dict(ESTIMATORS))
    monkeypatch.setattr("fishopt.optim.base.ESTIMATORS", sys.modules["fishopt.estimators"].ESTIMATORS)

    @estimator("again")
    def again(likelihood, h, draw):
        return Cotangents(likelihood.factor(h))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2))
    optimizer = fishopt.FisherAdam(model, LOSS, estimator="again")
    _train(model, optimizer, 1)
    assert again(Categorical(), torch.zeros(1, 2), None).squared is not None
    assert "set by the user" in str(optimizer.report())


class Six(Likelihood):
    """Classes by the six methods that are needed."""

    def __init__(self):
        self._own = Categorical()

    def nll(self, h, y):
        return self._own.nll(h, y)

    def mean(self, h):
        return self._own.mean(h)

    def statistic(self, h, y):
        return self._own.statistic(h, y)

    def sample(self, h, samples, generator=None):
        return self._own.sample(h, samples, generator)

    def apply_factor(self, h, v):
        return self._own.apply_factor(h, v)

    def quartic(self, h):
        return self._own.quartic(h)


def _quartic(likelihood, h, u):
    """M in directions of length one."""
    u, form = u / u.norm(dim=-1, keepdim=True), likelihood.quartic(h)
    fisher = torch.einsum("una,nab,unb->un", u, likelihood.covariance(h), u)
    fourth = torch.einsum("kn,kun->un", form.weights, torch.einsum("una,kna->kun", u, form.columns).pow(4))
    return form.multiple * fisher.square() + fourth


def test_a_likelihood_of_six_methods():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, h = _data()[0].double(), torch.randn(6, 3, dtype=torch.float64)
    six, own = Six(), Categorical()
    torch.testing.assert_close(six.covariance_diagonal(h), own.covariance_diagonal(h))
    for found, expected in zip(six.covariance_spectrum(h), own.covariance_spectrum(h), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    assert six.quartic_spectrum(h).upper.isinf().all()  # unless its radius is told
    six.radius = own.radius
    bound = six.quartic_spectrum(h, tight=True)
    assert (_quartic(six, h, torch.randn(200, *h.shape).double()) <= bound.upper).all()
    assert not bound.lower.any()
    assert not six.quartic_spectrum(torch.tensor([[1e4, 0.0]]).double()).upper.any()  # nothing is left to chance
    for which in ("I1", "I2", "exact", "hutchinson"):
        draws = [
            fishopt.fisher_diagonal(model, x, family, estimator=which, generator=_seeded()) for family in (six, own)
        ]
        assert_close(*draws)
    for which in ("I1", "I2", "hutchinson"):
        assert_close(*(fishopt.label_variance(model, x, family, estimator=which) for family in (six, own)))
    optimizer = fishopt.FisherAdam(model, six)
    six.nll(model(x), _data()[1]).mean().backward()
    optimizer.step()


def test_labels_of_another_shape_are_refused():
    class Flat(Six):
        def sample(self, h, samples, generator=None):
            return super().sample(h, samples, generator)[0]

    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"Flat\(\).sample returned labels of shape \(12,\); return 1 for each of 12"):
        fishopt.fisher_diagonal(model, _data()[0], Flat())
