"""The report's targets, on made-up runs: when each one is met, missed, incomplete or not available."""

import math
from dataclasses import replace

import pytest

from benchmarks.methods import METHODS, Method
from benchmarks.problems import PROBLEMS
from benchmarks.report.checks import Check, Over, all_of, best_of
from benchmarks.report.fullbatch import Comparison, best_rate
from benchmarks.report.reaching import reach
from benchmarks.report.statistics import Estimate
from benchmarks.report.study import Study
from benchmarks.report.targets import (
    AUTO_GRADIENTS,
    AUTO_STEPS,
    AUTO_TIME,
    FASTER,
    FIRST,
    METRIC,
    NO_MISS,
    SLOWER,
    STEPS,
    TARGETS,
    WIDTH,
    checks,
)
from tests.benchmark_report_setup import made, over_rates, several


def verdicts(runs, target):
    return {check.method: check for check in checks(Study.of(runs)) if check.target == target}


def test_without_runs_every_target_is_not_available():
    found = checks(Study.of([]))
    assert [check.target for check in found] == list(TARGETS)
    assert {check.verdict for check in found} == {"n/a"}


def timed(paces, hit=5):
    """AdamW at pace 1, FisherAdam at others, by problem."""
    runs = []
    for problem, pace in paces.items():
        runs += several(problem=problem, hit=5)
        runs += several("FisherAdam", problem=problem, pace=pace, hit=hit)
    return runs


def test_faster_on_half_of_the_problems_and_never_much_slower():
    runs = timed({"digits_mlp": 0.5, "mnist_cnn": 1.0})
    assert verdicts(runs, FASTER)["FisherAdam"].verdict == "met"
    assert verdicts(runs, SLOWER)["FisherAdam"].verdict == "met"
    runs = timed({"digits_mlp": 0.5, "mnist_cnn": 1.2, "mnist_relu": 1.0})
    assert verdicts(runs, FASTER)["FisherAdam"].verdict == "missed"
    slow = verdicts(runs, SLOWER)["FisherAdam"]
    assert slow.verdict == "missed"
    assert slow.value.value == pytest.approx(1 / 1.2)
    assert "mnist_cnn" in slow.remark


def test_a_miss_is_slower():
    found = verdicts(timed({"digits_mlp": 0.5}, hit=None), SLOWER)["FisherAdam"]
    assert found.value.value == 0
    assert found.verdict == "missed"


def test_problems_that_have_not_run_leave_a_target_open():
    runs = [*timed({"digits_mlp": 1.0}), *several(problem="mnist_cnn"), *several(problem="mnist_relu")]
    assert verdicts(runs, SLOWER)["FisherAdam"].verdict == "incomplete"
    assert verdicts(runs, FASTER)["FisherAdam"].verdict == "incomplete"


@pytest.mark.parametrize(("hit", "verdict"), [(4, "met"), (5, "met"), (6, "missed")])
def test_steps_against_schedule_free(hit, verdict):
    runs = [*several(), *several("Schedule-Free AdamW", hit=5), *several("FisherAdam", hit=hit)]
    found = verdicts(runs, STEPS)["FisherAdam"]
    assert found.verdict == verdict
    assert found.value.value == pytest.approx(hit / 5)


def test_steps_are_judged_where_they_are_most():
    runs = []
    for problem, hit in (("digits_mlp", 6), ("mnist_cnn", 4)):
        runs += several("Schedule-Free AdamW", problem=problem) + several("FisherAdam", problem=problem, hit=hit)
    found = verdicts([*runs, *several(), *several(problem="mnist_cnn")], STEPS)["FisherAdam"]
    assert (found.value.value, found.remark) == (pytest.approx(6 / 5), " on digits_mlp")


def test_the_final_metric_is_compared_with_others_that_keep_no_matrices():
    def tests_of(method, values):
        return [made(method, seed=i, test=value) for i, value in enumerate(values)]

    runs = [*tests_of("AdamW", [0.1, 0.2, 0.3]), *tests_of("Muon", [0.01] * 3), *tests_of("SGD", [0.4] * 3)]
    near = [*runs, *tests_of("FisherAdam", [0.09, 0.25, 0.35]), *tests_of("DiagonalNGD", [0.11, 0.21, 0.31])]
    found = verdicts(near, METRIC)
    assert found["FisherAdam"].verdict == "met"  # better on a seed
    assert found["DiagonalNGD"].verdict == "missed"  # worse on each, if by less
    assert "digits_mlp" in found["DiagonalNGD"].remark


def test_only_seeds_that_both_have_are_compared():
    """Paired, or a method that is worse on each seed would be within noise if it has other seeds."""
    theirs = [made(seed=i, test=i / 10) for i in range(1, 6)]
    ours = [made("FisherAdam", seed=i, test=i / 10 + 0.01) for i in (3, 4, 5)]
    assert verdicts([*theirs, *ours], METRIC)["FisherAdam"].verdict == "missed"
    tie = [made("FisherAdam", seed=i, test=i / 10) for i in (3, 4, 5)]
    assert verdicts([*theirs, *tie], METRIC)["FisherAdam"].verdict == "met"
    for bad in (math.nan, math.inf):
        worse = [made("FisherAdam", seed=i, test=bad) for i in (3, 4, 5)]
        assert verdicts([*theirs, *worse], METRIC)["FisherAdam"].verdict == "missed"


def test_nothing_to_go_could_turn_it():
    some = Check("a", "x", Estimate.median([1.0, 1.0]), 4.0, tried=2, of=4, needs_all=False)
    assert some.verdict == "missed"  # 1 and 2 to go are not 4
    assert replace(some, bar=3.0).verdict == "incomplete"


def test_where_neither_arrives_nothing_is_to_go():
    found = Over({"a": Estimate.median([1.0, 1.0]), "b": None}, 2).worst(Check("t", "m", bar=0.9))
    assert (found.verdict, found.remark) == ("met", " on a; neither arrives on b")


def test_problems_with_a_goal_count_neither_for_the_final_metric_nor_for_learning_rates():
    """Training ends there: what it ends with is by how much a method overshot."""
    runs = [made(m, problem="fit_curve", test=x) for m, x in (("AdamW", 0.1), ("FisherAdam", 0.9))]
    assert "FisherAdam" not in verdicts(runs, METRIC)
    runs = [run for m, good in (("AdamW", 3), ("FisherAdam", 5)) for run in over_rates(m, "fit_curve", good)]
    assert "FisherAdam" not in verdicts(runs, WIDTH)


def test_learning_rate_ranges_twice_as_wide_on_five_problems():
    problems = ["digits_mlp", "mnist_cnn", "mnist_relu", "mnist_sigmoid", "gaussian_regression"]
    runs = [run for p in problems for run in (*over_rates("AdamW", p, 3), *over_rates("FisherAdam", p, 5))]
    found = verdicts(runs, WIDTH)["FisherAdam"]
    assert (found.value.value, found.verdict) == (5, "met, within noise")  # 2 decades to 1, of one seed
    assert verdicts(runs[: 4 * 18], WIDTH)["FisherAdam"].verdict == "incomplete"
    counts = [run for m, good in (("AdamW", 3), ("FisherAdam", 5)) for run in over_rates(m, "poisson_regression", good)]
    assert verdicts(runs + counts, WIDTH)["FisherAdam"].value.value == 5  # a loss without a zero has no percent
    narrow = [run for p in problems for run in (*over_rates("AdamW", p, 3), *over_rates("FisherAdam", p, 3))]
    assert verdicts(narrow, WIDTH)["FisherAdam"].verdict == "missed"


AUTO = "DiagonalNGD auto"


@pytest.fixture
def with_auto(monkeypatch):
    monkeypatch.setitem(METHODS, AUTO, Method(AUTO, METHODS["DiagonalNGD"].build, None, package="fishopt"))


def full_batch(problem, *, hit, pace=1.0):
    runs = []
    for i, its in enumerate([None, None, 9, 8, 6, 10, None, None, None]):
        lr = 10.0 ** (i - 4)
        runs += several(problem=problem, track="goals", config={"lr": lr}, hit=its)
    runs += several("L-BFGS", problem=problem, track="goals", hit=5, gradients=2)
    return runs + several(AUTO, problem=problem, track="goals", hit=hit, pace=pace)


@pytest.mark.usefixtures("with_auto")
def test_full_batches_against_the_best_of_nine_rates_and_lbfgs():
    problems = ["fit_curve", "fit_surface", "pinn_poisson"]
    runs = [run for p in problems for run in full_batch(p, hit=2, pace=2.0)]
    study = Study.of(runs)
    rate, best = best_rate(study, "fit_curve")
    assert rate == 1.0
    assert reach(best[0], 1e-5).steps == 0.6 * PROBLEMS["fit_curve"].steps
    found = {check.target: check for check in checks(study) if check.method == AUTO}
    assert found[AUTO_STEPS].value.value == pytest.approx(2 / 6)
    assert found[AUTO_STEPS].verdict == "missed"  # 0.333, not 0.33
    assert found[AUTO_TIME].value.value == pytest.approx(4 / 6)
    assert found[AUTO_TIME].verdict == "met"
    assert found[AUTO_GRADIENTS].value.value == pytest.approx(2 / 10)
    assert found[AUTO_GRADIENTS].verdict == "met"
    assert set(Comparison.of(study, "fit_curve", AUTO).needs) == {AUTO, "AdamW, lr 1", "L-BFGS"}


@pytest.mark.usefixtures("with_auto")
def test_a_full_batch_goal_that_is_missed():
    found = verdicts(full_batch("fit_curve", hit=None), AUTO_STEPS)[AUTO]
    assert found.value.value == math.inf
    assert found.verdict == "missed"
    assert verdicts(full_batch("fit_curve", hit=1), AUTO_STEPS)[AUTO].verdict == "incomplete"  # two problems to go


def test_defaults_without_a_miss_and_first():
    tuned = [*several(), *several(problem="mnist_cnn")]
    runs = list(tuned)
    for problem in ("digits_mlp", "mnist_cnn"):
        for method, hit in (("AdamW", 5), ("FisherAdam", 3), ("SGD", None)):
            runs += several(method, problem=problem, track="defaults", hit=hit)
    found = verdicts(runs, FIRST)["FisherAdam"]
    assert (found.value.value, found.verdict, found.remark) == (1, "met", " of the 3 that ran on every problem")
    assert verdicts(runs, NO_MISS)["FisherAdam"].verdict == "met"
    once = [*runs, *several("Muon", track="defaults", hit=None)]
    assert verdicts(once, FIRST)["FisherAdam"].verdict == "incomplete"  # Muon may be better where it has not run
    missing = [*tuned, *several("FisherAdam", track="defaults", hit=None)]
    found = verdicts(missing, NO_MISS)["FisherAdam"]
    assert (found.value.value, found.verdict) == (1, "missed")
    assert "digits_mlp" in found.remark


def test_the_best_method_of_a_target_comes_first():
    one, two = Estimate.median([1.0]), Estimate.median([2.0])
    found = [Check("a", "worst", two, 3.0), Check("a", "better", one, 1.0), Check("a", "best", two, 1.0), Check("b")]
    assert [row[1] for row in all_of(found, "").rows] == ["best", "better", "worst", "-"]
    assert [row[1] for row in best_of(found, "").rows] == ["best", "-"]
    assert best_of(found, "").rows[0][3] == "one seed"
    some = Check("a", "elsewhere", Estimate.median([9.0, 9.0]), 3.0, tried=1, of=2, needs_all=False)
    first, last = replace(some, needs_all=True), replace(some, value=Estimate.median([2.0, 2.0]), needs_all=True)
    assert [row[4] for row in all_of([last, first], "").rows] == ["incomplete", "missed"]
    assert best_of([replace(some, bar=10.0), Check("a", "worst", two, 3.0)], "").rows[0][1] == "worst"
    assert replace(some, tried=2).verdict == "met"
    assert replace(some, value=Estimate.median([2.0, 4.0, 5.0])).verdict == "met, within noise"
    found = [Check("a", "more", two, 3.0, at_least=False), Check("a", "less", one, 3.0, at_least=False)]
    assert [row[1] for row in best_of(found, "").rows] == ["less"]
