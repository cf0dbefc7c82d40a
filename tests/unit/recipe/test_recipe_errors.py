"""A mistake gives one line: dotted path, value found, what was expected, nearest name, remedy."""

import pytest

from tokmask_peft.errors import RecipeError, nearest
from tokmask_peft.recipe.loading import load_recipe


def problems(*overrides, recipe="quickstart"):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return caught.value.problems


TOKEN = "expected 'auto', 'mask', 'spare', 'unk' or a token id"
RATE, LEAST_1 = "expected a number (at least 0, below 1)", "expected a whole number (at least 1)"
WEIGHTS = "expected 'none', 'inverse', 'sqrt_inverse' or a weight per label, as {en: 1.0, es: 2.0}"
MODULES = "expected 'auto' or a list of module names, for example [q_proj, v_proj]"
LAYERS = "expected 'all', a number of layers, for example 6 or a share of the layers between 0 and 1, for example 0.5"
SPLIT = "expected a split or file name or a share of train between 0 and 1, for example 0.1"
TRAINING = "expected a section with keys such as epochs, max_steps, batch_size, gradient_accumulation"
ONE_LINE = {
    "masking.mask_token=foo": f"is 'foo'; {TOKEN}",
    "masking.mask_token=mas": f"is 'mas'; {TOKEN}. Did you mean 'mask'?",
    "masking.mask_token=true": f"is true; {TOKEN}",
    "masking.p=1": f"is 1; {RATE}",
    "masking.p=.nan": f"is nan; {RATE}",
    "masking.protect=5": "is 5; expected a list such as [a, b]",
    "training.class_weights=sqrt": f"is 'sqrt'; {WEIGHTS}. Did you mean 'sqrt_inverse'?",
    "adapter.targets=[]": f"is []; {MODULES}",
    "adapter.layers=half": f"is 'half'; {LAYERS}",
    "adapter.layers=0": f"is 0; {LAYERS}",
    "data.validation=[1]": f"is [1]; {SPLIT}",
    "data.validation=2": f"is 2; {SPLIT}",
    "data.validation=0.0": f"is 0.0; {SPLIT}",
    "data.task=seq": "is 'seq'; expected 'sequence', 'token' or 'multilabel'. Did you mean 'sequence'?",
    "data.text_column=1.5": "is 1.5; expected text, a whole number, a list of two columns, as [premise, hypothesis] or "
    "null",
    "data.test_source=foo": "is 'foo'; expected a section with keys such as path, hub, hub_config, hub_revision",
    "adapter.r=true": f"is true; {LEAST_1}",
    "training.learning_rate=.inf": "is inf; expected a number (above 0)",
    "training.max_steps=0": f"is 0; {LEAST_1} or null",
    "training=3": f"is 3; {TRAINING}",
    "model.gradient_checkpointing=yes": "is 'yes'; expected 'auto' or true or false",
    f"adapter.r={'x' * 500}": f"is '{'x' * 56}…; {LEAST_1}",
    "name=5": "is 5; expected text: put it in quotes",
    "model.revision=123": "is 123; expected text or null: put it in quotes",
    "data.label_map=[1]": "is [1]; expected a mapping such as {a: b} or null",
}


@pytest.mark.parametrize("override", ONE_LINE)
def test_a_wrong_value_makes_one_line(override):
    assert problems(override) == [f"{override.partition('=')[0]}: {ONE_LINE[override]}"]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.quantization=4bit", "nf4"),
        ("model.quantization=false", "none"),
        ("model.quantization=8-bit", "int8"),
        ("model.embedding=int8", "8bit"),
        ("model.precision=float16", "fp16"),
        ("training.class_weights=balanced", "inverse"),
        ("data.task=NER", "token"),
    ],
)
def test_a_value_that_others_use_leads_to_the_one_here(override, meant):
    (line,) = problems(override)
    assert line.endswith(f"Did you mean '{meant}'?")


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


def test_what_does_not_go_together():
    (line,) = problems("masking.trainable_mask=true", "adapter.layers=2")
    assert "masking.trainable_mask trains a row of the embedding" in line
    assert "set " in line


def test_all_problems_come_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "true: 1\ndata: {task: tokens, max_length: 1}\nadapter: {rank: 8}\nmasking: {p: 1.5, mask_token: x}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["training", "training.epochs=no"])
    lines = caught.value.problems
    starts = ["training: expected dotted", "name: is missing", "model: is missing", "adapter.rank: unknown key"]
    starts += ["masking.p: is 1.5", "masking.mask_token: is 'x'", "data.task: is 'tokens'", "data.max_length: is 1"]
    starts += ["training.epochs: is 'no'"]
    assert len(lines) == len(starts) + 1
    assert [start for start in starts if not any(line.startswith(start) for line in lines)] == []
    assert any("unknown key, and not text. Known here: name, output_dir" in line for line in lines)
    assert str(caught.value).splitlines()[0] == f"{path}: 10 problems"


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


def test_descriptions_help_with_what_is_missing(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmodel: {}\ndata: {path: y}\n")
    assert problems(recipe=path) == [
        "model.backbone: is missing; expected text (model id on the Hugging Face Hub, a folder, or a .gguf file: here, "
        "or OWNER/REPOSITORY/FILE.gguf on the Hub)",
        "data.task: is missing; expected 'sequence', 'token' or 'multilabel' (sequence: one label per text; token: one "
        "label per word; multilabel: several labels per text, or none)",
    ]


@pytest.mark.parametrize(
    ("name", "guess"),
    [("quickstrat", "quickstart"), ("seq", "sequence"), ("rank", None), ("", None), ("sequence", "sequence")],
)
def test_the_nearest_name(name, guess):
    said = nearest(name, iter(["dora", "quickstart", "sequence"]))
    assert said == (f" Did you mean '{guess}'?" if guess else "")
