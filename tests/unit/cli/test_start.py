"""`tokmask init`, `tokmask train FILE`, `validate --data`: what is decided, asked, written and refused."""

import io
import itertools
import os
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import mistake, run
from tiny_models import build

from tokmask_peft.cli import start
from tokmask_peft.recipe.loading import load_recipe, override
from tokmask_peft.recipe.schema import ModelConfig

MOODS = {"positive": "bueno lindo great nice", "negative": "malo feo bad sad", "neutral": "ok meh today hoy"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    model, tokenizer = build("bert")
    folder = tmp_path_factory.mktemp("tiny")
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def posts(tmp_path, monkeypatch):
    """60 posts, in the working directory."""
    monkeypatch.chdir(tmp_path)
    words = [(label, word) for label, text in MOODS.items() for word in text.split()]
    rows = [
        f"{at};la casa {word} number {at} qué;{label}" for at, (label, word) in zip(range(60), itertools.cycle(words))
    ]
    (tmp_path / "posts.csv").write_text("\n".join(["id;tweet;mood", *rows]) + "\n", encoding="utf-8")
    return tmp_path / "posts.csv"


@pytest.fixture
def without_memory(monkeypatch):
    """Leave out the estimate, which takes seconds."""
    monkeypatch.setattr(start, "_memory", lambda recipe: ())


def init(*arguments, backbone):
    return run("init", *arguments, "--backbone", backbone, "--yes")


class TestInit:
    def test_the_recipe_gives_reasons_and_works_from_any_folder(self, posts, backbone, monkeypatch):
        found = init("posts.csv", "data.label_map={neutral: other}", "training.patience=3", backbone=backbone)
        assert found.exit_code == 0, found.output
        assert found.stdout.endswith("posts.yaml is yours to edit. Next: tokmask train posts.yaml\n")
        for decided in (
            "data.text_column",
            "data.label_column",
            "data.validation",
            "model.backbone",
            "training.epochs",
        ):
            assert decided in found.stdout
        text = (posts.parent / "posts.yaml").read_text(encoding="utf-8")
        assert "path: posts.csv\n" in text
        assert all(
            "  # " in text.split(key)[0].splitlines()[-1] + text.split(key)[1].splitlines()[0]
            for key in ("\n  text_column:", "\n  label_column:", "\n  validation:")
        )
        monkeypatch.chdir("/")
        recipe = load_recipe(posts.parent / "posts.yaml")
        assert recipe.data.path == str(posts)
        assert (recipe.data.task, recipe.data.text_column, recipe.data.label_column) == ("sequence", "tweet", "mood")
        assert (recipe.data.separator, recipe.data.validation, recipe.data.test) == (";", 0.2, None)
        assert (recipe.data.label_map, recipe.training.patience) == ({"neutral": "other"}, 3)
        assert recipe.model.backbone == str(backbone)

    @pytest.mark.usefixtures("without_memory")
    def test_it_is_never_overwritten_and_no_run_s_name_is_taken(self, posts, backbone):
        (posts.parent / "runs" / "posts").mkdir(parents=True)
        assert init("posts.csv", backbone=backbone).exit_code == 0
        assert yaml.safe_load((posts.parent / "posts.yaml").read_text())["name"] == "posts-2"
        assert "posts.yaml exists" in mistake("init", "posts.csv", "--backbone", backbone, "--yes")
        assert init("posts.csv", "--out", "there/mine.yaml", backbone=backbone).exit_code == 0
        assert load_recipe(posts.parent / "there" / "mine.yaml").data.path == str(posts)
        (posts.parent / "there" / "test.csv").write_text("id;tweet\n1;hola\n")
        posts.rename(posts.parent / "there" / "train.csv")
        assert init("there", "--out", "there/all.yaml", backbone=backbone).exit_code == 0
        assert load_recipe(posts.parent / "there" / "all.yaml").data.path == str(posts.parent / "there")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["nope.csv"], "'nope.csv' does not exist"),
            (["nope/posts.cvs"], "'nope/posts.cvs' does not exist"),
            (["folder/posts"], "'folder/posts' does not exist"),
            (["nope/posts", "posts.csv"], "'nope/posts' does not exist"),
            (["nope/posts"], "cannot be reached"),  # an id of the Hub
            (["data.hub=nope"], "cannot be reached"),
            (["posts.csv", "data.text_colum=tweet", "adapter.r=0"], "2 problems"),
            (["posts.csv", "data=3"], "data"),
            (["posts.csv", "data.text_column=twet"], "Did you mean 'tweet'?"),
            (["empty.csv"], "empty"),
            (["folder"], "no file"),
            (["posts.csv", "folder"], "not both"),
            (["data.task=token"], "name a data file"),
            (["data.hub=null"], "name a data file"),
            (["posts.csv", "--out", "posts.csv"], "exists"),
            (["empty.csv", "--out", "posts.csv/new.yaml"], "Not a directory"),
            (["posts.csv", "data.path=other.csv"], "the FILE and data.path name different data"),
            (["data.hub=a/b", "data.builtin=true"], "data.hub and data.builtin name different data"),
            (["posts.csv", "--backbone", "a", "model.backbone=b"], "give one of them"),
        ],
    )
    def test_mistakes(self, posts, arguments, said):
        (posts.parent / "empty.csv").touch()
        (posts.parent / "folder").mkdir()
        assert said in mistake("init", *arguments, "--yes")
        assert not list(posts.parent.glob("*.yaml"))

    @pytest.mark.usefixtures("without_memory")
    def test_reasons_are_true_and_never_break_the_file(self, posts, backbone, monkeypatch):
        text = posts.read_text(encoding="utf-8").replace("casa bueno", "casa\x92s\u2028\x07\uffff bueno")
        posts.write_text(text.replace(";", "\t"), encoding="utf-8")
        keys = ["data.language=[es]", "training.epochs=3", "data.separator=\\t"]
        found = init("posts.csv", *keys, "--out", "a\nb.yaml", backbone=os.path.relpath(backbone))
        assert found.exit_code == 0, found.output
        monkeypatch.chdir("/")
        recipe = load_recipe(posts.parent / "a\nb.yaml")
        assert os.path.normpath(recipe.model.backbone) == str(backbone)
        assert (recipe.data.language, recipe.training.epochs, recipe.data.separator) == (("es",), 3, "tab")
        assert not re.search(r"data\.language|training\.epochs", found.stdout)

    @pytest.mark.usefixtures("without_memory")
    def test_a_person_is_asked_only_if_one_is_there_and_it_is_not_sure(self, posts, backbone, monkeypatch):
        text = posts.read_text(encoding="utf-8").replace("e\n", "e;a\n").replace("l\n", "l;b\n")
        posts.write_text(text.replace("mood", "first;second"), encoding="utf-8")
        asked = []
        monkeypatch.setattr(start, "_ask", lambda key, question, answers: asked.append(key) or list(answers)[-1])
        assert run("init", "posts.csv", "--backbone", backbone, "--out", "no-terminal.yaml").exit_code == 0
        monkeypatch.setattr(start, "is_terminal", lambda: True)
        assert init("posts.csv", "--out", "yes.yaml", backbone=backbone).exit_code == 0
        assert asked == []
        assert run("init", "posts.csv", "--backbone", backbone, "--out", "asked.yaml").exit_code == 0
        assert asked == ["data.label_column"]
        columns = [load_recipe(f"{name}.yaml").data.label_column for name in ("no-terminal", "yes", "asked")]
        assert columns == ["second", "second", "first"]

    def test_the_answer_is_a_number(self, monkeypatch, capsys):
        answers = iter(["7", "2"])
        monkeypatch.setattr("rich.prompt.Prompt.get_input", lambda *_, **__: next(answers))
        monkeypatch.setattr("builtins.input", lambda *_: next(answers))
        assert start._ask("data.label_column", "Which?", {"mood": "good, bad", "tone": "high"}) == "tone"
        assert "2  tone: high" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"text": "a", "label": "b"}]', True),
        ("a.tagged", "la/es house/en\n", True),
        ("a.labelled", "1 la casa\n", True),
        ("a.csv.gz", "", True),
        ("train.dat", "text\tlabel\nla casa\tname: x\n", True),
        ("posts", "la\tes\nhouse\ten\n", True),
        ("a.yaml", "text,label\n", False),
        ("mine", "# A recipe.\nbase: ../b.yaml\nname: mine\n", False),
        ("nothing.csv/recipe.yaml", "name: a\n", False),
    ],
)
def test_what_is_data_and_what_a_recipe(tmp_path, name, content, expected):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert start.is_data(str(path)) is expected
    assert start.is_data(str(path.parent)) is ("/" not in name)
    assert not start.is_data(str(tmp_path / "nope.csv"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/posts", True),
        ("user/posts-v1.5", True),
        ("user/posts.csv", False),
        ("user/posts/more", False),
        ("folder/posts", False),
        ("./posts", False),
        ("trec/minilm", False),
        ("trec/minlm", False),
        ("trecs/minilm", False),
        ("recipes/posts", False),
    ],
)
def test_what_is_an_id_of_the_hub(tmp_path, monkeypatch, name, expected):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert start.is_data(name) is expected


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not start.is_data("quickstart")
    assert start.is_data("./quickstart")


@pytest.mark.parametrize(
    ("gpu", "english", "words_given", "expected"),
    [
        (False, True, False, start.MINILM),
        (False, False, False, start.E5),
        (False, False, True, start.E5),
        (True, True, False, start.QWEN),
        (True, False, True, start.MBERT),
        ("no kernels for it", True, False, start.MINILM),
    ],
)
def test_the_backbone_suits_language_and_hardware(monkeypatch, gpu, english, words_given, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu is not False)
    monkeypatch.setattr("tokmask_peft.model.decisions.gpu_problem", lambda: gpu if isinstance(gpu, str) else None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(start, "_at_hand", lambda config: False)
    model, cost, decision = start._choose_backbone({}, [], english, words_given, ["la casa"])
    assert (model["backbone"], cost, decision.choice) == (expected, None, expected)
    assert "downloads" in decision.reason
    assert (str(gpu) if isinstance(gpu, str) else "GPU is here") in decision.reason


def test_of_the_named_backbones_the_one_with_the_fewest_sub_tokens(monkeypatch, backbone):
    costs = {
        "many": start._Cost(3.0, 0.0, [9]),
        "unknown": start._Cost(1.0, 0.5, [9]),
        "few": start._Cost(2.0, 0.0, [9]),
    }
    monkeypatch.setattr(start, "_cost", lambda config, texts: costs[config.backbone])
    model, cost, decision = start._choose_backbone({"precision": "fp32"}, list(costs), True, False, [])
    assert (model, str(cost)) == ({"backbone": "few", "precision": "fp32"}, "2.00")
    assert "unknown 1.00 (50% unknown)" in decision.reason


class TestBackbones:
    @pytest.mark.usefixtures("without_memory")
    def test_a_path_does_not_say_which_backbone_it_is(self, posts, backbone):
        said = mistake("init", "posts.csv", f"model.backbone_path={backbone}", "--yes")
        assert f"model.backbone={backbone}" in said
        assert run("init", "posts.csv", f"model.backbone={backbone}", f"model.backbone_path={backbone}").exit_code == 0

    def test_a_gguf_file_on_the_hub_is_looked_up_by_its_repository(self, monkeypatch):
        asked = []
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given, **_: asked.append(given))
        monkeypatch.setattr("tokmask_peft.model.location.require", lambda *_: None)
        assert not start._at_hand(ModelConfig(backbone="owner/models/a.Q4.gguf"))
        assert asked == [("owner/models", "a.Q4.gguf")]
        monkeypatch.undo()
        assert not start._at_hand(ModelConfig(backbone="owner/models/more/a.gguf/b"))


@pytest.mark.parametrize(("processes", "expected"), [(None, True), ("1", True), ("2", False)])
def test_nobody_is_asked_by_several_processes(monkeypatch, processes, expected):
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{name}.isatty", lambda: True, raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert start.is_terminal() is expected


@pytest.mark.usefixtures("without_memory")
def test_several_label_columns_say_the_task(tmp_path, backbone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"la casa {at} azul,{at % 2},{at % 3 % 2}\n" for at in range(40)]
    (tmp_path / "a.csv").write_text("text,joy,anger\n" + "".join(rows))
    assert init("a.csv", "data.label_column=[joy, anger]", backbone=backbone).exit_code == 0
    assert load_recipe("a.yaml").data.task == "multilabel"


@pytest.mark.usefixtures("without_memory")
def test_a_key_of_one_task_says_the_task(tmp_path, backbone, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"la casa {at} azul\t{'joy;fear' if at % 3 else 'joy'}\n" for at in range(40)]
    (tmp_path / "a.tsv").write_text("text\tlabels\n" + "".join(rows))
    assert init("a.tsv", "data.label_separator=;", backbone=backbone).exit_code == 0
    assert load_recipe("a.yaml").data.task == "multilabel"
    (tmp_path / "b.conll").write_text("".join(f"la{at}\tes\nhouse{at}\ten\n\n" for at in range(40)))
    assert init("b.conll", "data.label_on=last", backbone=backbone).exit_code == 0
    assert load_recipe("b.yaml").data.task == "token"


class TestValidate:
    def test_data_are_read_if_asked(self, posts, backbone):
        init("posts.csv", backbone=backbone)
        found = run("validate", "posts.yaml", "--data", "data.max_length=6")
        assert found.exit_code == 0, found.output
        assert "train: 48 texts" in found.stdout
        assert "train: 48 texts are longer than 6 sub-tokens" in found.stdout
        assert "'moods'" in mistake("validate", "posts.yaml", "--data", "data.label_column=moods")


def test_copy_takes_overrides(tmp_path):
    target = tmp_path / "mine.yaml"
    assert run("recipes", "copy", "quickstart", target, "name=mine", "data.path=posts.csv").exit_code == 0
    assert load_recipe(target) == load_recipe("quickstart", ["name=mine", "data.path=posts.csv"])
    assert "1 problem" in mistake("recipes", "copy", "quickstart", tmp_path / "other.yaml", "nmae=mine")
    assert not (tmp_path / "other.yaml").exists()


@given(
    st.text() | st.dictionaries(st.text(), st.text()) | st.sampled_from(["no", "1", "=", "2024-01-01", "\x85", " #"])
)
@settings(max_examples=50, deadline=None)
def test_whatever_a_label_or_a_path_is_the_recipe_holds_it(value):
    assert override(content := {}, [f"x={start._inline({'y': value})}"]) == []
    assert content == {"x": {"y": value}}


def test_the_end_of_input_at_a_question_is_ctrl_c(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        start._ask("data.task", "Which?", {"sequence": "", "token": ""})
