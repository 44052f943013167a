"""Selection: the paper's outcome, agreement with the quantities it rests on, reasons, cost."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from torch import nn

import fishopt
from fishopt import batch, judging
from fishopt.optim.curvature import CANDIDATES
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.traced import TracedPass
from tests.cases import CASES, Case
from tests.reference import derivatives, moments

ALL = CANDIDATES["efficiency"]


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
    choices = fishopt.select_estimators(
        _mlp(nn.Softplus), torch.rand(4, 64), "categorical", criterion="efficiency", candidates=ALL
    )
    assert [c.estimator for c in choices[:2]] != ["I2", "I2"]
    assert choices[2].estimator == "I2"
    for choice in choices[:2]:
        assert "I2 loses by its cost alone" in choice.reason
        assert "I2" not in choice.bounds


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
    monkeypatch.setattr(judging, "MAX_COLUMNS", 8)
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


# --- efficiency: the variance over inputs and labels, times the backward passes ---


def _by_definition(model, inputs, family):
    """Of each group: estimator -> mean variance of one input's estimate, and the passes of the exact value."""
    d = derivatives(model, inputs)
    m = moments(d, family)
    root = torch.linalg.cholesky(m.covariance) if family != "categorical" else _root(d.h)
    u = torch.einsum("nab,nap->nbp", root, d.first)
    labels = {"I1": m.v1, "I2": m.v2, "hutchinson": 2 * (m.fisher.square() - u.pow(4).sum(1)), "exact": 0 * m.v1}
    over_inputs = m.fisher.var(0) if len(d.h) > 1 else m.fisher.square().mean(0)
    found = {}
    for group in dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()):
        mine = d.columns(tuple(n for n, _ in model.named_parameters() if n.rpartition(".")[0] == group))
        one_each = (d.first[..., mine] != 0).sum(1).max() <= 1 and d.second[..., mine].abs().max() == 0
        variances = {name: float((over_inputs + v.mean(0))[mine].mean()) for name, v in labels.items()}
        found[group] = variances, 1 if one_each else d.h.shape[1]
    return found


def _root(h):
    p = h.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]


def _group(choice):
    return "" if choice.group == "model" else choice.group


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_efficiency_takes_the_least_variance_times_passes(case, inputs):
    model, x, likelihood = dataclasses.replace(case, inputs=inputs).build()
    expected = _by_definition(model, x, case.family)
    for choice in fishopt.select_estimators(model, x, likelihood, criterion="efficiency", candidates=ALL):
        variances, columns = expected[_group(choice)]
        products = {name: variances[name] for name in ("I1", "hutchinson")}
        products |= {name: variances[name] * columns for name in ("I2", "exact")}
        for name in ("I1", "hutchinson", "exact"):
            assert math.isclose(choice.scores[name], products[name], rel_tol=1e-7, abs_tol=1e-12)
            assert math.isclose(choice.bounds[name], variances[name] - variances["exact"], rel_tol=1e-6, abs_tol=1e-11)
        # Below smooth activations it takes passes for second derivatives besides.
        assert choice.scores["I2"] >= choice.scores["exact"]
        best = min(products.values())
        assert products[choice.estimator] <= best * (1 + 1e-7) + 1e-12
        assert ("of the one input" in choice.reason) == (inputs == 1)
        assert "bound" not in choice.reason


@pytest.mark.parametrize("network", ["sigmoid", "softplus", "layer_norm", "tied"])
def test_second_derivatives_count_where_they_can_win(network):
    """Without the exact value beside it, which is better at every cost."""
    case = Case(network, "categorical", inputs=2)
    model, x, likelihood = case.build()
    x = (1 + 1e-3 * x[0],)  # hardly a variance over inputs
    expected = _by_definition(model, x, case.family)
    computed = 0
    for choice in fishopt.select_estimators(model, x, likelihood, criterion="efficiency", candidates=("I1", "I2")):
        variances, columns = expected[_group(choice)]
        if "I2" in choice.bounds and columns > 1:
            passes = choice.scores["I2"] / variances["I2"]
            assert math.isclose(passes, round(passes), rel_tol=1e-6)
            assert round(passes) > columns
            computed += 1
        assert choice.estimator == min(choice.scores, key=choice.scores.get)
    assert computed


def _wide(outputs):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, outputs)).double(), torch.randn(3, 3).double()


def test_variances_up_to_64_outputs_bounds_above():
    model, x = _wide(64)
    expected = _by_definition(model, (x,), "categorical")
    for choice in fishopt.select_estimators(model, x, "categorical", criterion="efficiency", candidates=ALL):
        variances, columns = expected[choice.group]
        assert "bound" not in choice.reason
        for name, passes in (("I1", 1), ("hutchinson", 1), ("exact", columns)):
            assert math.isclose(choice.scores[name], variances[name] * passes, rel_tol=1e-7)
    model, x = _wide(65)
    hidden, last = fishopt.select_estimators(model, x, "categorical", criterion="efficiency", candidates=ALL)
    assert "bound on the variance" in hidden.reason
    assert math.isclose(hidden.scores["exact"] / hidden.scores["hutchinson"], 65 / (1 + 2 * (1 - 1 / 65)), rel_tol=1e-9)
    assert (hidden.estimator, last.estimator) == ("hutchinson", "I2")


def test_variances_order_what_bounds_get_wrong(monkeypatch):
    """Sigmoid layers of an untrained network: I1 is better than random signs, and its bound is worse."""
    model, x = _mlp(nn.Sigmoid, (8, 6, 5, 10)).double(), torch.randn(8, 8, dtype=torch.float64)
    candidates = ("I1", "I2", "hutchinson")
    found = fishopt.select_estimators(model, x, "categorical", criterion="efficiency", candidates=candidates)
    for choice, (variances, _) in zip(found, _by_definition(model, (x,), "categorical").values(), strict=True):
        assert choice is found[-1] or variances["I1"] < variances["hutchinson"]
        assert choice.estimator == ("I2" if choice is found[-1] else "I1")
    monkeypatch.setattr(judging, "MAX_COLUMNS", 9)
    by_bounds = fishopt.select_estimators(model, x, "categorical", criterion="efficiency", candidates=candidates)
    assert [choice.estimator for choice in by_bounds] == ["hutchinson", "hutchinson", "I2"]


def test_what_loses_by_its_cost_alone_wins_no_tie(monkeypatch):
    """Inputs that are all alike: the exact value varies in nothing, and no more is known of I2 than that it may not."""
    model, x, likelihood = Case("sigmoid", "categorical").build()
    monkeypatch.setattr(judging, "_over_inputs", lambda squares, fisher, count: {k: 0 * v for k, v in fisher.items()})
    found = fishopt.select_estimators(model, x, likelihood, criterion="efficiency", candidates=("I2", "exact"))
    assert found[0].estimator == "exact"
    assert found[0].scores == {"I2": 0, "exact": 0}
    assert "loses by its cost alone" in found[0].reason


def test_ties_go_to_the_first():
    """One output below a ReLU: signs, I2 and the exact value are the same, at the same cost."""
    model, x, likelihood = Case("relu", "bernoulli", outputs=1).build()
    for candidates in itertools.permutations(("I2", "hutchinson", "exact")):
        found = fishopt.select_estimators(model, x, likelihood, criterion="efficiency", candidates=candidates)
        assert {choice.estimator for choice in found} == {candidates[0]}
        assert all(len(set(choice.scores.values())) == 1 for choice in found)


def test_chunks_of_inputs_are_one_batch(monkeypatch):
    model, x, likelihood = Case("sigmoid", "categorical", inputs=5).build()
    whole = fishopt.select_estimators(model, x, likelihood, criterion="efficiency", candidates=ALL)
    monkeypatch.setattr(batch, "MAX_ACTIVATIONS", 1)
    parts = fishopt.select_estimators(model, x, likelihood, criterion="efficiency", candidates=ALL)
    for a, b in zip(whole, parts, strict=True):
        assert a.estimator == b.estimator
        assert a.scores == pytest.approx(b.scores, rel=1e-9)


@pytest.mark.parametrize("kind", [fishopt.FisherAdam, fishopt.DiagonalNGD])
def test_optimizers_take_the_exact_value_where_inputs_are_alike(kind):
    """Label noise is then all the variance there is, and ten columns are worth their cost."""
    torch.manual_seed(0)
    model, loss_fn = _mlp(nn.Sigmoid, (8, 6, 10)), nn.CrossEntropyLoss()
    optimizer = kind(model, loss_fn)
    x, y = 1 + 1e-3 * torch.randn(16, 8), torch.randint(10, (16,))
    loss_fn(model(x), y).backward()
    optimizer.step()
    assert [row.estimator for row in optimizer.report().rows] == ["exact", "I2"]
    assert "variance over inputs and labels x backward passes: exact" in optimizer.report().rows[0].reason


def test_the_exact_value_is_passed_over_where_columns_are_too_many(monkeypatch):
    monkeypatch.setattr(judging, "COLUMN_LIMIT", 70)
    model, x = _wide(71)
    hidden, last = fishopt.select_estimators(model, x, "categorical", criterion="efficiency", candidates=ALL)
    assert hidden.scores["exact"] == hidden.scores["I2"] == math.inf
    assert "exact is passed over, a column for each of 71 outputs" in hidden.reason
    assert last.estimator == "I2"
