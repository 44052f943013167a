"""Bounds on traces (Corollary 4.6 corrected, Theorem D.1), and the counterexample to the printed form."""

import pytest
import torch
from torch import nn

import fishopt
from tests.cases import CASES, Case
from tests.reference import derivatives, moments

SMALL = [c for c in CASES if c.network in {"sigmoid", "conv_relu", "residual", "two_inputs", "linear"}]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_trace_bounds_hold(case, full):
    model, inputs, likelihood = case.build()
    d = derivatives(model, inputs)
    m = moments(d, case.family)
    for quantity, value in (("fisher", m.fisher), ("I1", m.v1), ("I2", m.v2)):
        upper = fishopt.trace_bound(model, inputs, likelihood, quantity=quantity, full_spectrum=full)
        lower = fishopt.trace_bound(model, inputs, likelihood, quantity=quantity, full_spectrum=full, side="lower")
        parts = d.by_name(value.mean(0))
        for group, bound in upper.items():
            names = [n for n in parts if n == group or n.rpartition(".")[0] == (group if group != "model" else "")]
            trace = sum(parts[n].sum() for n in names)
            assert lower[group] - 1e-10 <= trace <= bound * (1 + 1e-9) + 1e-12, (quantity, group)


def test_the_full_spectrum_is_tighter():
    model, inputs, likelihood = Case("sigmoid", "categorical").build()
    for quantity in ("fisher", "I2"):
        corner = fishopt.trace_bound(model, inputs, likelihood, quantity=quantity)
        full = fishopt.trace_bound(model, inputs, likelihood, quantity=quantity, full_spectrum=True)
        assert all(full[g] <= corner[g] * (1 + 1e-12) for g in corner)


def test_user_groups():
    model, inputs, likelihood = Case("sigmoid", "categorical").build()
    layers = fishopt.trace_bound(model, inputs, likelihood)
    groups = {"first": ["0.weight", model[0].bias], "rest": list(model[2].parameters())}
    found = fishopt.trace_bound(model, inputs, likelihood, groups=groups)
    assert found.keys() == {"first", "rest"}
    torch.testing.assert_close(found["first"], layers["0"])


def test_corollary_4_6_as_printed_fails_and_the_corrected_form_holds():
    """``|J|_F tr I`` grows with the first power of h's scale, tr I(theta|x) with the second."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, dtype=torch.float64)
    violated = []
    for scale in (0.01, 0.1, 10.0, 100.0):
        hidden = nn.Linear(3, 2).double()
        with torch.no_grad():
            hidden.weight.fill_(0.1)

        class Scaled(nn.Module):
            def __init__(self, inner, scale):
                super().__init__()
                self.inner, self.scale = inner, scale

            def forward(self, x):
                return self.scale * self.inner(x)

        model = Scaled(hidden, scale)
        d = derivatives(model, (x,))
        jacobian, information = d.first[0], torch.eye(2, dtype=torch.float64)
        trace = torch.einsum("ap,ab,bp->", jacobian, information, jacobian)
        printed = torch.linalg.matrix_norm(jacobian) * information.trace()
        violated.append(bool(trace > printed))
        corrected = fishopt.trace_bound(model, x, fishopt.Gaussian())["inner"]
        assert trace <= corrected * (1 + 1e-12)
    assert violated == [False, False, True, True]
