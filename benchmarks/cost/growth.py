"""How the cost of an estimate grows with the batch, the width, the depth and the number of outputs."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import nn

import fishopt
from benchmarks.cost.curvature import GRADIENT, gradient
from benchmarks.cost.inside import Plan, estimation
from benchmarks.cost.networks import Problem, problem
from benchmarks.cost.records import Row, Setting
from benchmarks.cost.timing import Effort, interleaved
from benchmarks.models import mlp

ESTIMATORS = ("I1", "hutchinson", "exact")
AUTO = "efficiency picks"
DEFAULTS = {"batch": 128, "width": 256, "depth": 4, "outputs": 10}
FEATURES = 256
SIZES = {
    "batch": (16, 32, 64, 128, 256, 512, 1024),
    "width": (64, 128, 256, 512, 1024, 2048),
    "depth": (2, 4, 8, 16),
    "outputs": (2, 3, 4, 6, 10, 32, 100, 316, 1000),
}
SHORTER = {"batch": (8, 16), "width": (16, 32), "depth": (2, 3), "outputs": (2, 10)}
CANDIDATES = ("I1", "I2", "exact", "hutchinson")


def growth(setting: Setting) -> list[Row]:
    """One estimate on ReLU networks that differ in one size; depth counts hidden layers."""
    rows: list[Row] = []
    effort = Effort(budget=0.2 if setting.quick else 2, least=2 if setting.quick else 5, most=25, warm_ups=1)
    fixed = {**DEFAULTS, **({"batch": 8, "width": 16} if setting.quick else {})}
    for what, sizes in (SHORTER if setting.quick else SIZES).items():
        for size in sizes:
            at = _network({**fixed, what: size}, setting)
            family = fishopt.from_loss(nn.CrossEntropyLoss())
            picked = chosen(at, family)
            cases = {GRADIENT: gradient(at)}
            cases.update({e: estimation(at.model, at.x, family, {e: at.names}) for e in ESTIMATORS})
            cases[AUTO] = estimation(at.model, at.x, family, picked)
            times = interleaved(cases, [GRADIENT], setting.device, effort, f"growth, {what} {size}")
            hidden = sorted({e for e, names in picked.items() if set(names) - set(at.affine_names(1))})
            for method in cases:
                others = {name: value for name, value in fixed.items() if name != what}
                rows.append(Row.of(what, method, GRADIENT, times, size, hidden=hidden, others=others))
    return rows


def _network(sizes: dict[str, int], setting: Setting) -> Problem:
    torch.manual_seed(0)
    widths = (FEATURES, *[sizes["width"]] * sizes["depth"], sizes["outputs"])
    return problem("relu mlp", mlp(widths), widths[:1], sizes["batch"], setting.device)


def chosen(at: Problem, family: fishopt.Likelihood) -> Plan:
    """What the optimizers' criterion picks, with exact among the candidates."""
    choices = fishopt.select_estimators(at.model, at.x[:8], family, criterion="efficiency", candidates=CANDIDATES)
    plan: dict[str, list[str]] = defaultdict(list)
    for choice in choices:
        plan[choice.estimator].extend(name for name in at.names if name.rpartition(".")[0] == choice.group)
    return plan


def exponent(rows: list[Row]) -> float:
    """The slope of log time against log size over the larger half of the sizes."""
    points = sorted((math.log(row.size), math.log(row.seconds)) for row in rows)
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    x, y = torch.tensor(upper, dtype=torch.float64).T
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
