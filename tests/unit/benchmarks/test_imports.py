"""The benchmarks' modules import each other without circles, and the package imports none of them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = {"benchmarks": (), "benchmarks/studies": (), "benchmarks/gpu": ("benchmarks",)}
"""Folders of modules that import each other by name, and the folders that are on their path as well."""


def imported(path):
    """Return the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circles(folder):
    paths = [path for name in (*FOLDERS[folder], folder) for path in sorted((ROOT / name).glob("*.py"))]
    modules = {path.stem: path for path in paths}
    graph = {name: imported(path) & {*modules} for name, path in modules.items()}
    assert {*TopologicalSorter(graph).static_order()} == {*modules}  # raises CycleError


def test_the_package_imports_no_benchmark():
    names = {path.stem for folder in FOLDERS for path in (ROOT / folder).glob("*.py")} | {"benchmarks"}
    found = {path: imported(path) & names for path in (ROOT / "tokmask_peft").rglob("*.py")}
    assert not {path: modules for path, modules in found.items() if modules}


def test_the_insides_are_used_in_one_place():
    """Of the package, other modules of the GPU measurement may use the console and the command line."""
    files = [path for path in (ROOT / "benchmarks" / "gpu").glob("*.py") if path.name != "insides.py"]
    used = {name for path in files for name in imported(path) if name.startswith("tokmask_peft")}
    assert used <= {"tokmask_peft.cli", "tokmask_peft.console"}
