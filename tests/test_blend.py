"""The measurement of blending I1 and I2 against brute force, every label enumerated."""

import pytest
import torch

from benchmarks.blend import moments, rows
from tests.cases import Case
from tests.reference import derivatives
from tests.reference import moments as exact_moments


def test_the_covariance_and_the_best_weight_are_those_of_brute_force():
    model, inputs, _ = Case("sigmoid", "categorical", inputs=5).build()
    found = moments(model, *inputs)
    d = derivatives(model, inputs)
    m = exact_moments(d, "categorical")
    p = d.h.softmax(-1)
    residuals = p - torch.eye(3, dtype=torch.float64)[:, None]

    def estimates(c):
        first, second = (torch.einsum("nap,na->np", x, c) for x in (d.first, d.second))
        return first.square(), m.fisher + second

    for layer, ours in found.items():
        members = tuple(f"{layer}.{name}" for name in ("weight", "bias"))
        mine = d.columns(members)

        def variance(w, mine=mine):
            """The mean over the five inputs of Var_y, summed over the layer."""
            errors = [(1 - w) * a + w * b - m.fisher for a, b in map(estimates, residuals)]
            return float(torch.einsum("ny,ynp->", p, torch.stack(errors).square()[..., mine])) / 5

        assert variance(0.0) == pytest.approx(ours.v1, rel=1e-10)
        assert variance(1.0) == pytest.approx(ours.v2, rel=1e-10, abs=1e-15)
        assert variance(ours.weight) == pytest.approx(ours.blend, rel=1e-10, abs=1e-15)
        assert variance(ours.weight) <= min(variance(ours.weight + step) for step in (-0.01, 0.01))
        assert float(m.fisher[:, mine].var(0, correction=0).sum()) == pytest.approx(ours.over_inputs, rel=1e-8)


def test_rows_say_what_a_blend_costs():
    model, inputs, _ = Case("sigmoid", "categorical", inputs=3).build()
    found = rows("Sigmoid", "early", model, *inputs)
    assert [row.layer for row in found] == ["0", "2", "4"]
    assert found[-1].weight == pytest.approx(1.0)
    for row in found:
        m = row.moments
        assert row.gain <= 1 + 1e-12
        assert m.tilted <= m.v1
        assert row.inefficiency["blend"] >= row.inefficiency["exact"]
