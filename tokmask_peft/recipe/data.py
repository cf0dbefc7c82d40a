"""The data section of a recipe: where texts and labels come from, and how they are read, cut and cleaned."""

import os
import re
from encodings.aliases import aliases
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, field_validator, model_validator

from tokmask_peft.errors import RecipeError, nearest
from tokmask_peft.masking.config import NameIn, Section
from tokmask_peft.tasks import TASKS, get_task


def known_separator(value: str) -> str:
    """Return a separator as the readers take it, or raise a ValueError that says what is expected."""
    if value in ("\t", "\\t"):
        return "tab"
    if value not in ("auto", "tab") and (len(value) != 1 or value in '"\r\n'):
        raise ValueError("expected auto, tab or one character; in YAML, | is in quotes: '|'")
    return value


def known_encoding(value: str) -> str:
    """Return the name of an encoding, or raise a ValueError that says what is expected."""
    try:
        "".encode("utf-8" if value == "auto" else value)
    except (LookupError, ValueError) as error:
        raise ValueError(f"expected auto or a codec of Python.{nearest(value, aliases.values())}") from error
    return value


Task = Annotated[str, NameIn(TASKS)]
SplitName = Annotated[str, Field(min_length=1, title="a split or file name")]
ShareOfTrain = Annotated[float, Field(gt=0.0, lt=1.0, title="a share of train between 0 and 1, for example 0.1")]
LanguageCode = Annotated[str, Field(pattern=r"^([a-z]{2,3}|multilingual)$", title="an ISO 639 code such as es or swa")]
AsText = Annotated[str, BeforeValidator(lambda value: "" if value is None else str(value))]
TwoColumns = Annotated[tuple[AsText, AsText], Field(title="a list of two columns, as [premise, hypothesis]")]
Separator = Annotated[str, AfterValidator(known_separator)]
LabelColumns = Annotated[
    tuple[str, ...], Field(min_length=2, title="a list of columns with 0 or 1, one per label, as [joy, anger]")
]
Encoding = Annotated[str, AfterValidator(known_encoding)]


class SourceConfig(Section):
    """Where texts come from: local files, a dataset on the Hugging Face Hub, or the built-in corpus."""

    path: str | None = Field(None, description="a local folder or file; takes precedence over `hub` and `builtin`")
    hub: str | None = Field(None, description="dataset id on the Hugging Face Hub")
    hub_config: str | None = Field(None, description="configuration of the Hub dataset")
    hub_revision: str | None = Field(None, description="revision of the Hub dataset, for example refs/convert/parquet")
    builtin: StrictBool = Field(False, description="the built-in Spanish-English corpus, made up to try things out")
    format: str = Field(
        "auto",
        description="auto: by the file's ending and content; or conll, conllu, csv, tsv, jsonl, parquet, txt, xlsx, "
        "tagged (a text a line, word/tag or word_tag), labelled (a text a line, after its label)",
    )
    encoding: Encoding = Field(
        "auto",
        description="encoding of text files: auto (by the byte-order mark; otherwise UTF-8, or cp1252 if the text "
        "clearly is), or the name of a codec, such as cp1251 or utf-16",
    )
    separator: Separator = Field(
        "auto",
        description="one character, or tab: between columns of CSV (auto finds , ; | and tabs) and TSV, between word "
        "and tag in tagged, between label and text in labelled files",
    )
    text_column: str | int | TwoColumns | None = Field(
        None,
        description="column of the text, or of the words in token tasks; a number, from 0, in CoNLL files and in "
        "tables without a header; [premise, hypothesis]: two columns of a table, whose texts are read as a pair",
    )
    label_column: str | int | LabelColumns | None = Field(
        None,
        description="column of the label, or of the tags in token tasks; a number as above; in CoNLL-U also a name "
        "such as upos, misc.Lang or feats.Case; for several labels per text also a list of columns that have 0 or 1, "
        "one per label",
    )
    label_separator: Separator = Field(
        "auto",
        description="several labels per text: one character, or tab, between the labels in a cell; auto: | ; or a "
        "comma, whichever is in the cells; a list, as in JSON lines and parquet, needs none",
    )
    missing: tuple[AsText, ...] | None = Field(
        None,
        description="values that stand for a missing label or text, such as [none, -1]: such texts are left out, and "
        "counted ('' also stands for a missing word); []: labels that look like missing values are classes",
    )
    header: Literal["auto"] | StrictBool = Field(
        "auto",
        description="CSV, TSV, xlsx and conll: whether the first row names the columns; without a header they have "
        "numbers from 0; auto decides from the cells, and skips a title above the header",
    )
    group_column: str | int | None = Field(
        None,
        description="token tasks, tables with a word in each row: the column that says which text a word is in, on "
        "every row or on the text's first only; without it, blank and <EOS> rows end a text",
    )
    name: str | None = Field(None, description="name of the corpus (for the model card)")
    language: tuple[LanguageCode, ...] = Field(
        (), description="languages of the texts as ISO 639 codes, for example [es, en] (for the model card)"
    )
    license: str | None = Field(None, description="licence of the texts, as their source has it (for the model card)")
    citation: str | None = Field(None, description="what to cite for the corpus (for the model card)")

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.path is None and self.hub is None and not self.builtin:
            remedy = "set path to a local folder or file, hub to a dataset id, or builtin to true in this section"
            raise ValueError(f"no data: {remedy}")
        named = self.label_column if isinstance(self.label_column, tuple) else ()
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise ValueError(f"label_column names '{twice}' twice: each column is one label, so name it once")
        if self.pair and self.pair[0] == self.pair[1]:
            remedy = "name two columns, as [premise, hypothesis], or one alone for single texts"
            raise ValueError(f"text_column names '{self.pair[0]}' twice: {remedy}")
        return self

    @property
    def pair(self) -> tuple[str, str] | None:
        """The two columns of `text_column`, if the texts are pairs."""
        return self.text_column if isinstance(self.text_column, tuple) else None

    def expanded(self, at: str = "data") -> Self:
        """Return a copy with `${NAME}` and `~` in paths replaced; RecipeError, at keys below `at`, if NAME is unset."""
        update: dict[str, Any] = {}
        problems: list[str] = []
        if self.path is not None:
            remedy = f"set it to the folder of your data, or give {at}.path=FOLDER"
            for name in re.findall(r"\$\{(\w+)\}", self.path):
                if not os.environ.get(name):
                    problem = f"is {self.path}, but the environment variable {name} is not set or empty"
                    problems.append(f"{at}.path: {problem}; {remedy}")
            update["path"] = str(Path(os.path.expandvars(self.path)).expanduser())
        if (other := getattr(self, "test_source", None)) is not None:
            try:
                update["test_source"] = other.expanded(f"{at}.test_source")
            except RecipeError as error:
                problems += error.problems
        if problems:
            raise RecipeError(problems, code="variable-not-set")
        return self.model_copy(update=update)


class DataConfig(SourceConfig):
    """Which texts a run learns from, and how they are split, cleaned and labelled."""

    task: Task = Field(description="; ".join(f"{task.name}: {task.description}" for task in TASKS.values()))
    train: str = Field("train", description="split or file name of the training texts")
    validation: SplitName | ShareOfTrain = Field(
        "validation", description="split or file name, or the share of train to set aside"
    )
    test: str | None = Field("test", description="split or file name of the test texts; null if there are none")
    test_source: SourceConfig | None = Field(None, description="other source of the test texts (zero-shot transfer)")
    label_map: dict[str, str] | None = Field(
        None, description="label in the file -> label to learn; the key '*' stands for every other label"
    )
    language_labels: tuple[str, ...] = Field(
        (), description="labels (after label_map) that are languages; scores are then also given by code-mixing index"
    )
    label_on: Literal["auto", "first", "last", "mean"] = Field(
        "auto",
        description="one label per word: which of its sub-tokens carries the label; auto: the last for decoders, whose "
        "first one has not seen the rest of the word, otherwise the first; mean: all do, with the mean of their logits",
    )
    spans: Literal["auto", "none", "bio", "iob1", "bioes", "bilou"] = Field(
        "auto",
        description="one label per word: how the labels mark entities, which are then scored and listed, too: bio (or "
        "IOB2), iob1 (B- only where two of a type meet), bioes or bilou; none: they do not; auto: by the labels",
    )
    max_length: int = Field(128, ge=4, description="sub-tokens per text; longer texts are truncated and reported")
    hygiene: Literal["remove", "report"] = Field(
        "remove",
        description="duplicate, conflicting and leaked texts, near-duplicates too: remove from train, or only report",
    )
    max_train: int | None = Field(None, ge=1, description="use at most this many training texts (seeded, stratified)")

    @field_validator("validation", mode="before")
    @classmethod
    def _number_is_a_share(cls, value: Any) -> Any:
        # YAML 1.1 reads 5e-2 as text, and no split has a number as its name
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", value.strip(), re.IGNORECASE):
            return float(value)
        return value

    @field_validator("test", mode="before")
    @classmethod
    def _only_validation_may_be_a_share(cls, value: Any) -> Any:
        if isinstance(value, float):
            raise ValueError("only validation may be a share of train: name a split or a file, or set it to null")
        return value

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        pairs, other = self.pair is not None, self.test_source or self
        if {self.label_separator, other.label_separator} != {"auto"} and not get_task(self.task).several:
            why = f"label_separator is for several labels per text, and task '{self.task}' has one"
            raise ValueError(f"{why}: set data.task=multilabel, or leave it at auto")
        if not get_task(self.task).several and "" in (named := self.label_map or {}).values():
            label = next(old for old, new in named.items() if not new)
            raise ValueError(
                f"label_map makes '{label}' an empty label: to leave such texts out, list it in data.missing"
            )
        if pairs and get_task(self.task).words_given:
            raise ValueError(f"text_column names two columns, for pairs, but task '{self.task}' labels words: name one")
        if pairs != (other.pair is not None) or (pairs and self.path is self.hub is None):
            raise ValueError("text_column must name two columns, for pairs, in test_source too; builtin has no pairs")
        return self
