"""The house's rules: imports run one way, BackPACK and matplotlib live in one room each, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import fishopt

ROOT = Path(fishopt.__file__).parent
ORDER = [
    "likelihoods",
    "passes",
    "groups",
    "checks",
    "batch",
    "estimators",
    "variance",
    "traces",
    "eigenvalues",
    "spectrum",
    "empirical",
    "judging",
    "selection",
    "plotting",
    "report",
    "optim",
    "penalty",
    "diagnostics",
]


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _files():
    return sorted(ROOT.rglob("*.py"))


def test_imports_run_one_way():
    for path in _files():
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room == "__init__":
            continue
        assert room in ORDER, f"{path}: add the room to ORDER"
        for name in _imports(path):
            if name.startswith("fishopt."):
                assert ORDER.index(name.split(".")[1]) <= ORDER.index(room), f"{path} imports {name}"


def test_backpack_and_matplotlib_live_in_one_room_each():
    for library, rooms in (
        ("backpack", {"passes/backpack.py"}),
        ("matplotlib", {"plotting.py"}),
        ("torchvision", set()),
    ):
        found = {str(p.relative_to(ROOT)) for p in _files() if any(n.split(".")[0] == library for n in _imports(p))}
        assert found == rooms


def test_files_stay_small():
    assert {str(p): n for p in _files() if (n := len(p.read_text().splitlines())) > 350} == {}


def test_public_names():
    assert len(fishopt.__all__) <= 20
    assert sorted(fishopt.__all__) == list(fishopt.__all__)
    assert all(getattr(fishopt, name).__doc__ for name in fishopt.__all__)


def test_import_needs_no_extra():
    """matplotlib and scikit-learn are extras (torch itself imports tqdm where it is)."""
    code = "import sys, fishopt; assert not {'matplotlib', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
