"""The report's statistics, on made-up runs: medians, times to target, profiles, learning rates, which runs count."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import protocol
from benchmarks.protocol import Target
from benchmarks.report.reaching import needed, reach, speedup
from benchmarks.report.statistics import (
    Estimate,
    Profile,
    combined,
    drawn,
    good_rates,
    inverse,
    width,
)
from benchmarks.report.study import Study
from tests.benchmark_report_setup import made, several

GOAL = Target(0.1)

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
    assert needed(hits, GOAL, "steps").value == 150
    assert needed([made(hit=None, seed=4), made(hit=None, seed=5), *hits[:1]], GOAL, "steps").value == math.inf


def test_ratios_are_paired_by_seed():
    ours = [made("FisherAdam", seed=s, pace=p) for s, p in ((1, 1.0), (2, 10.0), (3, 100.0))]
    theirs = [made(seed=s, pace=p) for s, p in ((3, 200.0), (1, 2.0), (2, 20.0), (4, 1e6))]
    found = speedup(ours, theirs, GOAL, "seconds")
    assert (found.value, found.low, found.high, found.seeds) == (2.0, 2.0, 2.0, 3)


def test_misses_in_ratios():
    hit, miss = several("FisherAdam", hit=2), several("FisherAdam", hit=None)
    assert speedup(hit, several(hit=None), GOAL, "steps").value == 5  # at least: all of its budget counts
    assert speedup(miss, several(), GOAL, "steps").value == 0
    assert speedup(miss, several(hit=None), GOAL, "steps") is None
    assert speedup(hit, [], GOAL, "steps") is None
    both = [made(seed=1), made(seed=2), made(seed=3, hit=None)]
    assert speedup([*hit[:2], miss[2]], both, GOAL, "steps").value == 2.5  # the third says nothing
    # Where most seeds missed, the others do not make up for it.
    assert speedup([hit[0], *miss[1:]], [made(seed=1), made(seed=2), made(seed=3, hit=None)], GOAL, "steps").value == 0


def test_most_seeds_missed_is_not_certain_to_be_so():
    ours = [made("FisherAdam", seed=i, hit=2 if i < 3 else None) for i in range(1, 6)]
    found = speedup(ours, several(seeds=range(1, 6)), GOAL, "steps")
    assert (found.value, found.low, found.high) == (0, 0, 2.5)


def test_the_target_varies_with_the_seeds_that_set_it():
    """AdamW reaches it late on the seed with the low end: a target of that seed twice is reached late by all."""
    reference = [made(seed=1, metric=0.3), made(seed=2, metric=0.2), made(seed=3, metric=0.1, hit=8)]
    target = protocol.target(reference, "digits_mlp")
    assert target.metric == 0.2
    assert [target.of(seeds) for seeds in ([1, 1, 2], [3, 3, 1])] == [0.3, 0.1]
    ours = several("FisherAdam", metric=0.15)
    found = needed(ours, target, "steps")
    assert (found.value, found.high) == (250, math.inf)
    assert needed(ours, GOAL, "steps").low == math.inf


def test_ratios_vary_with_the_target_and_neither_arriving_is_no_difference():
    reference = [made(seed=1, metric=0.3), made(seed=2, metric=0.2), made(seed=3, metric=0.1, hit=8)]
    target = protocol.target(reference, "digits_mlp")
    ours = several("FisherAdam", metric=0.15, hit=2)
    found = speedup(ours, reference, target, "steps")
    assert (found.value, found.low, found.high) == (4.0, 0.0, 4.0)
    early = several("FisherAdam", metric=0.25, hit=2)
    late = several("AdamW", metric=0.25, hit=4)
    found = speedup(early, late, target, "steps")
    assert found is None  # at the target itself both miss
    both = speedup(several("FisherAdam", metric=0.2, hit=2), several("SGD", metric=0.2, hit=4), target, "steps")
    assert (both.low, both.value, both.high) == (1.0, 2.0, 2.0)


def test_of_other_seeds_the_target_is_as_it_is():
    reference = [made(seed=i, metric=m) for i, m in ((1, 0.3), (2, 0.2), (3, 0.1))]
    target = protocol.target(reference, "digits_mlp")
    some = [made("FisherAdam", seed=i, metric=0.25) for i in (1, 4)]
    assert needed(some, target, "steps").value == math.inf  # 0.2, not the 0.3 of seed 1
    others = several("SGD", metric=0.1, seeds=(1, 4))
    assert speedup(some, others, target, "steps").value == 0.0


def test_a_reference_that_diverged_sets_no_target():
    runs = [made(seed=1, diverged=True), made(seed=2, diverged=True), made(seed=3)]
    assert protocol.target(runs, "digits_mlp").metric == math.inf


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
