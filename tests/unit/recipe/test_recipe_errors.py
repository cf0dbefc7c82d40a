"""A mistake gives one line: dotted path, value found, what was expected, nearest name, remedy."""

import pytest

from tokmask_peft.errors import RecipeError, nearest
from tokmask_peft.recipe.loading import load_recipe


def problems(*overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", overrides)
    return caught.value.problems


ONE_LINE = {
    "masking.mask_token=foo": "is 'foo'; expected 'auto', 'mask', 'spare', 'unk' or a token id",
    "masking.mask_token=mas": "is 'mas'; expected 'auto', 'mask', 'spare', 'unk' or a token id. Did you mean 'mask'?",
    "masking.mask_token=-3": "is -3; expected 'auto', 'mask', 'spare', 'unk' or a token id",
    "masking.mask_token=true": "is true; expected 'auto', 'mask', 'spare', 'unk' or a token id",
    "masking.p=1": "is 1; expected a number (at least 0, below 1)",
    "masking.p=.nan": "is nan; expected a number (at least 0, below 1)",
    "masking.protect=5": "is 5; expected a list such as [a, b]",
    "training.class_weights=sqrt": "is 'sqrt'; expected 'none', 'inverse', 'sqrt_inverse' or a weight per label, "
    "as {en: 1.0, es: 2.0}. Did you mean 'sqrt_inverse'?",
    "adapter.targets=all": "is 'all'; expected 'auto' or a list of module names, for example [q_proj, v_proj]",
    "adapter.targets=[]": "is []; expected 'auto' or a list of module names, for example [q_proj, v_proj]",
    "adapter.layers=half": "is 'half'; expected 'all', a number of layers, for example 6 or a share of the layers "
    "between 0 and 1, for example 0.5",
    "adapter.layers=0": "is 0; expected 'all', a number of layers, for example 6 or a share of the layers "
    "between 0 and 1, for example 0.5",
    "data.validation=[1]": "is [1]; expected a split or file name or a share of train between 0 and 1, for example 0.1",
    "data.validation=2": "is 2; expected a split or file name or a share of train between 0 and 1, for example 0.1",
    "data.validation=0.0": "is 0.0; expected a split or file name or a share of train between 0 and 1, for example 0.1",
    "data.validation=true": "is true; expected a split or file name or a share of train between 0 and 1, "
    "for example 0.1",
    "data.task=seq": "is 'seq'; expected 'sequence' or 'token'. Did you mean 'sequence'?",
    "data.text_column=1.5": "is 1.5; expected text, a whole number or null",
    "data.test_source=foo": "is 'foo'; expected a section with keys such as path, hub, hub_config, hub_revision",
    "adapter.r=8.5": "is 8.5; expected a whole number (at least 1)",
    "adapter.r=true": "is true; expected a whole number (at least 1)",
    "training.learning_rate=.inf": "is inf; expected a number (above 0)",
    "training.max_steps=0": "is 0; expected a whole number (at least 1) or null",
    "training=3": "is 3; expected a section with keys such as epochs, max_steps, batch_size, gradient_accumulation",
    "training=null": "is null; expected a section with keys such as epochs, max_steps, batch_size, "
    "gradient_accumulation",
    "model.gradient_checkpointing=yes": "is 'yes'; expected 'auto' or true or false",
    "name=5": "is 5; expected text: put it in quotes",
    "model.revision=123": "is 123; expected text or null: put it in quotes",
    "data.test=false": "is false; expected text or null: put it in quotes",
    "data.label_map=[1]": "is [1]; expected a mapping such as {a: b} or null",
}


@pytest.mark.parametrize("override", ONE_LINE)
def test_a_wrong_value_makes_one_line(override):
    assert problems(override) == [f"{override.partition('=')[0]}: {ONE_LINE[override]}"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("training.class_weights={en: x, es: 1}", "training.class_weights.en: is 'x'; expected a number (at least 0)"),
        ("training.class_weights={en: -1}", "training.class_weights.en: is -1; expected a number (at least 0)"),
        ("training.class_weights={1: 2}", "training.class_weights: the key 1 is not text: put it in quotes"),
        ("data.label_map={true: x}", "data.label_map: the key true is not text: put it in quotes"),
        ("data.label_map={a: false}", "data.label_map.a: is false; expected text: put it in quotes"),
        ("data.language_labels=[en, 1]", "data.language_labels[1]: is 1; expected text: put it in quotes"),
        ("masking.protect=[a]", "masking.protect[0]: is 'a'; expected a token id"),
        ("data.test_source={hub: 3}", "data.test_source.hub: is 3; expected text or null: put it in quotes"),
    ],
)
def test_inside_a_value_the_place_is_named(override, line):
    assert problems(override) == [line]


@pytest.mark.parametrize(
    ("override", "guess", "known"),
    [
        ("training.learning_rat=1", "learning_rate", "epochs, max_steps, batch_size"),
        ("train.epochs=1", "training", "name, output_dir, seed, model, adapter, masking, data, training"),
        ("learning_rate=1", "training.learning_rate", "name, output_dir, seed"),
        ("data.test_source.hubb=x", "hub", "path, hub, hub_config"),
        ("masking.rank=3", None, "p, schedule, p_start"),
    ],
)
def test_an_unknown_key_lists_its_siblings(override, guess, known):
    line = problems(override)[0]
    assert line.startswith(f"{'train' if override.startswith('train.') else override.partition('=')[0]}: unknown key.")
    assert (f"Did you mean '{guess}'?" in line) if guess else ("Did you mean" not in line)
    assert f"Known here: {known}" in line


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (("masking.trainable_mask=true", "adapter.layers=2"), "masking.trainable_mask trains a row of the embedding"),
    ],
)
def test_what_does_not_go_together(overrides, start):
    (line,) = problems(*overrides)
    assert start in line
    assert "set " in line


def test_a_key_that_is_no_text(tmp_path):
    path = tmp_path / "on.yaml"
    path.write_text("true: 1\nname: a\nmodel: {backbone: b}\ndata: {task: token, path: c}\n")
    with pytest.raises(RecipeError, match=r"unknown key, and not text\. Known here: name, output_dir"):
        load_recipe(path)


def test_all_problems_come_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("data: {task: tokens, max_length: 1}\nadapter: {rank: 8}\nmasking: {p: 1.5, mask_token: x}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["training", "training.epochs=no"])
    lines = caught.value.problems
    starts = ["training: expected dotted", "name: is missing", "model: is missing", "adapter.rank: unknown key"]
    starts += ["masking.p: is 1.5", "masking.mask_token: is 'x'", "data.task: is 'tokens'", "data.max_length: is 1"]
    starts += ["training.epochs: is 'no'"]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert str(caught.value).splitlines()[0] == f"{path}: 9 problems"


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", "."])
def test_a_name_that_is_no_folder(name):
    assert problems(f"name={name}") == [
        f"name: is {name!r}; the name becomes a folder: letters, digits, '.', '_' and '-' are safe, a slash is not"
    ]


@pytest.mark.parametrize(
    ("override", "section"), [("data.builtin=false", "data"), ("data.test_source={}", "data.test_source")]
)
def test_a_source_without_data(override, section):
    assert problems(override) == [
        f"{section}: no data: set path to a local folder or file, hub to a dataset id, or builtin to true in this "
        "section"
    ]


def test_a_long_value_is_shortened():
    (line,) = problems(f"adapter.r={'x' * 500}")
    assert len(line) < 120


def test_descriptions_help_with_what_is_missing(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmodel: {}\ndata: {path: y}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.problems == [
        "model.backbone: is missing; expected text (model id on the Hugging Face Hub, or a local folder)",
        "data.task: is missing; expected 'sequence' or 'token' (sequence: one label per text; token: one label per "
        "word)",
    ]


@pytest.mark.parametrize(
    ("name", "guess"),
    [("quickstrat", "quickstart"), ("seq", "sequence"), ("rank", None), ("", None), ("sequence", "sequence")],
)
def test_the_nearest_name(name, guess):
    said = nearest(name, iter(["dora", "quickstart", "sequence"]))
    assert said == (f" Did you mean '{guess}'?" if guess else "")
