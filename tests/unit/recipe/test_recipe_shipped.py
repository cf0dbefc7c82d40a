"""The shipped recipes, and what `tokmask recipes` does with them."""

import re
import shlex

import pytest

from tokmask_peft.errors import RecipeError
from tokmask_peft.recipe.loading import (
    SHIPPED,
    copy_recipe,
    differences,
    field_help,
    find_recipe,
    load_recipe,
    shipped_recipes,
    to_yaml,
)
from tokmask_peft.recipe.schema import all_fields

BACKBONES = {
    "mbert": "google-bert/bert-base-multilingual-cased",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
NER = ["ner_spaeng", "ner_hineng", "ner_msaea"]
TASKS = {"lid_spaeng": "token", "lid_nepeng": "token", "lid_hineng": "token", "sa_spaeng": "sequence"}
TASKS |= dict.fromkeys(NER, "token")
OFFLINE = ["lid_spaeng", "sa_spaeng", "melid_mareng", "mesent_mareng", "trec"]
OFFLINE += [f"afrisenti_{language}" for language in ("twi", "tso", "swa", "kin")]
ALL = [path.relative_to(SHIPPED).with_suffix("").as_posix() for path in sorted(SHIPPED.rglob("[!_]*.yaml"))]
ALL = [name for name in ALL if not name.startswith("_")]


def head(name):
    lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def test_every_backbone_has_every_task_and_minilm_runs_offline():
    assert shipped_recipes() == sorted(ALL)
    wanted = {f"{task}/{backbone}" for task in TASKS for backbone in BACKBONES} | {f"{task}/minilm" for task in OFFLINE}
    wanted |= {f"{task}/e5-small" for task in NER}
    others = {"quickstart", "sa_spaeng/mt5-small", "lid_spaeng/mt5-small", "trec/bart-base", "xnli_swa/e5-small"}
    assert wanted | others <= set(ALL)
    assert load_recipe("trec/bart-base").model.backbone == "facebook/bart-base"
    assert load_recipe("trec/bart-base").model.backbone_path is None


@pytest.mark.parametrize("name", ALL)
class TestEach:
    def test_loads_under_its_own_name(self, name):
        recipe = load_recipe(name)
        assert recipe.name == name.replace("/", "-")  # so no two have the same
        assert load_recipe(SHIPPED / f"{name}.yaml") == recipe

    def test_begins_with_its_command_and_what_it_needs(self, name):
        comment = head(name)
        assert len(comment) >= 3
        assert re.fullmatch(r"# [A-Z].+\.", comment[0])
        pattern = rf"#   (TOKMASK_DATA=FOLDER )?tokmask train recipes/{re.escape(name)}\.yaml"
        commands = [line for line in comment if re.fullmatch(pattern, line)]
        assert len(commands) == 1
        assert any(line.startswith("# Needs ") for line in comment)
        needs_folder = "${TOKMASK_DATA}" in (load_recipe(name).data.path or "")
        assert ("TOKMASK_DATA=FOLDER" in commands[0]) == needs_folder

    def test_its_copy_and_its_resolved_form_are_the_same_recipe(self, name, tmp_path):
        target = tmp_path / "new folder" / "mine.yaml"
        copy_recipe(name, target)
        assert load_recipe(target) == load_recipe(name)
        text = target.read_text(encoding="utf-8")
        assert f"tokmask train {shlex.quote(str(target))}\n" in text
        assert f"recipes/{name}" not in text
        target.write_text(to_yaml(load_recipe(name)), encoding="utf-8")
        assert load_recipe(target) == load_recipe(name)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("task", TASKS)
def test_hub_ids_and_tasks(backbone, task):
    recipe = load_recipe(f"{task}/{backbone}")
    assert recipe.model.backbone == BACKBONES[backbone]
    assert recipe.model.backbone_path is None
    assert recipe.data.task == TASKS[task]
    assert (recipe.data.hub, recipe.data.hub_revision) == ("lince-benchmark/lince", "refs/convert/parquet")
    assert recipe.data.validation == 0.1  # LinCE's test has no labels: its validation split scores
    assert recipe.data.test == "validation"
    config, other = recipe.data.hub_config, recipe.data.test_source
    if task == "lid_nepeng":
        assert (config, other.hub_config, other.hub_revision) == ("lid_spaeng", task, "refs/convert/parquet")
    else:
        assert (config, other) == (task, None)


@pytest.mark.parametrize("task", NER)
def test_entities_choose_the_checkpoint_and_are_not_among_languages(task):
    recipe = load_recipe(f"{task}/e5-small")
    assert (recipe.data.spans, recipe.training.best_metric) == ("bio", "f1_entities")
    assert (recipe.data.label_column, recipe.data.label_map, recipe.data.language_labels) == ("ner", None, ())


class TestFind:
    @pytest.mark.parametrize("given", ["trec/minilm", "trec/minilm.yaml", "recipes/trec/minilm.yaml"])
    def test_by_name_from_anywhere(self, given, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_recipe(given) == SHIPPED / "trec/minilm.yaml"

    def test_a_file_of_the_users_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "quickstart").write_text("name: mine")
        assert find_recipe("quickstart").resolve() == tmp_path / "quickstart"

    @pytest.mark.parametrize(
        ("given", "guess"),
        [("quickstrat", "quickstart"), ("lid_spaeng/mbret.yaml", "lid_spaeng/mbert"),
         ("recipes/trec", "trec/bart-base"), ("", None), ("xyzzy", None), ("_tasks/lid_spaeng", ""), ("a\0b", None)],
    )  # fmt: skip
    def test_what_there_is_not_gets_a_guess_if_it_is_near(self, given, guess):
        with pytest.raises(RecipeError, match=f"Did you mean '{guess}'" if guess else "no shipped recipe") as caught:
            find_recipe(given)
        assert caught.value.code == "no-such-recipe"

    def test_data_in_place_of_a_recipe(self, tmp_path):
        (tmp_path / "posts.csv").write_text("text,label\ngreat,good\n")
        with pytest.raises(RecipeError, match=r"tokmask init .*posts\.csv") as caught:
            load_recipe(tmp_path / "posts.csv")
        assert caught.value.code == "not-a-mapping"
        with pytest.raises(RecipeError, match=r"recipe of that name\. See"):  # a folder is no guess
            load_recipe(tmp_path)


class TestCopy:
    @pytest.mark.parametrize("place", ["mine.yaml", "mine.yaml/new.yaml"])
    def test_never_overwrites(self, tmp_path, place):
        (tmp_path / "mine.yaml").write_text("precious")
        with pytest.raises(RecipeError, match=r"mine\.yaml exists; choose another name or remove it") as caught:
            copy_recipe("quickstart", tmp_path / place)
        assert caught.value.code == "recipe-exists"
        assert (tmp_path / "mine.yaml").read_text() == "precious"

    def test_by_relative_path_and_of_the_users_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(SHIPPED.parent)
        copy_recipe("recipes/quickstart.yaml", tmp_path / "one.yaml")
        copy_recipe(tmp_path / "one.yaml", tmp_path / "two.yaml")
        assert load_recipe(tmp_path / "two.yaml") == load_recipe("quickstart")
        assert f"tokmask train {tmp_path / 'two.yaml'}" in (tmp_path / "two.yaml").read_text()
        (tmp_path / "posts.csv").touch()
        copy_recipe("quickstart", tmp_path / "three.yaml", ["data.path=posts.csv"])
        copy_recipe(tmp_path / "three.yaml", tmp_path / "sub" / "four.yaml")
        assert load_recipe(tmp_path / "sub" / "four.yaml").data.path == str(tmp_path / "posts.csv")


def test_differences_name_what_changed_and_not_where_it_lies():
    before = load_recipe("lid_spaeng/mbert")
    changes = ["name=again", "output_dir=elsewhere", "masking.p=0.2", "data.label_map=null", "training.patience=2"]
    after = load_recipe("lid_spaeng/mbert", [*changes, "training.baseline=false"])
    assert differences(before, before) == []
    found = differences(before, after)
    assert "masking.p: 0.1 before, 0.2 now" in found
    assert "training.patience: 'auto' before, 2 now" in found
    assert "data.label_map.lang1: 'lang1' before, null now" in found
    assert {line.split(".")[0].split(":")[0] for line in found} == {"masking", "training", "data"}
    assert not [line for line in found if "training.baseline" in line]


def test_every_key_is_explained_with_its_default_as_in_a_recipe():
    lines = field_help()
    assert [line.split(" (")[0] for line in lines] == [path for path, _ in all_fields()]
    assert [line for line in lines if not re.search(r"\): \w+", line)] == []
    for expected in ("name (required)", "training.baseline (default true)", "data.label_map (default null)"):
        assert expected in "\n".join(lines)
    assert "masking.protect (default [])" in "\n".join(lines)
    assert not re.search(r"default (None|True|False|\()", "\n".join(lines))
    assert all(line.endswith("]") for line in lines)


@pytest.mark.parametrize(
    ("wanted", "paths", "takes"),
    [
        ("quantization", ["model.quantization"], "['auto', 'nf4', 'int8' or 'none']"),
        ("MASKING.P_", ["masking.p_start"], "[a number (at least 0, below 1)]"),
        ("r-drop", ["training.views_masked"], None),
    ],
)
def test_fields_are_filtered_by_name_or_else_by_meaning(wanted, paths, takes):
    lines = field_help(wanted)
    assert [line.split(" (")[0] for line in lines][: len(paths)] == paths
    assert takes is None or lines[0].endswith(takes)


def test_a_filter_that_fits_nothing_names_the_nearest_key():
    with pytest.raises(RecipeError) as caught:
        field_help("learnin_rat")
    assert (caught.value.code, "learning_rate" in str(caught.value)) == ("no-such-field", True)


def test_e5_small_has_every_task_of_minilm_and_every_backbone_file_loads():
    for name in [name for name in ALL if name.endswith("/minilm")]:
        minilm, e5 = load_recipe(name), load_recipe(name.replace("minilm", "e5-small"))
        assert (e5.data, e5.adapter, e5.masking) == (minilm.data, minilm.adapter, minilm.masking)
        assert (e5.model.backbone, e5.model.backbone_path) == ("intfloat/multilingual-e5-small", None)
        assert (e5.training.epochs, e5.training.batch_size, e5.training.learning_rate) == ("auto", "auto", 5e-4)
    for path in (SHIPPED / "_backbones").glob("*.yaml"):
        found = load_recipe(path, ["name=x", "data.task=sequence", "data.builtin=true"])
        assert "/" in found.model.backbone
