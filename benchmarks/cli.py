"""The benchmarks' commands: list, run, tune, ablate, report, cost."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import ablations, protocol
from benchmarks.ablations import ABLATIONS, STUDIES
from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.runs import Spec, Store, keep_runs

RESULTS = Path(__file__).parent / "results"
"""What is kept with the repository."""

DEFAULT_OUT = Path("out/runs")

KEPT = ("profiles.png", "speedups_final.png", "tables.md")
"""What of a report is kept there, besides runs."""

MAIN = (
    "FisherAdam",
    "FisherAdam schedule-free",
    "DiagonalNGD",
    "DiagonalNGD auto",
    "AdamW",
    "NAdam",
    "SGD",
    "Muon",
    "Schedule-Free AdamW",
    "L-BFGS",
)
"""The methods that are run unless others are named."""


def options(*chosen: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that several commands have."""
    known = {
        "problems": click.option(
            "-p", "--problem", "problems", multiple=True, type=click.Choice(list(PROBLEMS)), help="Repeat for several."
        ),
        "methods": click.option(
            "-m", "--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Repeat for several."
        ),
        "data": click.option(
            "--data-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="MNIST/raw/*.gz, cifar-10-batches-bin/*.bin, tinyshakespeare/input.txt; what is not there is fetched.",
        ),
        "out": click.option(
            "--out",
            type=click.Path(path_type=Path),
            default=DEFAULT_OUT,
            show_default=True,
            help="Where runs are.",
        ),
        "jobs": click.option("--jobs", default=1, show_default=True, help="Processes, of one thread each."),
        "seeds": click.option("--seeds", default=5, show_default=True, help="Seeds 1, 2, ..."),
    }

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(chosen):
            command = known[name](command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    """Trains fishopt's optimizers and others on the same problems, and says how they compare."""


@main.command("list")
def show() -> None:
    """Lists problems and methods."""
    problems = Table("problem", "what it is", "steps", "metric", "data", title="problems")
    for problem in PROBLEMS.values():
        data = "files" if problem.needs_files else "built in"
        problems.add_row(problem.name, problem.about, str(problem.steps), problem.metric, data)
    methods = Table("method", "default lr", "package", title="methods")
    for method in METHODS.values():
        package = (method.package or "torch") + ("" if method.is_installed else " (not installed)")
        methods.add_row(method.name, "none" if method.lr is None else f"{method.lr:g}", package)
    Console(width=120).print(problems, methods)


@main.command()
@options("problems", "methods", "data", "out", "jobs", "seeds")
@click.option(
    "--track",
    type=click.Choice(["final", "defaults", "sensitivity", "goals"]),
    default="defaults",
    show_default=True,
    help="final: what `tune` has chosen; defaults: methods as they come; sensitivity: nine learning rates each; "
    "goals: to a goal on full batches, nine rates of AdamW and the methods without any.",
)
def run(
    problems: tuple[str, ...],
    methods: tuple[str, ...],
    data_dir: Path | None,
    out: Path,
    jobs: int,
    seeds: int,
    track: str,
) -> None:
    """Trains; runs that are finished are not repeated."""
    store, numbers = Store(out), range(1, seeds + 1)
    where, which = _problems(problems, data_dir), _methods(methods)
    if track == "final":
        specs = protocol.finals(store.runs(), numbers)
        specs = [spec for spec in specs if spec.problem in where and spec.method in which]
        if not specs:
            raise click.ClickException("nothing is tuned yet for these problems and methods; run `tune` on them first")
    elif track == "sensitivity":
        specs = protocol.sensitivity(where, which, numbers)
    elif track == "goals":
        specs = protocol.goals(where, which, numbers)
    else:
        specs = protocol.defaults(where, which, numbers)
    if not specs:
        raise click.ClickException(f"nothing to run for these problems and methods on the track {track!r}")
    _run(specs, data_dir, store, jobs)


@main.command()
@options("problems", "methods", "data", "out", "jobs")
@click.option("--trials", default=8, show_default=True, help="Configurations tried besides a method as it comes.")
def tune(
    problems: tuple[str, ...], methods: tuple[str, ...], data_dir: Path | None, out: Path, jobs: int, trials: int
) -> None:
    """Tries configurations on one seed; `run --track final` takes the best of each method on validation."""
    specs = protocol.tuning(_problems(problems, data_dir), _methods(methods), trials)
    _run(specs, data_dir, Store(out), jobs)


@main.command()
@click.argument("names", nargs=-1, type=click.Choice([*ABLATIONS, *STUDIES]))
@options("problems", "data", "out", "jobs", "seeds")
def ablate(
    names: tuple[str, ...], problems: tuple[str, ...], data_dir: Path | None, out: Path, jobs: int, seeds: int
) -> None:
    """Trains variants of our methods that differ in one choice or two; all ablations unless some are named.

    Two train nothing, but look at estimates: "errors", what each costs and how far off it is, and "blend", whether a
    weighting of I1 and I2 is better than either.
    """
    specs = []
    for name in names or tuple(ABLATIONS):
        if name in STUDIES:
            folder = [] if data_dir is None else ["--data-dir", str(data_dir)]
            importlib.import_module(STUDIES[name]).main([*folder, "--out", str(out.parent)])
        else:
            where = problems or _at_hand(ABLATIONS[name].problems, data_dir)
            specs += ablations.specs(name, where, range(1, seeds + 1))
    _run(specs, data_dir, Store(out), jobs)


@main.command()
@options("out")
@click.option("--to", type=click.Path(path_type=Path), default=Path("out/report"), show_default=True, help="Folder.")
@click.option("--keep", is_flag=True, help="Also keep runs and tables in benchmarks/results, and fill in the README.")
def report(out: Path, to: Path, *, keep: bool) -> None:
    """Makes tables and pictures of finished runs, and one page of all; of those in the repository if --out has none."""
    from benchmarks.report import fill, make

    runs, kept = list(Store(out).runs()), Store(RESULTS / "runs")
    if not runs and out != DEFAULT_OUT:
        raise click.ClickException(f"there are no runs in {out}; `run` makes some")
    if keep:
        keep_runs(runs, kept.folder)
    if keep or not runs:
        runs = list(kept.runs())
    found = {path for kind in ("*.png", "*.json") for path in RESULTS.glob(kind)}
    extras = sorted(found - {RESULTS / name for name in KEPT})
    click.echo(f"written: {make(runs, to, extras, Console())}")
    if keep:
        fill(RESULTS.parent.parent / "README.md", runs)
        for name in KEPT:
            shutil.copy(to / name, RESULTS)


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def cost(arguments: tuple[str, ...]) -> None:
    """Measures what curvature costs; `cost --help` tells its own options."""
    from benchmarks.cost.measure import main as measure

    measure(list(arguments))


def _problems(named: tuple[str, ...], data_dir: Path | None) -> tuple[str, ...]:
    """Those that are named, or else all for which data are at hand."""
    return named or _at_hand(PROBLEMS, data_dir)


def _at_hand(problems: Iterable[str], data_dir: Path | None) -> tuple[str, ...]:
    return tuple(name for name in problems if data_dir is not None or not PROBLEMS[name].needs_files)


def _methods(named: tuple[str, ...]) -> tuple[str, ...]:
    missing = [name for name in named if not METHODS[name].is_installed]
    if missing:
        packages = " ".join(sorted({METHODS[name].package or "" for name in missing}))
        raise click.ClickException(f"not installed: {packages}; pip install 'fishopt[peers]' brings all of them")
    return named or tuple(name for name in MAIN if METHODS[name].is_installed)


def _run(specs: list[Spec], data_dir: Path | None, store: Store, jobs: int) -> None:
    done = sum(map(store.has, specs))
    click.echo(f"{len(specs)} runs, {done} of them finished before; in {store.folder}")
    protocol.run_all(specs, data_dir, store, jobs)
