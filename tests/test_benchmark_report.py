"""The benchmarks' report, on made-up runs: ablations, estimators over time, tables, and the page that holds them."""

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import benchmarks
from benchmarks.cli import RESULTS
from benchmarks.protocol import Target
from benchmarks.report import efficiency, fill, make
from benchmarks.report.ablations import Ablation
from benchmarks.report.figures import on_one_axis
from benchmarks.report.panels import stretches
from benchmarks.report.readme import filled
from benchmarks.report.statistics import Estimate
from benchmarks.report.study import Study
from benchmarks.report.summaries import metrics, paces, speedups
from benchmarks.report.tables import Strong, Table, counted, number, spread
from benchmarks.report.targets import TARGETS
from benchmarks.runs import Store
from tests.benchmark_report_setup import made, over_rates, several

# --- ablations and estimators ---


def test_variants_are_named_by_what_differs():
    runs = []
    for every, metric in ((1, 0.3), (10, 0.2), (50, 0.4)):
        config = {"refresh_every": every, "damping": 0.1}
        runs += several("FisherAdam", track="ablate-refresh", config=config, metric=metric)
    found = Ablation.of(Study.of(runs), "ablate-refresh")
    assert list(found.runs) == ["refresh_every=1", "refresh_every=10", "refresh_every=50"]
    assert found.common == "FisherAdam, damping=0.1"
    assert found.targets == {"digits_mlp": Target(0.2)}
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
    assert Ablation.of(Study.of(runs), "ablate-x").targets["digits_mlp"].metric == 0.5


def test_estimators_over_time():
    choices = [[0, {"0": "I1", "2": "I2"}], [9, {"0": "I1", "2": "exact"}], [19, {"0": "exact", "2": "exact"}]]
    run = made("FisherAdam", choices=choices)
    assert stretches(run, "0") == [(1, 20, "I1"), (20, 501, "exact")]
    assert stretches(run, "2") == [(1, 10, "I2"), (10, 501, "exact")]


# --- tables and the page ---


def test_the_time_of_a_step_is_over_adamws_of_the_same_seed():
    runs = [made(seed=i, pace=x) for i, x in enumerate([1.0, 2.0, 4.0])]
    runs += [made("FisherAdam", seed=i, pace=x) for i, x in enumerate([3.0, 4.0, 4.0, 100.0])]
    study = Study.of(runs)
    assert study.pace("final", "digits_mlp", "FisherAdam").value == pytest.approx(2.0)
    assert study.pace("final", "mnist_relu", "FisherAdam") is None
    assert paces(study, "final").rows == [["digits_mlp", "2 [1, 3]"]]


def test_curves_that_end_early_go_on_as_they_ended():
    places, values = on_one_axis([[1, 2, 3], [1, 2], [1, 2, 3]], [[3.0, 2.0, 1.0], [5.0, 4.0], [1.0, np.nan, np.inf]])
    assert places.tolist() == [1, 2, 3]
    assert values.tolist() == [[3.0, 2.0, 1.0], [5.0, 4.0, 4.0], [1.0, np.inf, np.inf]]


def test_curves_by_time_are_compared_at_the_same_times():
    """The median of times and that of values, each by itself, would jump where one of them ends."""
    places, values = on_one_axis([[1.0, 3.0], [2.0, 4.0]], [[10.0, 30.0], [0.0, 20.0]])
    assert places.tolist() == [1.0, 2.0, 3.0]  # as far as the median of the ends
    assert values.tolist() == [[10.0, 20.0, 30.0], [0.0, 0.0, 10.0]]


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


def test_what_is_equal_is_best_together():
    runs = [*several(test=0.1), *several("SGD", test=0.1), *several("NAdam", test=0.2), *several("Muon", test=0.01)]
    table = metrics(Study.of(runs), "final")
    strong = {m for m, cell in zip(table.columns[1:], table.rows[0][1:], strict=True) if isinstance(cell, Strong)}
    assert strong == {"AdamW", "SGD"}
    assert metrics(Study.of(runs), "final", only=("NAdam", "Muon")).columns == ["problem", "NAdam", "Muon"]


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


def test_tables_are_filled_in_between_their_marks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- table: final-metric -->\nold\n<!-- end of table -->\nb\n")
    fill(path, [*several(test=0.1), *several("SGD", test=0.25)])
    expected = "| problem | AdamW | SGD |\n| --- | --- | --- |\n| digits_mlp | **10.00%** | 25.00% |\n"
    assert path.read_text() == f"a\n<!-- table: final-metric -->\n{expected}<!-- end of table -->\nb\n"
    path.write_text("<!-- table: nothing -->\n<!-- end of table -->\n")
    with pytest.raises(KeyError, match="nothing"):
        fill(path, [])
    path.write_text("<!-- table: targets -->\nprose\n<!-- table: targets -->\n<!-- end of table -->\n")
    with pytest.raises(ValueError, match="2 tables begin and 1 end"):
        fill(path, [])
    assert "prose" in path.read_text()


def test_the_readme_has_the_tables_of_the_runs_that_are_kept():
    readme = Path(benchmarks.__file__).parents[1] / "README.md"
    study = Study.of(Store(RESULTS / "runs").runs())
    assert filled(readme.read_text(), study) == readme.read_text(), "python -m benchmarks report --keep"


def test_what_auto_loses_by_time(tmp_path):
    """The best by passes is not the best by time where passes share what they cost."""
    estimators = {"I1": (1, 3.0), "exact": (10, 5.0)}
    layer = {
        "estimators": {name: {"passes": p, "error_x_compute": e} for name, (p, e) in estimators.items()},
        "rules": {"auto": {"picks": {"I1": 0.5, "exact": 0.5}, "ratio_to_best": 4 / 3}},
    }
    errors, cost = tmp_path / "errors.json", tmp_path / "cost.json"
    errors.write_text(json.dumps({"networks": {"ReLU": {"early": {"0": layer, "2": layer}}}}))
    rows = [{"problem": "mlp", "method": m, "ratio": {"median": t}} for m, t in (("I1", 2.0), ("exact", 4.0))]
    cost.write_text(json.dumps({"cpu": {"passes": {"rows": rows}}}))
    # By time 3 x 2 = 6 and 5 / 10 x 4 = 2: their mean over the least is 2.
    assert efficiency.read(errors, cost).rows == [["ReLU, early", "1", "I1 50%, exact 50%", "1.33", "2", "exact"]]
