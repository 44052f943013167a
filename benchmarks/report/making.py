"""From runs to tables, pictures and a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.ablations import ABLATIONS
from benchmarks.methods import METHODS
from benchmarks.protocol import REFERENCE
from benchmarks.report import claims, efficiency, figures, fullbatch, panels, readme, summaries
from benchmarks.report.ablations import Ablation
from benchmarks.report.checks import all_of, best_of
from benchmarks.report.page import Section, html, markdown
from benchmarks.report.study import LABELS, Study
from benchmarks.report.tables import Table
from benchmarks.report.targets import checks
from benchmarks.runs import Run


def make(runs: list[Run], folder: Path, extras: Sequence[Path] = (), console: Console | None = None) -> Path:
    """Writes ``report.html``, ``tables.md`` and the pictures.

    Args:
        runs: Of any tracks.
        folder: Where to; made if it is not there.
        extras: Results of other measurements: pictures, and JSON files with claims.
        console: Where to show the main tables, if anywhere.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study = Study.of(runs)
    sections = [section for section in _sections(study, folder, extras) if section.tables or section.pictures]
    (folder / "tables.md").write_text(markdown(sections))
    path = folder / "report.html"
    path.write_text(html(sections))
    if console is not None:
        console.print(*(section.tables[0].rich() for section in sections[:3] if section.tables))
    return path


def fill(path: Path, runs: Sequence[Run]) -> None:
    """Puts the tables of `benchmarks.report.readme` into a text."""
    path.write_text(readme.filled(path.read_text(), Study.of(runs)))


def _sections(study: Study, folder: Path, others: Sequence[Path]) -> Iterator[Section]:
    found, seeds = checks(study), summaries.all_seeds(study)
    about = (
        f"The target of a problem is its goal, or the median of tuned {REFERENCE}'s final validation metrics, which "
        "varies with the seeds drawn. Numbers are medians over seeds with 95% bootstrap intervals: of five seeds that "
        "of a median is their whole range, which covers the true one 94 times in 100; of three, 75 times."
    )
    yield Section("Targets", about, [best_of(found, seeds), all_of(found, seeds)])
    yield from (_track(study, folder, track) for track in ("final", "defaults"))
    yield Section("Profiles", pictures=_drawn(folder, profiles=figures.profiles(study)))
    if study.swept:
        yield Section(
            "Learning rates", "", [summaries.widths(study)], _drawn(folder, sensitivity=panels.sensitivity(study))
        )
    yield Section("Full batch", tables=_full_batch(study))
    yield from (_ablation(Ablation.of(study, track), folder) for track in study.ablations)
    yield from (_problem(study, folder, problem) for problem in study.targets)
    yield from _others(others)
    yield Section("What ran", "", [summaries.problems(study), summaries.counts(study), summaries.environments(study)])


def _track(study: Study, folder: Path, track: str) -> Section:
    if not study.problems(track):
        return Section(LABELS[track])
    about = {
        "final": "Each method's best of the same number of trials on validation, run again on fresh seeds.",
        "defaults": "Each method as it comes, one configuration for all problems.",
    }[track]
    needs = [summaries.speedups(study, track, measure) for measure in ("seconds", "steps", "gradients")]
    if needs[1].rows == needs[2].rows:
        needs.pop()  # every method takes one gradient a step
    tables = [summaries.profile(study, track), *needs, summaries.paces(study, track), summaries.metrics(study, track)]
    pictures = _drawn(folder, **{f"speedups_{track}": figures.speedups(study, track)})
    return Section(LABELS[track].capitalize(), about, tables, pictures)


def _full_batch(study: Study) -> list[Table]:
    methods = [name for name, method in METHODS.items() if method.is_ours and "auto" in name]
    tables = [fullbatch.table(study, method) for method in methods]
    return [table for table in tables if table.rows]


def _ablation(ablation: Ablation, folder: Path) -> Section:
    pictures = _drawn(folder, **{f"ablation_{ablation.name}": panels.ablation(ablation)})
    about = ABLATIONS[ablation.name].about if ablation.name in ABLATIONS else ""
    return Section(f"Ablation: {ablation.name}", about, ablation.tables(), pictures)


def _problem(study: Study, folder: Path, problem: str) -> Section:
    tracks = [track for track in ("final", "defaults") if study.methods(track, problem)]
    tables = [summaries.of_problem(study, track, problem) for track in tracks]
    pictures = {f"curves_{track}_{problem}": figures.curves(study, track, problem) for track in tracks}
    pictures[f"estimators_{problem}"] = panels.estimators(study, problem)
    return Section(problem, "", tables, _drawn(folder, **pictures))


def _others(paths: Sequence[Path]) -> Iterator[Section]:
    tables = [table for path in paths if path.suffix == ".json" if (table := claims.read(path))]
    known = {path.name: path for path in paths}
    if {"errors.json", "cost.json"} <= known.keys():
        tables.append(efficiency.read(known["errors.json"], known["cost.json"]))
    pictures = [path for path in paths if path.suffix == ".png"]
    yield Section("Other measurements", "", tables, pictures)


def _drawn(folder: Path, **found: Figure | None) -> list[Path]:
    return list(_save(folder, found.items()))


def _save(folder: Path, found: Iterable[tuple[str, Figure | None]]) -> Iterator[Path]:
    for name, figure in found:
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110)
            yield path
