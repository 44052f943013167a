"""What tests of the benchmarks' report share: runs made up so that every number is known."""

from benchmarks.problems import PROBLEMS
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


def over_rates(method, problem, good):
    """Nine rates of which the middle ``good`` ones are as good as the best, and the others have diverged."""
    runs = []
    for i in range(9):
        config, bad = {"lr": 10.0 ** (i / 2 - 2)}, abs(i - 4) > good // 2
        runs.append(made(method, problem=problem, track="sensitivity", config=config, diverged=bad))
    return runs
