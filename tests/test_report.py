"""The report: table, dict, picture."""

import json

import pytest
import torch
from torch import nn

import fishopt


def _trained(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss(), **options)
    for _ in range(70):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(0, 3, (16,))).backward()
        optimizer.step()
    return optimizer


def test_table_and_dict_say_the_same():
    report = _trained().report()
    text = str(report)
    content = json.loads(json.dumps(report.as_dict()))
    assert content["steps"] == 70
    assert 0 < content["curvature_share"] < 1
    assert [row["parameters"] for row in content["rows"]] == [56, 27]
    for row in content["rows"]:
        assert row["group"] in text
        assert row["estimator"] in text
        assert row["refreshes"] == 10 + 5 + 5 + 4  # every step, from 10 every second, from 20 fourth, from 40 eighth
        assert set(row["ways"].values()) == {"rule"}
    assert "way 'rule': by a rule" in text
    assert "Remark" in text
    assert "curvature:" in text
    assert [entry["step"] for entry in content["history"]] == [0, 32, 64]


def test_before_the_first_step():
    model = nn.Linear(6, 3)
    report = fishopt.FisherAdam(model, nn.CrossEntropyLoss()).report()
    assert "not chosen yet" in str(report)
    with pytest.raises(ValueError, match="history is empty"):
        report.plot("nowhere.png")


def test_fixed_estimators_say_so():
    assert all("set by the user" in row.reason for row in _trained(estimator="I1").report().rows)


def test_picture(tmp_path):
    path = _trained(criterion="bound").report().plot(tmp_path / "choices.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_names_are_no_markup():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("[/x]", nn.Linear(6, 4))
    model.add_module("[head]", nn.Linear(4, 3))
    optimizer = fishopt.FisherAdam(model, nn.CrossEntropyLoss())
    nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(0, 3, (16,))).backward()
    optimizer.step()
    text = str(optimizer.report())
    assert "[/x]" in text
    assert "[head]" in text
