"""The command line: quick help, exit codes, and never a traceback for a mistake of the user."""

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tokmask_peft import __version__
from tokmask_peft.cli import app, main
from tokmask_peft.cli.app import LOOK, TRAIN, USE
from tokmask_peft.console import echo
from tokmask_peft.recipe.loading import SHIPPED, field_help, load_recipe, shipped_recipes


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def mistake(*arguments):
    """Run a command that must fail with a message, and return it."""
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found.stderr


HEAVY = ("torch", "transformers", "peft", "datasets", "sklearn", "numpy")


QUICK = [
    "--help", "train --help", "recipes list", "validate quickstart", "evaluate nope", "report nope",
    "sweep quickstart --p 0,2", "sweep quickstart --p 0,0.1 --dry-run", "diagnose quickstart --p 0",
    "robustness nope", "faithfulness nope", "init nope", "init --help", "train nope.csv",
]  # fmt: skip


def test_nothing_heavy_is_imported_for_a_quick_answer():
    code = f"""
import sys
from tokmask_peft.cli import main
for arguments in {QUICK!r}:
    sys.argv = ["tokmask", *arguments.split()]
    try:
        main()
    except SystemExit:
        pass
    print("LOADED by", arguments, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = [line for line in done.stdout.splitlines() if line.startswith("LOADED by")]
    assert loaded == [f"LOADED by {arguments} []" for arguments in QUICK], done.stderr


class TestHelp:
    def test_names_every_command_with_or_without_being_asked(self):
        found = run("--help")
        assert found.exit_code == 0
        for command in ("train", "evaluate", "validate", "recipes"):
            assert command in found.stdout
        assert "validate" in run().output
        for panel in (TRAIN, LOOK, USE):
            assert panel in found.stdout
        assert "--install-completion" in found.stdout
        assert run("--version").stdout.strip() == __version__

    @pytest.mark.parametrize("arguments", ["frobnicate", "train", "recipes copy quickstart", "train --x"])
    def test_wrong_usage(self, arguments):
        assert "Usage:" in mistake(*arguments.split())


class TestValidate:
    @pytest.mark.parametrize("name", ["quickstart", "lid_spaeng/mbert", SHIPPED / "trec" / "minilm.yaml"])
    def test_a_good_recipe(self, name):
        found = run("validate", name, "name=mine", "output_dir=there")
        assert found.exit_code == 0
        assert found.stdout.startswith(f"{name} is valid: ")
        assert found.stdout.endswith("run there/mine\n")

    def test_every_problem_of_a_bad_one(self):
        head, *problems = mistake("validate", "quickstart", "masking.p=2", "adapter.rank=8", "oops").splitlines()
        assert head == "Error: quickstart: 3 problems"
        assert [line.split(":")[0].strip() for line in problems] == ["oops", "adapter.rank", "masking.p"]

    def test_a_file_that_is_no_recipe(self, tmp_path):
        for number, content in enumerate([b"\xff\xfe\x00", b"a: [", b"- 1", b"[a]: b", b"\x00"]):
            path = tmp_path / f"{number}.yaml"
            path.write_bytes(content)
            assert mistake("validate", path).startswith(f"Error: {path}: 1 problem\n")
        assert str(tmp_path) in mistake("validate", tmp_path)
        assert "'quickstart'" in mistake("validate", "quickstrat")


class TestRecipes:
    @pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
    def test_list_says_what_each_is_for(self, arguments):
        lines = run(*arguments).stdout.splitlines()
        assert [line.split()[0] for line in lines] == shipped_recipes()
        assert all(len(line.split(maxsplit=1)[1]) > 10 for line in lines)
        assert "TREC" in next(line for line in lines if line.startswith("trec/minilm"))

    def test_show_prints_the_file_or_all_that_it_means(self):
        assert run("recipes", "show", "trec/minilm").stdout == (SHIPPED / "trec" / "minilm.yaml").read_text()
        resolved = run("recipes", "show", "trec/minilm", "--resolved").stdout
        assert yaml.safe_load(resolved) == json.loads(load_recipe("trec/minilm").model_dump_json())

    def test_copy_names_the_next_command_and_never_overwrites(self, tmp_path):
        target = tmp_path / "my recipe.yaml"
        found = run("recipes", "copy", "quickstart", target)
        assert found.stdout.endswith(f"tokmask train '{target}'\n")
        assert str(target) in mistake("recipes", "copy", "quickstart", target)
        assert load_recipe(target) == load_recipe("quickstart")
        assert run("recipes", "fields").stdout.splitlines() == field_help()


def test_a_folder_without_an_adapter_or_a_run(tmp_path):
    assert "sweep.json" in mistake("report", tmp_path)
    assert str(tmp_path) in mistake("evaluate", tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    assert "--resume" in mistake("evaluate", tmp_path)


class TestSweep:
    def test_every_problem_at_once(self):
        message = mistake("sweep", "quickstart", "--p", "0,2", "--grid", "trainng.epochs=1", "--arms", "x", "seed=1")
        assert message.startswith("Error: quickstart: 3 problems\n")
        assert "'training'" in message

    def test_dry_run_lists_the_runs_and_makes_nothing(self, tmp_path):
        found = run("sweep", "quickstart", f"output_dir={tmp_path}", "--p", "0,0.2", "--seeds", "2", "--dry-run")
        assert [line.split()[0] for line in found.stdout.splitlines()] == [
            f"p{p}-seed{seed}" for seed in (1, 2) for p in ("0", "0.2")
        ]
        assert list(tmp_path.iterdir()) == []

    def test_its_options_reach_the_runner(self, tmp_path, monkeypatch):
        from tokmask_peft.study.runner import Options

        given = []
        monkeypatch.setattr(
            "tokmask_peft.study.runner.run_sweep",
            lambda _, storage, options: given.append((storage, asdict(options))) or {},
        )
        monkeypatch.setattr("tokmask_peft.study.runner.closing_lines", lambda *_: [])
        options = ("--workers", "3", "--keep-checkpoints", "--prune", "--retry-failed", "--storage", "sqlite:///x")
        changes = {"workers": 3, "keep_checkpoints": True, "prune": True, "retry_failed": True}
        for more, expected in ((), (None, asdict(Options()))), (options, ("sqlite:///x", asdict(Options()) | changes)):
            run("sweep", "quickstart", f"output_dir={tmp_path}", "--p", "0,0.2", *more)
            assert given.pop() == expected

    def test_a_folder_that_is_a_run_s_and_a_storage_that_cannot_be_opened(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "recipe.yaml").touch()
        assert "--name" in mistake("sweep", "quickstart", f"output_dir={tmp_path}", "--name", "mine")
        pytest.importorskip("optuna")
        assert "--storage" in mistake("sweep", "quickstart", f"output_dir={tmp_path}", "--storage", "here")


class TestTrain:
    @pytest.mark.parametrize(("resume", "remedy"), [([], "--resume"), (["--resume"], "seed")])
    def test_a_name_that_is_taken(self, tmp_path, resume, remedy):
        (tmp_path / "mine").mkdir()
        overrides = [f"output_dir={tmp_path}", "name=mine"]
        (tmp_path / "mine" / "recipe.yaml").write_text(run("recipes", "show", "quickstart", "--resolved").stdout)
        assert remedy in mistake("train", "quickstart", *overrides, "seed=7", *resume)

    def test_a_bad_recipe_or_missing_data_leaves_no_run_behind(self, tmp_path, monkeypatch):
        assert "masking.p" in mistake("train", "quickstart", f"output_dir={tmp_path}", "masking.p=2")
        monkeypatch.delenv("TOKMASK_DATA", raising=False)
        assert "TOKMASK_DATA" in mistake("train", "trec/minilm", f"output_dir={tmp_path}")
        message = mistake("train", "trec/minilm", f"output_dir={tmp_path}", f"data.path={tmp_path}/nowhere")
        assert f"{tmp_path}/nowhere" in message
        assert list(tmp_path.iterdir()) == []


class TestExitCodes:
    def test_a_mistake_is_2_with_the_message_on_stderr(self):
        command = [sys.executable, "-m", "tokmask_peft", "validate", "quickstart", "masking.p=2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        assert "masking.p" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.usefixtures("in_terminal")
    def test_an_interruption_is_130(self):
        code = """
import os, signal, sys, tokmask_peft.recipe as recipe
from tokmask_peft.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
sys.argv = ["tokmask", "validate", "quickstart"]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    recipe.Recipe.load = lambda *_: os.kill(os.getpid(), number)
    try:
        main()
    except SystemExit as ended:
        print(ended.code)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == ("130\n" * 3, "Interrupted.\n" * 3)

    def test_a_reader_that_is_gone_is_130(self):
        code = f"{sys.executable} -m tokmask_peft recipes fields | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (130, "")

    def test_a_full_disk_is_2(self):
        command = [sys.executable, "-m", "tokmask_peft", "recipes", "fields"]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("Error: ")
        assert "free some space" in done.stderr

    def test_an_output_that_lacks_a_character_gets_it_as_json_writes_it(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        monkeypatch.setattr(sys, "argv", ["tokmask", "recipes", "fields", "report_to"])
        with pytest.raises(SystemExit) as done:
            main()
        echo("ñ😀")
        assert not done.value.code
        said = sys.stdout.buffer.getvalue().decode("ascii")
        assert "trackio, \\u2026" in said
        assert said.endswith("\\u00f1\\ud83d\\ude00\n")

    def test_what_nobody_expected_is_one_line_and_a_traceback_for_who_asks(self, monkeypatch):
        def fail(*_):
            raise KeyError("surprise")

        monkeypatch.setattr("tokmask_peft.recipe.schema.Recipe.load", fail)
        message = mistake("validate", "quickstart")
        assert "KeyError: 'surprise'" in message
        assert "TOKMASK_DEBUG=1" in message
        monkeypatch.setenv("TOKMASK_DEBUG", "1")
        assert "in fail" in run("validate", "quickstart").stderr
