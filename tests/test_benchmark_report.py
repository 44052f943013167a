"""The benchmarks' report, on runs made up so that every number is known."""

import base64
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.methods import METHODS, Method
from benchmarks.problems import PROBLEMS
from benchmarks.report import make
from benchmarks.report.ablations import Ablation
from benchmarks.report.checks import Check, all_of, best_of
from benchmarks.report.figures import _of_one_length
from benchmarks.report.fullbatch import Comparison, best_rate
from benchmarks.report.panels import stretches
from benchmarks.report.statistics import (
    Estimate,
    Profile,
    combined,
    drawn,
    good_rates,
    inverse,
    needed,
    reach,
    speedup,
    width,
)
from benchmarks.report.study import Study
from benchmarks.report.summaries import paces, speedups
from benchmarks.report.tables import Strong, Table, counted, number, spread
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
from benchmarks.runs import Curve, Run, Spec

POINTS = 10
ENVIRONMENT = {"torch": "2.13.0", "python": "3.11", "fishopt": "0.1.0", "threads": 1, "machine": "x86_64"}


def made(method="AdamW", *, problem="digits_mlp", seed=1, track="final", hit=5, metric=None, pace=1.0, **more):
    """A run that goes from 1 to `metric` at its evaluation number ``hit`` (from 1), and stays there; None never."""
    steps = PROBLEMS[problem].steps
    metric = (PROBLEMS[problem].goal or 0.1) if metric is None else metric
    step = [steps * (i + 1) // POINTS for i in range(POINTS)]
    values = [metric if hit is not None and i + 1 >= hit else 1.0 for i in range(POINTS)]
    curve = Curve(step, [more.get("gradients", 1) * s for s in step], [pace * s for s in step], values, values, values)
    final = {"valid_metric": values[-1], "test_loss": 1.0, "test_metric": more.get("test", 0.2)}
    spec = Spec(track, problem, method, more.get("config", {}), seed, steps)
    return Run(spec, curve, final, more.get("diverged", False), 0.1, more.get("choices", []), ENVIRONMENT)


def several(*args, seeds=(1, 2, 3), **options):
    return [made(*args, seed=seed, **options) for seed in seeds]


def verdicts(runs, target):
    return {check.method: check for check in checks(Study.of(runs)) if check.target == target}


# --- medians and intervals ---


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 2.0, 4.0, 3.0], [1.0, math.inf, 2.0], [math.inf] * 3])
def test_intervals_hold_the_median_and_stay_within_the_seeds(values):
    estimate = Estimate.median(values, "a")
    assert estimate.value == np.median(values)
    assert min(values) <= estimate.low <= estimate.value <= estimate.high <= max(values)
    assert estimate.seeds == len(values)


def test_five_seeds_have_their_range_for_an_interval_and_many_a_narrower_one():
    five = Estimate.median([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (five.low, five.high) == (1.0, 5.0)  # the least is the median of 6% of the draws
    many = Estimate.median(list(range(101)))
    # The median of n uniform numbers has the standard deviation 1 / (2 sqrt(n)); the draws' quantiles are 1.96 of them.
    assert many.high - many.low == pytest.approx(2 * 1.96 * 101 / (2 * math.sqrt(101)), rel=0.15)


def test_the_same_seeds_are_drawn_for_methods_and_others_for_problems():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    np.testing.assert_array_equal(Estimate.median(values, "a").draws, Estimate.median(values, "a").draws)
    assert (Estimate.median(values, "a").draws != Estimate.median(values, "b").draws).any()


def test_functions_of_estimates_are_taken_of_values_and_of_draws():
    one, two = Estimate.median([1.0, 2.0, 4.0], "a"), Estimate.median([8.0, 8.0, 8.0], "b")
    least = combined([one, two], lambda x: x.min(0))
    assert (least.value, least.low, least.high) == (2.0, 1.0, 4.0)
    assert inverse(Estimate.median([0.0])).value == math.inf


# --- time to target ---


def test_a_run_reaches_a_target_at_its_first_evaluation_there_or_never():
    run = made(hit=3, pace=0.5, gradients=2)
    assert reach(run, 0.1).steps == 150
    assert reach(run, 0.1).gradients == 300
    assert reach(run, 0.1).seconds == 75
    assert reach(run, 0.05).is_miss


def test_a_median_is_infinite_once_most_seeds_miss():
    hits = [made(hit=3, seed=1), made(hit=3, seed=2), made(hit=None, seed=3)]
    assert needed(hits, 0.1, "steps").value == 150
    assert needed([made(hit=None, seed=4), made(hit=None, seed=5), *hits[:1]], 0.1, "steps").value == math.inf


def test_ratios_are_paired_by_seed():
    ours = [made("FisherAdam", seed=s, pace=p) for s, p in ((1, 1.0), (2, 10.0), (3, 100.0))]
    theirs = [made(seed=s, pace=p) for s, p in ((3, 200.0), (1, 2.0), (2, 20.0), (4, 1e6))]
    found = speedup(ours, theirs, 0.1, "seconds")
    assert (found.value, found.low, found.high, found.seeds) == (2.0, 2.0, 2.0, 3)


def test_misses_in_ratios():
    hit, miss = several("FisherAdam", hit=2), several("FisherAdam", hit=None)
    assert speedup(hit, several(hit=None), 0.1, "steps").value == 5  # at least: all of its budget counts
    assert speedup(miss, several(), 0.1, "steps").value == 0
    assert speedup(miss, several(hit=None), 0.1, "steps") is None
    assert speedup(hit, [], 0.1, "steps") is None
    both = [made(seed=1), made(seed=2), made(seed=3, hit=None)]
    assert speedup([*hit[:2], miss[2]], both, 0.1, "steps").seeds == 2  # the third says nothing
    # Where most seeds missed, the others do not make up for it.
    assert speedup([hit[0], *miss[1:]], [made(seed=1), made(seed=2), made(seed=3, hit=None)], 0.1, "steps").value == 0


# --- performance profiles ---


def test_areas_ranks_and_misses_of_a_profile():
    inf = math.inf
    needs = {"A": [1.0, 4.0], "B": [2.0, 2.0], "C": [inf, inf], "D": [1.0, 4.0]}
    profile = Profile.of({m: [Estimate.median([v]) for v in values] for m, values in needs.items()})
    areas = {method: estimate.value for method, estimate in profile.areas.items()}
    # A: best once, and 2 times the best once, of which (4 - 2) / (4 - 1) is left.
    assert areas == pytest.approx({"A": (1 + 2 / 3) / 2, "B": (2 / 3 + 1) / 2, "C": 0.0, "D": (1 + 2 / 3) / 2})
    assert [profile.ranks[m].value for m in "ABCD"] == [1, 1, 4, 1]  # ties share a place
    assert profile.within("A", 1) == 0.5
    assert profile.within("A", 2) == 1.0
    assert profile.within("C", 1e9) == 0.0


def test_a_problem_that_nobody_solves_counts_against_all():
    profile = Profile.of({"A": [Estimate.median([1.0]), Estimate.median([math.inf])]})
    assert profile.areas["A"].value == 0.5


def test_profiles_leave_out_who_did_not_run_everywhere():
    runs = [*several(), *several(problem="mnist_cnn"), *several("SGD"), *several("NAdam", problem="mnist_cnn")]
    profile, left_out = Study.of(runs).profile("final", "steps")
    assert list(profile.areas) == ["AdamW"]
    assert left_out == ["NAdam", "SGD"]


# --- learning rates ---


def test_the_range_of_good_rates_reaches_to_where_the_line_crosses_one_percent():
    losses = {1e-3: 2.0, 1e-2: 1.005, 1e-1: 1.0, 1.0: 1.02, 10.0: 1.0001}
    found = good_rates(losses, is_classification=False)
    # Down from 1e-2 by (1.01 - 1.005) / (2 - 1.005) of a decade; up from 1e-1 by half of one, not to the last.
    assert math.log10(found.low) == pytest.approx(-2 - 0.005 / 0.995)
    assert math.log10(found.high) == pytest.approx(-0.5)
    assert not found.is_open


def test_one_percent_of_an_error_rate_is_of_the_accuracy_and_of_a_negative_loss_of_its_size():
    errors = {1e-3: 0.1 + 0.0089, 1e-2: 0.1, 1e-1: 0.1 + 0.0091}
    found = good_rates(errors, is_classification=True)
    assert found.low == 1e-3
    assert found.is_open
    assert 1e-2 < found.high < 1e-1
    assert good_rates({1e-3: -10.0, 1e-2: -9.91}, is_classification=False).high == 1e-2


def test_rates_next_to_a_run_that_diverged_and_rates_that_all_did():
    found = good_rates({1e-3: math.inf, 1e-2: 1.0, 1e-1: math.inf}, is_classification=False)
    assert found.decades == 0
    assert good_rates({1e-3: math.inf}, is_classification=False) is None


def test_widths_are_of_medians_and_vary_with_the_seeds():
    metrics = {1e-3: [2.0, 2.0, 2.0], 1e-2: [1.0, 1.0, 1.0], 1e-1: [1.0, 2.0, 1.0], 1.0: [math.inf] * 3}
    found = width(metrics, False, "a")
    step = 0.01  # down from 1e-2, of the way from 1 to 2
    assert found.value == pytest.approx(1 + step)
    # Where the second seed is drawn twice, the rate of 1e-1 is bad, too.
    assert set(np.round(found.draws, 9)) == {round(1 + step, 9), round(2 * step, 9)}
    rows = drawn(3, "a")
    np.testing.assert_array_equal(found.draws < 1, (rows == 1).sum(1) >= 2)


def test_rates_that_some_seeds_lack_do_not_count():
    runs = [made(track="sensitivity", config={"lr": lr}, seed=seed) for lr in (0.1, 1.0) for seed in (1, 2)]
    study = Study.of([*runs, made(track="sensitivity", config={"lr": 10.0})])
    assert list(study.rates("digits_mlp", "AdamW")) == [0.1, 1.0]


# --- which runs count ---


def test_a_study_takes_each_run_once_and_leaves_out_what_is_not_of_today():
    stale = made(config={"lr": 2.0}, seed=7)
    short = replace(made(track="defaults"), spec=replace(made(track="defaults").spec, steps=3))
    gone = replace(made(), spec=replace(made().spec, problem="a problem that is gone"))
    tune = made(track="tune", seed=0, config={"lr": 1.0})
    now = several(config={"lr": 1.0})
    study = Study.of([*now, *now, stale, short, gone, tune])
    assert [run.spec.seed for run in study.get("final", "digits_mlp", "AdamW")] == [1, 2, 3]
    assert not study.problems("defaults")
    assert study.left_out == 3


# --- the targets ---


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
    near = [*runs, *tests_of("FisherAdam", [0.29, 0.35, 0.4]), *tests_of("DiagonalNGD", [0.31, 0.35, 0.4])]
    found = verdicts(near, METRIC)
    assert found["FisherAdam"].verdict == "met"  # 0.29 is within 0.1 to 0.3
    assert found["DiagonalNGD"].verdict == "missed"
    assert "digits_mlp" in found["DiagonalNGD"].remark


def test_problems_with_a_goal_count_neither_for_the_final_metric_nor_for_learning_rates():
    """Training ends there: what it ends with is by how much a method overshot."""
    runs = [made(m, problem="fit_curve", test=x) for m, x in (("AdamW", 0.1), ("FisherAdam", 0.9))]
    assert "FisherAdam" not in verdicts(runs, METRIC)
    runs = [run for m, good in (("AdamW", 3), ("FisherAdam", 5)) for run in over_rates(m, "fit_curve", good)]
    assert "FisherAdam" not in verdicts(runs, WIDTH)


def test_the_time_of_a_step_is_over_adamws_of_the_same_seed():
    runs = [made(seed=i, pace=x) for i, x in enumerate([1.0, 2.0, 4.0])]
    runs += [made("FisherAdam", seed=i, pace=x) for i, x in enumerate([3.0, 4.0, 4.0, 100.0])]
    study = Study.of(runs)
    assert study.pace("final", "digits_mlp", "FisherAdam").value == pytest.approx(2.0)
    assert study.pace("final", "mnist_relu", "FisherAdam") is None
    assert paces(study, "final").rows == [["digits_mlp", "2 [1, 3]"]]


def test_curves_that_end_early_go_on_as_they_ended():
    assert _of_one_length([[1.0], [3.0, 2.0]]).tolist() == [[1.0, 1.0], [3.0, 2.0]]


def over_rates(method, problem, good):
    """Nine rates of which the middle ``good`` ones are as good as the best, and the others have diverged."""
    runs = []
    for i in range(9):
        config, bad = {"lr": 10.0 ** (i / 2 - 2)}, abs(i - 4) > good // 2
        runs.append(made(method, problem=problem, track="sensitivity", config=config, diverged=bad))
    return runs


def test_learning_rate_ranges_twice_as_wide_on_five_problems():
    problems = ["digits_mlp", "mnist_cnn", "mnist_relu", "mnist_sigmoid", "gaussian_regression"]
    runs = [run for p in problems for run in (*over_rates("AdamW", p, 3), *over_rates("FisherAdam", p, 5))]
    found = verdicts(runs, WIDTH)["FisherAdam"]
    assert (found.value.value, found.verdict) == (5, "met")  # 2 decades to 1
    assert verdicts(runs[: 4 * 18], WIDTH)["FisherAdam"].verdict == "incomplete"
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
        runs += several(problem=problem, track="sensitivity", config={"lr": lr}, hit=its)
    runs += several("L-BFGS", problem=problem, track="defaults", hit=5, gradients=2)
    return runs + several(AUTO, problem=problem, track="defaults", hit=hit, pace=pace)


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
    assert (found.value.value, found.verdict, found.remark) == (1, "met", " of 3")
    assert verdicts(runs, NO_MISS)["FisherAdam"].verdict == "met"
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
    found = [Check("a", "more", two, 3.0, at_least=False), Check("a", "less", one, 3.0, at_least=False)]
    assert [row[1] for row in best_of(found, "").rows] == ["less"]


# --- ablations and estimators ---


def test_variants_are_named_by_what_differs():
    runs = []
    for every, metric in ((1, 0.3), (10, 0.2), (50, 0.4)):
        config = {"refresh_every": every, "damping": 0.1}
        runs += several("FisherAdam", track="ablate-refresh", config=config, metric=metric)
    found = Ablation.of(Study.of(runs), "ablate-refresh")
    assert list(found.runs) == ["refresh_every=1", "refresh_every=10", "refresh_every=50"]
    assert found.common == "FisherAdam, damping=0.1"
    assert found.targets == {"digits_mlp": 0.2}
    metrics, steps = found.tables()
    assert [isinstance(row[1], Strong) for row in metrics.rows] == [False, True, False]
    assert steps.rows[1][1] == "250"
    assert steps.rows[0][1] == "miss (0 of 3)"


def test_variants_of_several_methods_come_method_by_method():
    given = [("FisherAdam", {"clip": 1.0}), ("DiagonalNGD", {"damping": 10.0}), ("DiagonalNGD", {"damping": 9.0})]
    runs = [run for method, config in given for run in several(method, track="ablate-x", config=config)]
    names = list(Ablation.of(Study.of(runs), "ablate-x").runs)
    assert names == ["DiagonalNGD, damping=9", "DiagonalNGD, damping=10", "FisherAdam, clip=1"]


def test_an_ablation_takes_tuned_adamw_for_its_target():
    runs = [*several(metric=0.5), *several("FisherAdam", track="ablate-x", config={"eps": 1.0}, metric=0.1)]
    assert Ablation.of(Study.of(runs), "ablate-x").targets == {"digits_mlp": 0.5}


def test_estimators_over_time():
    choices = [[0, {"0": "I1", "2": "I2"}], [9, {"0": "I1", "2": "exact"}], [19, {"0": "exact", "2": "exact"}]]
    run = made("FisherAdam", choices=choices)
    assert stretches(run, "0") == [(1, 20, "I1"), (20, 501, "exact")]
    assert stretches(run, "2") == [(1, 10, "I2"), (10, 501, "exact")]


# --- tables and the page ---


def test_how_numbers_look():
    assert [number(v) for v in (0.0, 0.12345, 1234.5, 1e-5, math.inf)] == ["0", "0.123", "1234", "1.00e-05", "∞"]
    assert spread(Estimate.median([1.0, 2.0, 3.0])) == "2 [1, 3]"
    assert spread(Estimate.median([2.0])) == "2"
    assert [counted(n) for n in ([1, 1], [3], [1, 5], [])] == ["one seed", "3 seeds", "1 to 5 seeds", "no seeds"]


def test_one_table_in_three_forms():
    table = Table("T", ["a", "b|c"], [["x", Strong("[y]")]], "note")
    assert table.markdown() == "### T\n\n| a | b\\|c |\n| --- | --- |\n| x | **[y]** |\n\nnote\n"
    assert list(table.rich().columns[1].cells) == ["[bold]\\[y][/bold]"]


def test_misses_show_how_many_seeds_hit():
    runs = [*several(), made("SGD", seed=1), *several("SGD", hit=None, seeds=(2, 3))]
    assert speedups(Study.of(runs), "final", "seconds").rows == [["digits_mlp", "miss (1 of 3)"]]


def everything():
    runs = []
    for track in ("final", "defaults"):
        for method, hit, choices in (("AdamW", 5, []), ("FisherAdam", 3, [[0, {"0": "I1"}]]), ("SGD", None, [])):
            runs += several(method, track=track, hit=hit, choices=choices)
    for eps in (1e-8, 1e-4):
        runs += several("FisherAdam", track="ablate-eps", config={"eps": eps})
    return runs + over_rates("AdamW", "digits_mlp", 3) + over_rates("FisherAdam", "digits_mlp", 5)


def test_the_page_holds_all_pictures_and_needs_nothing_else(tmp_path):
    extra = tmp_path / "figure.json"
    claim = {"claim": "1 < 2", "expected": "<", "got": "1", "holds": False}
    extra.write_text(json.dumps({"claims": [claim]}))
    page = make(everything(), tmp_path / "report", [extra])
    text = page.read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    drawn = {path.read_bytes() for path in page.parent.glob("*.png")}
    assert {base64.b64decode(picture) for picture in pictures} == drawn
    assert len(drawn) == 8
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert "1 &lt; 2" in text
    assert "0 of 1 hold" in text
    assert "3 seeds" in text
    tables = (page.parent / "tables.md").read_text()
    assert tables.count("### ") == text.count("<caption>")


def test_a_report_of_nothing_is_a_page_of_open_targets(tmp_path):
    text = make([], tmp_path).read_text()
    assert text.count("n/a") == 2 * len(TARGETS)
    assert not list(tmp_path.glob("*.png"))
