"""Bases, overrides and YAML: what a recipe file turns into."""

import pytest
import yaml

from tokmask_peft.errors import RecipeError
from tokmask_peft.recipe.loading import load_recipe, to_yaml
from tokmask_peft.recipe.schema import Recipe

MINIMAL = {"name": "mine", "model": {"backbone": "some/model"}, "data": {"task": "sequence", "path": "texts"}}


def write(folder, name, content):
    """Write a recipe, given as YAML text or as a mapping laid over the minimal one."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def minimal(folder, *overrides, **more):
    return load_recipe(write(folder, "mine.yaml", {**MINIMAL, **more}), overrides)


def problems(call, *args):
    with pytest.raises(RecipeError) as caught:
        call(*args)
    return caught.value.problems


def test_a_path_that_is_not_here_is_looked_for_next_to_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    sources = {"path": "texts", "test_source": {"path": "texts"}}
    recipe = minimal(tmp_path / "there", data={"task": "sequence", **sources})
    assert recipe.data.path == recipe.data.test_source.path == str(tmp_path / "there" / "texts")
    (tmp_path / "texts").mkdir()
    assert load_recipe("there/mine.yaml").data.path == "texts"
    assert load_recipe("there/mine.yaml", ["data.path=nowhere"]).data.path == "nowhere"


class TestBases:
    def test_one_base_gives_what_the_recipe_leaves_out(self, tmp_path):
        write(tmp_path, "below/base.yaml", {"training": {"epochs": 3, "batch_size": 8}, "seed": 5})
        recipe = minimal(tmp_path, base="below/base.yaml", training={"epochs": 9})
        assert (recipe.training.epochs, recipe.training.batch_size, recipe.seed) == (9, 8, 5)

    def test_a_later_base_wins_over_an_earlier_one(self, tmp_path):
        write(tmp_path, "one.yaml", {"seed": 1, "training": {"epochs": 1}})
        write(tmp_path, "two.yaml", {"seed": 2, "training": {"batch_size": 2}})
        recipe = minimal(tmp_path, base=["one.yaml", "two.yaml"])
        assert (recipe.seed, recipe.training.epochs, recipe.training.batch_size) == (2, 1, 2)

    def test_bases_have_bases_named_from_their_own_folder(self, tmp_path):
        write(tmp_path, "a/ground.yaml", {"seed": 7, "training": {"epochs": 1}})
        write(tmp_path, "a/middle.yaml", {"base": "ground.yaml", "training": {"epochs": 2}})
        for base in ("a/middle.yaml", ["a/ground.yaml", "a/middle.yaml"]):  # one may be reached twice
            recipe = minimal(tmp_path, base=base)
            assert (recipe.seed, recipe.training.epochs) == (7, 2)

    @pytest.mark.parametrize("base", ["mine.yaml", "other.yaml"])
    def test_a_circle_is_an_error(self, tmp_path, base):
        write(tmp_path, "other.yaml", {"base": "mine.yaml"})
        (line,) = problems(lambda: minimal(tmp_path, base=base))
        assert line.startswith("base: the recipe is its own base")
        assert "mine.yaml -> " in line

    def test_all_missing_bases_are_named(self, tmp_path):
        lines = problems(lambda: minimal(tmp_path, base=["no.yaml", "neither.yaml"]))
        assert len(lines) == 2
        assert "no.yaml is not a file" in lines[0]
        assert "neither.yaml is not a file" in lines[1]

    def test_a_value_is_replaced_as_a_whole_also_by_null(self, tmp_path):
        data = {"label_map": {"lang1": "en", "*": "other"}, "test": "dev", "max_length": 40}
        write(tmp_path, "base.yaml", {"data": data})
        recipe = minimal(tmp_path, base="base.yaml", data={**MINIMAL["data"], "label_map": {"b": "c"}, "test": None})
        assert (recipe.data.label_map, recipe.data.test, recipe.data.max_length) == ({"b": "c"}, None, 40)


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "place", "value"),
        [
            ("training.learning_rate=5e-4", "training.learning_rate", 5e-4),
            ("training.learning_rate=5.0e-4", "training.learning_rate", 5e-4),
            ("data.validation=5e-2", "data.validation", 0.05),
            ("data.validation=.1", "data.validation", 0.1),
            ("data.validation=dev", "data.validation", "dev"),
            ("data.path=/a/b=c/d.csv", "data.path", "/a/b=c/d.csv"),
            ("data.path=C:\\texts", "data.path", "C:\\texts"),
            ("data.path=[draft", "data.path", "[draft"),
            ("data.test=null", "data.test", None),
            ("data.test=no", "data.test", "no"),
            *((f"data.separator={mark}", "data.separator", mark) for mark in "|-?#:*"),
            ("data.hub_config=2024-01-01", "data.hub_config", "2024-01-01"),
            ("data.label_map={no: yes, on: off}", "data.label_map", {"no": "yes", "on": "off"}),
            ("adapter.targets=[q_proj, v_proj]", "adapter.targets", ("q_proj", "v_proj")),
            ("masking.mask_token=103", "masking.mask_token", 103),
            ("training.baseline=false", "training.baseline", False),
            ("training.class_weights.en=2", "training.class_weights", {"en": 2.0}),
            ("data.test_source.path=there", "data.test_source.path", "there"),
            (" name =x", "name", "x"),
            ('name="5"', "name", "5"),
        ],
    )
    def test_values_are_read_as_yaml(self, tmp_path, override, place, value):
        found = minimal(tmp_path, override)
        for key in place.split("."):
            found = getattr(found, key)
        assert found == value
        assert type(found) is type(value)

    def test_the_last_override_of_a_key_wins_and_neighbours_stay(self, tmp_path):
        recipe = minimal(tmp_path, "training.epochs=2", "training.epochs=3", training={"batch_size": 4})
        assert (recipe.training.epochs, recipe.training.batch_size) == (3, 4)

    @pytest.mark.parametrize(
        ("override", "problem"),
        [
            *((text, "expected dotted.key=value, for example training.epochs=3")
              for text in ("training.epochs", "=3", "training..epochs=3", ".=1")),
            ("data.path.x=3", "'path' is a single value, with no keys below it"),
            ("base=quickstart.yaml", "a base can only be named in the recipe file"),
        ],
    )  # fmt: skip
    def test_what_is_not_an_override(self, tmp_path, override, problem):
        assert problems(minimal, tmp_path, override) == [f"{override}: {problem}"]


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("name: a\nmasking:\n  p: 0.1\n  p: 0.2\n", "line 4, column 3: the key 'p' is given twice"),
            ("name: a\nname: a\n", "line 2, column 1: the key 'name' is given twice"),
            ("a: 1\nb: [\n", "line 3, column 1"),
            ("[a, b]: c\n", "line 1, column 1: a key must be a single value"),
            ("a: !!python/object:os.system x\n", "line 1, column 4"),
            ("- a\n- b\n", "expected keys with values"),
            ("just text\n", "but the file is 'just text'"),
            ("seed: 0x_\n", "invalid literal"),
            ("a: \x01\n", "special characters are not allowed"),
        ],
    )
    def test_what_cannot_be_read_is_said_in_one_line(self, tmp_path, text, said):
        write(tmp_path, "bad.yaml", text)
        with pytest.raises(RecipeError, match=r"^\S*bad\.yaml: 1 problem") as caught:  # also if it is a base
            minimal(tmp_path, base="bad.yaml")
        (line,) = caught.value.problems
        assert said in line
        assert "\n" not in line

    def test_a_file_in_another_encoding(self, tmp_path):
        path = tmp_path / "latin.yaml"
        path.write_bytes("name: señal".encode("latin-1"))
        assert problems(load_recipe, path) == ["is not UTF-8 text (byte 8); save it as UTF-8"]

    def test_anchors_and_merge_keys_work(self, tmp_path):
        text = yaml.safe_dump({**MINIMAL, "masking": {"p": 0.2}})
        text = text.replace("masking:\n", "masking: &shared\n") + "training: {<<: {epochs: 2}, batch_size: 4}\n"
        recipe = load_recipe(write(tmp_path, "anchors.yaml", text))
        assert (recipe.masking.p, recipe.training.epochs, recipe.training.batch_size) == (0.2, 2, 4)

    @pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
    def test_an_empty_file_misses_what_is_required(self, tmp_path, text):
        lines = problems(load_recipe, write(tmp_path, "empty.yaml", text))
        assert [line.split(":")[0] for line in lines] == ["name", "model", "data"]

    def test_a_byte_order_mark_is_not_a_problem(self, tmp_path):
        assert load_recipe(write(tmp_path, "bom.yaml", "\ufeff" + yaml.safe_dump(MINIMAL))).name == "mine"


def test_what_is_written_out_reads_back_equal(tmp_path):
    recipe = minimal(
        tmp_path,
        seed=7,
        data={
            "task": "token",
            "path": "${HOME}/ñandú: x # y",
            "validation": 0.05,
            "label_map": {"no": "yes", "1": "true", "*": "other", "null": "~"},
            "test_source": {"hub": "a/b", "label_column": 3},
        },
        masking={"mask_token": 5, "protect": [1, 2], "schedule": "warmup"},
        training={"learning_rate": 1e-5, "class_weights": {"no": 1.0, "2024-01-01": 0.5}, "report_to": ["wandb"]},
    )
    again = load_recipe(write(tmp_path, "again.yaml", to_yaml(recipe)))
    assert again == recipe
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert to_yaml(again) == to_yaml(recipe)


class TestFactsForTheCard:
    def test_norwegian_is_a_language_and_not_a_switch(self, tmp_path):
        content = "name: m\nmodel: {backbone: a/b}\ndata: {task: token, path: x, language: [no, es]}\n"
        assert load_recipe(write(tmp_path, "mine.yaml", content)).data.language == ("no", "es")

    def test_a_language_is_given_by_its_code(self, tmp_path):
        expected = "expected an ISO 639 code such as es or swa"
        assert problems(minimal, tmp_path, "data.language=[es, english, true]") == [
            f"data.language[1]: is 'english'; {expected}",
            f"data.language[2]: is true; {expected}",
        ]

    def test_the_test_source_has_facts_of_its_own(self, tmp_path):
        source = {"path": "y", "name": "Nepali", "language": ["ne", "en"], "license": "CC0", "citation": "A. Author"}
        data = minimal(tmp_path, data={**MINIMAL["data"], "language": ["es"], "test_source": source}).data
        assert (data.language, data.test_source.language, data.test_source.name) == (("es",), ("ne", "en"), "Nepali")


HOSTILE = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "itself": "name: &name [*name]\n",
    "brackets": f"name: {'[' * 3000}{']' * 3000}\n",
    "mappings": f"name: {'{a: ' * 3000}{'}' * 3000}\n",
    "unknown keys": "".join(f"epoch{n}: 1\n" for n in range(20_000)),
    "a long key": f"{'epochs' * 20_000}: 1\n",
    "a long value": f"data: {{task: {'sequence' * 20_000}}}\n",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recipe_is_refused_soon_and_briefly(tmp_path, text):
    lines = problems(load_recipe, write(tmp_path, "mine.yaml", text))
    assert len(lines) < 150


@pytest.mark.timeout(20)
def test_many_bases(tmp_path):
    for number in range(18):  # each twice the base of the next: 2 ** 18 readings without a memory
        write(tmp_path, f"base{number}.yaml", {"base": [f"base{number + 1}.yaml"] * 2})
    write(tmp_path, "base18.yaml", {"seed": 7})
    assert minimal(tmp_path, base="base0.yaml").seed == 7
    for number in range(2000):
        write(tmp_path, f"base{number}.yaml", {"base": f"base{number + 1}.yaml"})
    with pytest.raises(RecipeError) as caught:
        minimal(tmp_path, base="base0.yaml")
    assert caught.value.code == "deep-base"
