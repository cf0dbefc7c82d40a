"""The benchmarks' modules import each other without circles, and the package imports none of them."""

import ast
import importlib
import os
import subprocess
import sys
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


def test_what_the_benchmarks_import_of_the_package_is_there():
    """Those of the GPU are run too rarely to notice a rename."""
    for path in (path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokmask_peft"):
                module = importlib.import_module(node.module)
                assert [one.name for one in node.names if not hasattr(module, one.name)] == [], path


def test_each_part_of_the_gpu_measurement_is_a_function_of_a_module_that_can_be_imported(monkeypatch):
    for folder in ("benchmarks", "benchmarks/gpu"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.setenv("DRY", "1")
    parts = {}
    for name in ("checks", "trainings", "steps", "compare"):
        parts |= getattr(importlib.import_module(name), "PARTS", {})
    assert {*importlib.import_module("measure").PARTS, "prepare"} == {*parts}


def test_a_part_of_the_gpu_measurement_that_is_not_known_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/measure.py"), "attenton", "env"]
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "attenton" in done.stderr
    assert "attention" in done.stderr
    assert not (tmp_path / "out").exists()
