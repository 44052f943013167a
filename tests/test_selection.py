"""Selection: the paper's outcome, agreement with the quantities it rests on, reasons, cost."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt import selection
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.traced import TracedPass
from tests.cases import Case


def _mlp(act, sizes=(64, 32, 16, 10)):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def _mean(diagonal, group):
    values = torch.cat([v.flatten() for name, v in diagonal.items() if name.rpartition(".")[0] == group])
    return float(values.mean())


@pytest.mark.parametrize("criterion", ["bound", "exact"])
def test_sigmoid_mlp_has_the_papers_outcome(criterion):
    model = _mlp(nn.Sigmoid, (784, 64, 32, 10))
    choices = fishopt.select_estimators(model, torch.rand(3, 784), "categorical", criterion=criterion)
    assert [c.group for c in choices] == ["0", "2", "4"]
    assert [c.estimator for c in choices] == ["I1", "I1", "I2"]
    assert "structural" in choices[-1].reason
    assert "Remark 4.4" in choices[-1].reason
    assert "I1" in choices[0].reason
    assert "I2" in choices[0].reason


def test_relu_mlp_is_structural_everywhere():
    choices = fishopt.select_estimators(_mlp(nn.ReLU), torch.rand(4, 64), nn.CrossEntropyLoss())
    assert [c.estimator for c in choices] == ["I2"] * 3
    assert all("structural" in c.reason for c in choices)
    assert "piecewise" in choices[0].reason


@pytest.mark.parametrize("network", ["sigmoid", "softplus", "conv_sigmoid", "residual"])
def test_scores_are_means_of_what_they_are_named_after(network):
    model, inputs, likelihood = Case(network, "categorical").build()
    bound = functools.partial(fishopt.variance_bound, tight=True)
    for criterion, of in (("bound", bound), ("exact", fishopt.label_variance)):
        for choice in fishopt.select_estimators(
            model, inputs, likelihood, criterion=criterion, candidates=("I1", "I2", "hutchinson", "exact")
        ):
            for name, score in choice.scores.items():
                diagonal = of(model, inputs, likelihood, estimator=name)
                diagonal = {("model." + k if "." not in k else k): v for k, v in diagonal.items()}
                assert math.isclose(score, _mean(diagonal, choice.group), rel_tol=1e-6, abs_tol=1e-300)
            assert choice.estimator == min(choice.scores, key=choice.scores.get)


def test_efficiency_weighs_variance_by_cost():
    """ReLU: exact I2 takes a column per output, so signs win in hidden layers; the last layer's I2 takes one column."""
    torch.manual_seed(0)
    model = _mlp(nn.ReLU, (20, 16, 300))
    x = torch.randn(4, 20)
    choices = fishopt.select_estimators(
        model, x, "categorical", criterion="efficiency", candidates=("I1", "I2", "hutchinson")
    )
    assert [c.estimator for c in choices] == ["hutchinson", "I2"]
    assert choices[0].scores["I2"] > choices[0].scores["I1"]


def test_smooth_networks_do_not_pay_for_second_derivatives_that_cannot_win(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("computed second derivatives")

    for engine in (TracedPass, FunctionalPass):
        monkeypatch.setattr(engine, "hessian_square", forbidden)
    choices = fishopt.select_estimators(_mlp(nn.Softplus), torch.rand(4, 64), "categorical", criterion="efficiency")
    assert [c.estimator for c in choices] == ["I1", "I1", "I2"]
    assert "cost alone" in choices[0].reason


def test_wide_smooth_networks_are_judged_by_the_sketch():
    """Whose own variance counts against I2; exact second derivatives would take a thousand backward passes."""
    model = nn.Sequential(_mlp(nn.Softplus, (300, 200, 300)), nn.Softplus(), nn.Linear(300, 10))
    x = torch.rand(2, 300)
    choices = fishopt.select_estimators(model, x, "categorical")
    again = fishopt.select_estimators(model, x, "categorical")
    assert [choice.estimator for choice in choices] == ["I1", "I1", "I2"]
    assert all(math.isfinite(score) for choice in choices for score in choice.scores.values())
    assert [choice.scores for choice in choices] == [choice.scores for choice in again]


def test_groups_of_the_user():
    model = _mlp(nn.Sigmoid)
    groups = {"bottom": list(model[0].parameters()), "rest": ["2.weight"], "top": ["4.weight", "4.bias"]}
    choices = fishopt.select_estimators(model, torch.rand(4, 64), "categorical", groups=groups)
    assert [c.group for c in choices] == ["bottom", "rest", "top"]
    assert (choices[0].estimator, choices[2].estimator) == ("I1", "I2")
    listed = fishopt.select_estimators(model, torch.rand(4, 64), "categorical", groups=list(groups.values()))
    assert [c.group for c in listed] == ["group 0", "group 1", "group 2"]


def test_probes_replace_columns_for_many_outputs(monkeypatch):
    """With more outputs than columns the norms are estimated; the choice stays."""
    model, x = _mlp(nn.Sigmoid), torch.rand(8, 64)
    full = fishopt.select_estimators(model, x, "categorical")
    monkeypatch.setattr(selection, "MAX_COLUMNS", 8)
    few = fishopt.select_estimators(model, x, "categorical")
    assert [c.estimator for c in few] == [c.estimator for c in full]
    for a, b in zip(few, full, strict=True):
        assert 0.3 < a.scores["I1"] / b.scores["I1"] < 3
    again = fishopt.select_estimators(model, x, "categorical")
    assert [c.scores for c in again] == [c.scores for c in few]


def test_bounds_can_mislead_on_tiny_networks():
    """As the README says: V1's bound is looser than V2's, and on a network this small that decides."""
    model, x = _mlp(nn.Sigmoid), torch.rand(4, 64)
    by_bound = fishopt.select_estimators(model, x, "categorical", criterion="bound")
    by_variance = fishopt.select_estimators(model, x, "categorical", criterion="exact")
    assert [c.estimator for c in by_bound] == ["I1", "I2", "I2"]
    assert [c.estimator for c in by_variance] == ["I1", "I1", "I2"]
