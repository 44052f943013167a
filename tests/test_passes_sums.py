"""Sums over inputs that are made of several columns at once, by definition."""

import pytest
import torch

from fishopt.passes import Shadow
from fishopt.passes.backward import Backward
from tests.asserts import assert_close
from tests.cases import CASES
from tests.engines import functional, is_ruled, traced
from tests.reference import derivatives

CATEGORICAL = [case for case in CASES if case.family == "categorical"]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("engine", [traced, functional])
@pytest.mark.parametrize("case", CATEGORICAL, ids=str)
def test_sums_of_squares_by_definition(case, engine, at_once, monkeypatch):
    model, inputs, _ = case.build()
    shadow = Shadow(model)
    if engine is traced and not is_ruled(shadow, inputs, shadow.names):
        return
    if not at_once:  # more columns than may be there together
        monkeypatch.setattr(Backward, "_columns_at_once", lambda self, contacts: 3)
    d = derivatives(model, inputs)
    n, t = d.h.shape
    generator = torch.Generator().manual_seed(5)
    columns = torch.randn(4, n, t, dtype=torch.float64, generator=generator)
    shares = torch.rand(4, n, dtype=torch.float64, generator=generator)
    weights = torch.randn(2, 4, n, dtype=torch.float64, generator=generator)
    q = torch.einsum("kna,nap->knp", columns, d.first).square()
    inside = torch.einsum("kn,knp->np", shares, q)
    signs, scores = (torch.einsum("kn,knp->p", w, q.square()) for w in (shares.square(), weights[0]))
    fourth = torch.einsum("rsn,snp->rp", weights[:, :2], (q[:2] + q[2:]).square())
    with engine(shadow, inputs, shadow.names) as through:
        found = through.quartic_sums(columns, shares, weights[0])
        assert_close(found, d.by_name(torch.stack([inside.sum(0), inside.square().sum(0), signs, scores])))
        groups = columns.unflatten(0, (2, 2)).transpose(0, 1)
        assert_close(through.fourth_vjp(groups, weights[:, :2]), d.by_name(fourth))
        assert_close(through.fourth_vjp(groups, weights[0, :2]), d.by_name(fourth[0]))
