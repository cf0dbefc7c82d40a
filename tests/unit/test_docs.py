"""README and docs: links lead somewhere, commands and keys exist, the reference is that of the schema."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from tokmask_peft.cli import app as cli
from tokmask_peft.recipe.schema import all_fields

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
