"""README and docs: links lead somewhere, commands and keys exist, the reference is that of the schema."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import transformers
import typer

from tokmask_peft.cli import app as cli
from tokmask_peft.multilabel import YesOrNo
from tokmask_peft.recipe.loading import load_recipe
from tokmask_peft.recipe.schema import Recipe, all_fields
from tokmask_peft.tasks import MultiLabelTask

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^    \S.*\n?)+)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMANDS = typer.main.get_command(cli)


def prose(page):
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def commands():
    """Yield the commands in the code blocks, without comments, and those in the running text."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = [line for _, fenced, indented in BLOCK.findall(text) for line in (fenced or indented).splitlines()]
        inline = re.findall(r"(?<!`)`(tokmask [^`]+)`", prose(page))
        for line in found + inline:
            words = shlex.split(line, comments=True) if line.strip().startswith(("tokmask ", "torchrun", "acc")) else []
            start = next((at for at, word in enumerate(words) if word in {"tokmask", "tokmask_peft"}), None)
            if start is not None:
                yield pytest.param(words[start + 1 :], line in inline, id=f"{page.stem}: {line.strip()[:60]}")


@pytest.mark.parametrize(("words", "mentioned"), commands())
def test_a_command_of_the_pages_is_one(words, mentioned):
    group = COMMANDS
    context = typer.Context(group)
    while isinstance(group, typer.core.TyperGroup):
        name, command, words = group.resolve_command(context, words)
        assert command is not None, name
        if isinstance(command, typer.core.TyperGroup) and not words:
            return
        group = command
    with command.make_context(name, list(words), resilient_parsing=mentioned) as made:
        keys = {word.partition("=")[0] for word in made.params.get("overrides") or []}
    assert keys <= {path for path, _ in all_fields()}


def test_keys_that_the_pages_name_exist():
    known = {path for path, _ in all_fields()}
    sections = {path.partition(".")[0] for path in known if "." in path}
    for page in PAGES[:1] + PAGES[2:]:
        named = re.findall(rf"`((?:{'|'.join(sections)})\.[\w.]*\w)\b", page.read_text(encoding="utf-8"))
        assert {*named} - {"model.onnx", "data.test_source"} <= known, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_of_the_tree(page):
    targets = [target.partition("#")[0] for target in LINK.findall(prose(page)) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def rows_by_task():
    """Return the cells of the table of what works with each task, by the first cell of their row."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("What works with each:\n\n")[1]
    rows = ([cell.strip() for cell in row[1:-1].split("|")] for row in text.split("\n\n")[0].splitlines())
    return {name: cells for name, *cells in rows}


def test_what_works_with_each_task_does():
    rows = rows_by_task()
    data = [{"task": task, "path": "x"} for task in rows["`data.task`"]]
    data[1]["text_column"], data[3]["spans"] = ["premise", "hypothesis"], "none"

    def fits(at, **changes):
        try:
            Recipe.model_validate({"name": "x", "model": {"backbone": "x"}, "data": data[at], **changes})
        except ValueError:
            return "no"
        return "yes"

    asked = {
        "`masking.schedule: overfit` or `gap`": {"masking": {"schedule": "overfit", "share": 0.5}},
        "`masking.schedule: ready`": {"masking": {"schedule": "ready"}},
        "`training.best_metric: f1_entities`": {"training": {"best_metric": "f1_entities"}},
    }
    for row, changes in asked.items():
        assert rows[row] == [fits(at, **changes) for at in range(5)], row
    names = {"OLMo": "Olmo", "OLMo 2": "Olmo2", "Gemma 3": "Gemma3Text", "BERT": "Bert", "XLM-R": "XLMRoberta"}
    names |= {"mT5": "MT5", "BART": "Bart", "ModernBERT": "ModernBert"}
    for row, cells in list(rows.items())[-4:]:
        for family in row.split(", "):
            name = names.get(family, family)
            heads = [hasattr(transformers, f"{name}For{head}Classification") for head in ("Sequence", "Token")]
            found = [heads[0], heads[0] and name not in ("T5", "MT5", "Bart"), heads[0], *heads[1:] * 2]
            assert cells == ["yes" if one else "no" for one in found], family
    recipes = [load_recipe(name.strip("`")).data for name in rows["a shipped recipe"]]
    assert [recipe.task for recipe in recipes] == rows["`data.task`"]
    assert [recipe.pair is not None for recipe in recipes] == [False, True, False, False, False]


def test_the_example_of_a_larger_task_lists_what_it_has():
    listed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("They are, by what they are for:")[1]
    named = re.findall(r"`(\w+)`", listed.split("###")[0])
    own = {*vars(MultiLabelTask), *vars(YesOrNo)} - {"name", "description", "label_columns"}
    assert sorted(named) == sorted(one for one in own if not one.startswith("_"))


def test_every_page_is_reachable_and_the_readme_stays_short():
    readme, index = PAGES[0], ROOT / "docs" / "index.md"
    listed = set(LINK.findall(index.read_text(encoding="utf-8")))
    assert {page.name for page in PAGES[2:]} - listed == {"index.md"}
    assert readme.stat().st_size <= 9 * 1024


def test_the_recipe_reference_is_that_of_the_schema():
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / ".ci" / "recipe_reference.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python .ci/recipe_reference.py"
