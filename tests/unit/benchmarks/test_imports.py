"""The benchmarks' modules import each other without circles, and the package imports none of them."""

import ast
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from tokmask_peft.cli.app import app
from tokmask_peft.recipe.loading import to_yaml

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


@pytest.fixture
def gpu_modules(monkeypatch):
    """Let the modules of the GPU measurement be imported, as in a dry run."""
    for folder in ("benchmarks", "benchmarks/gpu"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.setenv("DRY", "1")


@pytest.mark.usefixtures("gpu_modules")
def test_a_small_copy_has_the_rows_of_the_texts_and_restored_is_that_model_in_bf16(tmp_path):
    small = importlib.import_module("small_copy")
    model, tokenizer = build("bert")
    whole, copy, restored = (tmp_path / name for name in ("whole", "copy", "restored"))
    for one in (model.base_model, tokenizer):
        one.save_pretrained(whole)
    texts = ["hola this", "qué bueno"]
    small.shrink(whole, copy, [number for ids in tokenizer(texts)["input_ids"] for number in ids])
    small.restore(copy, restored)
    one, two = (AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval() for folder in (whole, restored))
    batch = AutoTokenizer.from_pretrained(restored)(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], tokenizer(texts, padding=True, return_tensors="pt")["input_ids"])
    assert torch.equal(one(**batch).last_hidden_state, two(**batch).last_hidden_state)
    needed = {*batch["input_ids"].flatten().tolist(), *tokenizer.all_special_ids}
    assert len(load_file(copy / "model.safetensors")["rows"]) == len(needed) < len(tokenizer)
    equal = (one.get_input_embeddings().weight == two.get_input_embeddings().weight).all(1)
    assert equal[sorted(needed)].all()
    assert not equal.all()


@pytest.mark.usefixtures("gpu_modules")
def test_each_part_of_the_gpu_measurement_is_a_function_of_a_module_that_can_be_imported():
    parts = {}
    for name in ("checks", "trainings", "steps", "compare"):
        parts |= getattr(importlib.import_module(name), "PARTS", {})
    assert {*importlib.import_module("measure").PARTS, "prepare"} == {*parts}


@pytest.mark.usefixtures("gpu_modules")
def test_a_part_that_fails_or_takes_too_long_does_not_end_the_measurement(tmp_path, monkeypatch):
    measure = importlib.import_module("measure")
    codes = {"fails": "exit(3)", "hangs": "import time; time.sleep(60)", "works": ""}

    def launch(part):
        (tmp_path / f"{part}.json").write_text('{"step": 1}')
        return subprocess.Popen([sys.executable, "-c", codes[part]], start_new_session=True)

    monkeypatch.setattr(measure, "OUT", tmp_path)
    monkeypatch.setattr(measure, "PARTS", dict.fromkeys(codes, 60))
    monkeypatch.setattr(measure, "launch", launch)
    finish, hangs = measure.finish, codes["hangs"]
    monkeypatch.setattr(measure, "finish", lambda one, seconds: finish(one, 2 if hangs in one.args else seconds))
    measure.run(list(codes))
    found = json.loads((tmp_path / "results.json").read_text())
    ends = {part: status.partition(",")[0] for part, status in found.pop("status").items()}
    assert ends == {"fails": "exit 3", "hangs": "cut off after 2 s", "works": "exit 0"}
    assert found == {part: {"step": 1} for part in codes}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_part_of_the_gpu_measurement_that_is_not_known_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/measure.py"), "attenton", "env"]
    environment = {**os.environ, "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "attenton" in done.stderr
    assert "attention" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("gpu_modules")
def test_the_runs_of_the_study_are_those_of_the_plan():
    study, found = importlib.import_module("study"), {}
    for stage, arms in ((1, study.SCREENED), (2, ("mask+views", "annealed"))):
        for name, texts in study.TEXTS[stage].items():
            tuned = [] if texts.learning_rate else [study.tuning(stage, name)]
            plans = [sweep.plan() for sweep in (*tuned, *study.sweeps(stage, name, "1.0e-3", arms))]
            found |= {plan.name: {cell.name: plan.recipe_of(cell) for cell in plan.cells} for plan in plans}
    sizes = {name: len(cells) for name, cells in found.items()}
    assert sum(sizes.values()) == 3 * 3 * 10 + 2 * 2 + 6 * 8 * 4 + 6 * 2
    runs = {f"{name}/{cell}": recipe for name, cells in found.items() for cell, recipe in cells.items()}
    assert {recipe.training.batch_size for recipe in runs.values()} == {16}
    assert {recipe.seed for name, recipe in runs.items() if name.startswith("stage1-trec")} == {11, 12, 13}
    assert {recipe.seed for name, recipe in runs.items() if "-lr-" in name} == {1}
    assert {recipe.seed for name, recipe in runs.items() if "2-lince/" in name} == {*range(21, 29)}
    arms = "none", "label_smoothing", "mask0.1", "drop0.1", "share0.5", "overfit0.3", "mask0.1+views", "views"
    assert {*found["stage1-sagt"]} == {f"{arm}-seed{seed}" for arm in arms for seed in (11, 12, 13)}
    scored = {name for name, recipe in runs.items() if recipe.training.baseline}
    assert scored == {f"stage{stage}-{name}/none-seed{seed}" for stage, seeds in ((1, (11, 12, 13)), (2, range(21, 29)))
                      for name in study.TEXTS[stage] for seed in seeds}  # fmt: skip
    once, annealed = (runs[f"stage1-{name}-seed11"] for name in ("trec/none", "trec-annealed/anneal0.1"))
    assert annealed.masking.replace == "drop"
    assert [annealed.masking.p_start, annealed.masking.p] == [0.1, 0]
    assert runs["stage1-trec-twice/none-seed11"].training.epochs == 2 * once.training.epochs == 20
    recipes = {texts.recipe for texts in (*study.TEXTS[1].values(), *study.TEXTS[2].values())}
    assert recipes == {*importlib.import_module("small_copy").KEPT}


@pytest.mark.usefixtures("gpu_modules")
def test_the_command_of_a_sweep_of_the_study_lists_its_runs():
    study = importlib.import_module("study")
    for sweep in (study.tuning(1, "twi"), *study.sweeps(1, "sagt", "3.0e-4", study.SCREENED)):
        _, *words = shlex.split(sweep.command)
        done = CliRunner().invoke(app, [*words, "--dry-run"])
        assert done.exit_code == 0, done.output
        assert [line.split()[0] for line in done.output.splitlines()] == [cell.name for cell in sweep.plan().cells]


def test_the_study_lists_its_commands_without_optuna():
    """The GPU machine has none."""
    code = "import sys; sys.modules['optuna'] = sys.modules['sqlalchemy'] = None; import study; study.main()"
    path = os.pathsep.join([str(ROOT / "benchmarks/gpu"), str(ROOT)])
    command = [sys.executable, "-c", code, "--stage", "2", "--arms", "views,twice", "--list"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6 * 3
    assert lines[1].endswith(
        "--name stage2-kin --seeds 21,22,23,24,25,26,27,28 --p 0,0.1 --arms none,label_smoothing,views"
    )


@pytest.mark.usefixtures("gpu_modules")
def test_a_call_goes_on_with_the_runs_of_another_whose_folder_was_another(tmp_path, monkeypatch):
    study = importlib.import_module("study")
    monkeypatch.setattr(study, "TEXTS", {1: {"trec": study.TEXTS[1]["trec"]}})
    for call, done in (("first", 0), ("second", 1)):
        folder = tmp_path / call
        (folder / "e5").mkdir(parents=True)
        monkeypatch.chdir(folder)
        if done:
            study.Archive.unpack(tmp_path / "first.tar.gz")
        stage = study.Stage(1, ["views"], "", (), study.Archive(tmp_path / f"{call}.tar.gz"))
        assert (stage.done, len(stage.waiting)) == (done, 9 - done)
        run = study.RunFolder(stage.waiting[0][-1].run_dir)
        run.root.mkdir(parents=True)
        run.recipe.write_text(to_yaml(stage.waiting[0][-1]))
        run.result.write_text("{}")
        stage.keep(run)
    monkeypatch.chdir(tmp_path / "first")
    with pytest.raises(SystemExit, match=r"data\.max_length: 128 before"):
        study.Stage(1, ["views"], "", ("data.max_length=64",), study.Archive(tmp_path / "third.tar.gz"))


def test_cells_that_another_process_wrote_are_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    own_data, file = importlib.import_module("own_data"), tmp_path / "cells.json"
    one, other = ({"corpus": "trec", "seed": seed} for seed in (1, 2))
    for cell, _ in own_data.missing_cells(file, [one]):
        for beside, _ in own_data.missing_cells(file, [other]):
            beside["f1_macro"] = 0.5
        cell["f1_macro"] = 0.6
    cells = json.loads(file.read_text())["cells"]
    assert sorted((cell["seed"], cell["f1_macro"]) for cell in cells) == [(1, 0.6), (2, 0.5)]
    assert not [*own_data.missing_cells(file, [{"corpus": "trec", "seed": 1}])]
    place = {"arm": "", "corpus": "tso", "seed": 1}  # it has 804 texts
    file.write_text(json.dumps({"cells": [place | {"size": size, "texts": min(size, 804)} for size in (360, 1000)]}))
    assert [own_data.has_all(file, place | {"size": size}) for size in (360, 1000, 5000)] == [False, False, True]


@pytest.mark.usefixtures("gpu_modules")
def test_an_archive_that_is_cut_off_has_the_runs_before(tmp_path, monkeypatch):
    study = importlib.import_module("study")
    monkeypatch.chdir(tmp_path)
    archive = study.Archive(tmp_path / "stage1.tar.gz")
    for name in ("one", "two"):
        files = [tmp_path / "runs" / "sweep" / name / file for file in ("recipe.yaml", "result.json")]
        files[0].parent.mkdir(parents=True)
        for file in files:
            file.write_text(name)
        archive.add([file.relative_to(tmp_path) for file in files], **{f"{name}.json": "{}"})
    whole = archive.path.read_bytes()
    for size, kept in ((len(whole), ["one", "two"]), (len(whole) - 60, ["one"])):
        shutil.rmtree("runs")
        archive.path.write_bytes(whole[:size])
        study.Archive.unpack(archive.path)
        assert sorted(folder.name for folder in (tmp_path / "runs" / "sweep").iterdir()) == kept
        assert (tmp_path / "runs" / "sweep" / "one" / "recipe.yaml").read_text() == "one"
