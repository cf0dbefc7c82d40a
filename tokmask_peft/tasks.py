"""What depends on the kind of labels: one task object each, which everything else asks: `get_task(name)`.

A new task is a subclass of `Task` and an entry of `TASKS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokmask_peft.errors import DataError, nearest
from tokmask_peft.examples import (
    IGNORED,
    MARK,
    MARKS,
    NO_PREDICTION,
    Example,
    Label,
    LabelIds,
    LabelSet,
    Prediction,
    WordPredictions,
    WrongLabel,
)
from tokmask_peft.multilabel import YesOrNo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def is_missing(cell: Any) -> bool:
    """Return whether a cell of a table is null, or NaN, which pandas writes for a missing value."""
    return cell is None or cell != cell


class Task:
    """What depends on the kind of label; those below come with the package."""

    name: ClassVar[str]  # as in `data.task`
    description: ClassVar[str]  # one line for `tokmask recipes fields`
    item: ClassVar[str]  # what carries a label, for sentences: text or word
    words_given: ClassVar[bool]  # whether a text is a list of words, for the tokenizer too
    several: ClassVar[bool] = False  # whether a text may have several labels, or none: a yes or no for each
    problem_type: ClassVar[str | None] = None  # in the config of transformers' model, if it must be set
    text_columns: ClassVar[tuple[str, ...]]  # names under which tables hold the text, the likeliest first
    label_columns: ClassVar[tuple[str, ...]]  # names under which tables hold the labels
    auto_class: ClassVar[str]  # transformers' class that loads backbone and head
    collator_class: ClassVar[str] = "DataCollatorWithPadding"  # transformers' class that pads a batch
    peft_type: ClassVar[str]  # name in `peft.TaskType`, without which the head would stay frozen in silence
    pipeline_tag: ClassVar[str]  # of the Hub and of `transformers.pipeline`
    unseen_parts: ClassVar[tuple[str, str]] = ("texts with no unseen word", "texts with an unseen word")  # scored apart
    snippet: ClassVar[str]  # Python for the card that predicts with `model`, `tokenizer` and `labels`
    pipeline_snippet: ClassVar[str]  # the same with `transformers.pipeline` and the path `MODEL`

    # -- data --

    def example(self, text: str | Sequence[str], label: Label, where: str) -> Example:
        """Return an example whose text has the form that the task needs: a string, or words."""
        if self.words_given:
            return Example(tuple(text.split() if isinstance(text, str) else text), label, where)
        return Example(text if isinstance(text, str) else " ".join(text), label, where)

    def from_cells(self, text: Any, label: Any, where: str, columns: tuple[str, str | None]) -> Example:
        """Return the example of a table's row: cells and place; DataError, naming `columns`, if they do not fit."""
        raise NotImplementedError

    def parted(self, cell: Any, asked: str, found: str | None = None) -> Any:
        """Return what a cell holds, as a list if it is a string with several labels; DataError if it is not clear.

        `asked` is `data.label_separator`, and `found` what the first rows show if that is `auto`.
        """
        return cell

    def encode_label(self, example: Example, starts: Sequence[tuple[int, int]], length: int, ids: LabelIds) -> Any:
        """Return what the model should learn from an example, for the column `labels`.

        `starts` are, if words are given, `(word, position)` of each sub-token that carries a label; `length` counts the
        sub-tokens of the encoded text, special tokens included; `ids` maps labels to outputs.
        """
        raise NotImplementedError

    def pack_labels(self, labels: Sequence[Any]) -> Any:
        """Return the labels of a batch as the tensor that goes with one packed row of its texts."""
        raise NotImplementedError

    def mark(self, labels: int) -> Any:
        """Return what stands in the column `labels` of a text that is only to be answered; `labels` counts them."""
        return 0

    def wanted(self, labels: Any) -> Any:
        """Return where in the labels of a batch, an array or a tensor, an answer is wanted."""
        return labels != IGNORED

    # -- model --

    def auto_model(self) -> Any:
        """Return transformers' class that loads backbone and head."""
        import transformers

        return getattr(transformers, self.auto_class)

    # -- answers --

    def probabilities(self, logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
        """Return the probability of each label, of the shape of the logits, in double precision."""
        import numpy as np
        from scipy.special import softmax

        return np.asarray(softmax(logits.astype(np.float64) / temperature, axis=-1))

    def competing(self, logits: NDArray[Any], label: int) -> tuple[NDArray[Any], int]:
        """Return the logits that share the probability with a label, and the label's place among them."""
        return logits, label

    def choose(self, logits: NDArray[Any], cuts: Sequence[float] = (), labels: int = 0) -> NDArray[np.int64]:
        """Return the label ids of answers, `[answers, classes]`, in the form of `gold_ids`.

        `cuts` are those of `fit_cuts`; `labels` counts the labels of the data, also those that no output stands for.
        """
        return logits.argmax(-1)

    def likeliest(self, logits: NDArray[Any], cuts: Sequence[float]) -> list[int]:
        """Return the label to explain of each answer, `[answers, classes]`."""
        return list(self.choose(logits, cuts).tolist())

    # -- training and scores --

    def gold_ids(self, example: Example, ids: LabelIds) -> list[int]:
        """Return the label ids of a text's items, for scores."""
        return [ids[tag] for tag in example.tags]

    def ids_of(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return the label ids, for scores, of labels as the model saw them."""
        return labels

    def kept(self, logits: Any) -> Any:
        """Return what an evaluation in training keeps of a batch's logits, a tensor `[batch, …, classes]`."""
        return logits.argmax(dim=-1)

    def decided(self, kept: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.int64]:
        """Return the predictions for `decode` from what was `kept` of all texts, and their labels."""
        return kept

    def fit_cuts(self, logits: NDArray[Any], gold: NDArray[np.int64]) -> list[float]:
        """Return the logit above which each label is given, fitted on answers and label ids; none if one label is."""
        return []

    def cuts_of(self, labels: Sequence[str], calibration: Mapping[str, Any]) -> list[float]:
        """Return the same from what an adapter folder says of its probabilities; a ModelError if it makes no sense."""
        return []

    def calibrated(self, logits: NDArray[Any], gold: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return logits and label ids of the choices whose probabilities are to be calibrated."""
        return logits, gold

    def collator(self, tokenizer: Any) -> Any:
        """Return what pads a batch on the right, to multiples of 8: oneDNN keeps a kernel per shape (in all 3.8 GB)."""
        import transformers

        return getattr(transformers, self.collator_class)(tokenizer, pad_to_multiple_of=8)

    def items(self, example: Example) -> list[tuple[str, str]]:
        """Return what the baseline classifies: each item that carries a label, as a string, with its label."""
        return [(example.string, example.tags[0])]

    def decode(
        self, example: Example, ids: Mapping[str, int], kept: Sequence[int], gold: Any, predicted: Any
    ) -> tuple[list[int], list[int]]:
        """Return gold and predicted label ids of a text's items, `NO_PREDICTION` for what was cut away.

        `kept` are indices of the words that have a position, none unless each word carries a label; `gold`, what the
        model saw, is a number or [seq], and so is `predicted`, its answers.
        """
        return self.gold_ids(example, ids), [int(predicted)]

    def more_scores(self, gold: Any, predicted: Any, labels: Sequence[str]) -> dict[str, Any]:
        """Return scores in addition to those of every task, from label ids `[items]`; they go into `result.json`."""
        return {}

    def counts_given(self, scores: Mapping[str, Any]) -> dict[str, int]:
        """Return how often each label is given, from the scores of a split."""
        labels, matrix = scores["confusion"]["labels"], scores["confusion"]["matrix"]
        return {label: sum(row[at] for row in matrix) for at, label in enumerate(labels)}

    # -- inference --

    def join(self, windows: Sequence[Any], logits: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return the logits of a text's answers, [answers, classes], from those of its windows.

        Here the text has one answer: the mean weighted by sub-tokens, of which the temperature changes no label.
        """
        import numpy as np

        sizes = np.array([window.size for window in windows], dtype=np.float64)
        return np.asarray((np.concatenate(logits) * sizes[:, None]).sum(0, keepdims=True) / sizes.sum())

    def answer(
        self, text: Any, chosen: NDArray[np.int64], probabilities: Sequence[dict[str, float]], windows: int
    ) -> Any:
        """Return the answer for a text: from what was chosen, and label -> probability for each of `join`'s rows."""
        return Prediction(list(probabilities[0])[int(chosen[0])], probabilities[0], windows)

    # -- report, card and study --

    def use(self, snippet: str, labels: Sequence[str], calibration: Mapping[str, Any]) -> str:
        """Return `snippet` or `pipeline_snippet`, with what it needs of a model's calibration."""
        return snippet

    def mistakes(self, tags: tuple[str, ...], answer: Any) -> Iterator[WrongLabel]:
        """Yield what is wrong in a classifier's answer to a text whose labels are `tags`; here it has one label."""
        if answer.label != tags[0]:
            chances = answer.probabilities
            yield tags[0], answer.label, chances[answer.label], chances.get(tags[0], 0.0), None


class SequenceTask(Task):
    """One label for each text."""

    name = "sequence"
    description = "one label per text"
    item = "text"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    pipeline_tag = "text-classification"
    text_columns = ("text", "sentence", "tweet", "content", "words", "tokens")
    label_columns: ClassVar[tuple[str, ...]] = ("label", "sentiment", "sa")
    words_given = False

    def from_cells(self, text: Any, label: Any, where: str, columns: tuple[str, str | None]) -> Example:
        """See `Task`; the text is a string or a list of words, the label any value."""
        words = text if isinstance(text, list) else ["" if is_missing(text) else text]
        if not all(isinstance(word, str) for word in words):
            found = f"column '{columns[0]}' has {type(text).__name__}"
            raise DataError(f"{found}, but a text is a string or a list of words", code="cell-type")
        if isinstance(label, list | dict):
            found = f"column '{columns[1]}' has {type(label).__name__}, but task '{self.name}' has {self.description}"
            remedy = "For one label per word set data.task to token, for several per text to multilabel."
            raise DataError(f"{found}. {remedy}", code="cell-type")
        return self.example(words, None if is_missing(label) else str(label).strip(), where)

    def encode_label(self, example: Example, starts: Sequence[tuple[int, int]], length: int, ids: LabelIds) -> int:
        return label_id(example.tags[0], ids, example.where)

    def pack_labels(self, labels: Sequence[int]) -> Any:
        """Return int64 [texts]."""
        import torch

        return torch.tensor([int(label) for label in labels], dtype=torch.long)

    snippet = """\
inputs = tokenizer(["This phone is bien bonito"], return_tensors="pt", padding=True)
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(-1)
print([labels[i] for i in probabilities.argmax(-1)])"""
    pipeline_snippet = """\
classify = pipeline("text-classification", model=MODEL)
print(classify(["This phone is bien bonito"]))"""


class TokenTask(Task):
    """One label for each word; its first, its last or all of its sub-tokens carry it (`data.label_on`)."""

    name = "token"
    description = "one label per word"
    item = "word"
    auto_class = "AutoModelForTokenClassification"
    collator_class = "DataCollatorForTokenClassification"
    peft_type = "TOKEN_CLS"
    pipeline_tag = "token-classification"
    text_columns = ("words", "tokens", "word", "token")
    label_columns = ("labels", "tags", "lid", "ner_tags", "pos_tags", "pos", "ner", "label", "tag")
    words_given = True

    def from_cells(self, text: Any, label: Any, where: str, columns: tuple[str, str | None]) -> Example:
        """See `Task`; words and tags are lists, or strings separated by white space."""
        cells = [None if is_missing(cell) else cell for cell in (text, label)]
        words, tags = cells = [cell.split() if isinstance(cell, str) else cell for cell in cells]
        listed = all(isinstance(cell, list | None) for cell in cells)
        if not listed or any(isinstance(item, list | dict) for cell in cells for item in cell or ()):
            problem = f"task '{self.name}' needs a list of words in '{columns[0]}' and a list of tags in '{columns[1]}'"
            raise DataError(problem, code="cell-type")
        words = ["" if is_missing(word) else str(word) for word in words or []]
        if tags is None:
            return self.example(words, None, where)
        if len(words) != len(tags):
            problem = f"{len(words)} words in '{columns[0]}' but {len(tags)} tags in '{columns[1]}'"
            raise DataError(problem, code="tag-count")
        return self.example(words, tuple("" if is_missing(tag) else str(tag) for tag in tags), where)

    def encode_label(
        self, example: Example, starts: Sequence[tuple[int, int]], length: int, ids: LabelIds
    ) -> list[int]:
        """Return a label index per sub-token, `IGNORED` for all but the one of each word."""
        row = [IGNORED] * length
        for word, position in starts:
            row[position] = label_id(example.tags[word], ids, example.where)
        return row

    def pack_labels(self, labels: Sequence[Sequence[int]]) -> Any:
        """Return int64 [1, sub-tokens of all texts]."""
        import torch

        return torch.cat([torch.as_tensor(row, dtype=torch.long) for row in labels]).unsqueeze(0)

    def items(self, example: Example) -> list[tuple[str, str]]:
        """Return each word with its label."""
        return list(zip(example.words, example.tags, strict=True))

    def decode(
        self, example: Example, ids: Mapping[str, int], kept: Sequence[int], gold: Any, predicted: Any
    ) -> tuple[list[int], list[int]]:
        """Return an id for each word; those of the model are where the labels are."""
        found = [NO_PREDICTION] * len(example.tags)
        for word, value in zip(kept, predicted[gold != IGNORED].tolist(), strict=True):
            found[word] = value
        return self.gold_ids(example, ids), found

    def join(self, windows: Sequence[Any], logits: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Take the logits of each word from the window that it belongs to."""
        import numpy as np

        order = np.argsort(np.concatenate([window.words for window in windows]))
        return np.asarray(np.concatenate(logits)[order], dtype=np.float64)

    def answer(
        self, text: Any, chosen: NDArray[np.int64], probabilities: Sequence[dict[str, float]], windows: int
    ) -> Any:
        labels = tuple(list(row)[best] for row, best in zip(probabilities, chosen.tolist(), strict=True))
        return WordPredictions(tuple(text), labels, probabilities, windows)

    unseen_parts = ("seen words", "unseen words")
    snippet = """\
words = "This phone is bien bonito".split()
inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
with torch.no_grad():
    predicted = model(**inputs).logits.argmax(-1)[0]
word_ids = inputs.word_ids()
first = [i for i, word in enumerate(word_ids) if word is not None and word not in word_ids[:i]]
print([(words[word_ids[i]], labels[predicted[i]]) for i in first])"""
    pipeline_snippet = """\
# adjacent words with the same label are joined
tag = pipeline("token-classification", model=MODEL, aggregation_strategy="first", ignore_labels=[])
print([(part["word"], part["entity_group"]) for part in tag("This phone is bien bonito")])"""

    def mistakes(self, tags: tuple[str, ...], answer: Any) -> Iterator[WrongLabel]:
        for word, (gold, label, row) in enumerate(zip(tags, answer.labels, answer.probabilities, strict=True)):
            if label != gold:
                yield gold, label, row[label], row.get(gold, 0.0), word


_WRITTEN = re.compile(r"""\{\s*['"].*\}|\(\s*['"].*\)|set\(\)""")  # a set or a tuple as Python writes it
_BRACKETED = re.compile(r"\[[^\]]*\]|\{[^}]*\}|\([^)]*\)")


class MultiLabelTask(YesOrNo, SequenceTask):
    """Several labels for each text, or none."""

    name = "multilabel"
    description = "several labels per text, or none"
    label_columns = ("labels", "label")

    def example(self, text: str | Sequence[str], label: Label, where: str) -> Example:
        """Return an example with a set of labels; in a string they are separated by vertical bars."""
        parts = [part.strip() for part in label.split(MARK)] if isinstance(label, str) else label
        if repeated := [one for one, times in Counter(parts or ()).items() if one and times > 1]:
            problem = f"the labels {', '.join((parts or ())[:8])} have '{repeated[0]}' twice. Expected are their names"
            remedy = "if each place stands for a label, write a column of 0 and 1 for each, and list them in"
            raise DataError(f"{problem}; {remedy} data.label_column", code="label-repeated", label=repeated[0])
        return super().example(text, None if parts is None else LabelSet(parts), where)

    def parted(self, cell: Any, asked: str, found: str | None = None) -> Any:
        """See `Task`; by default vertical bars separate labels."""
        if not isinstance(cell, str):
            return cell
        mark = {"auto": found or MARK, "tab": "\t"}.get(asked, asked)
        if others := [other for other in MARKS if asked == "auto" and other != mark and other in cell]:
            problem = f"'{cell.strip()[:60]}' has {others[0]!r}, but it seems that {mark!r} separates labels"
            raise DataError(f"{problem}. Set data.label_separator to what separates them", code="label-separator")
        parts = [part.strip() for part in cell.split(mark)]
        if _WRITTEN.fullmatch(cell.strip()) or (len(parts) > 1 and _BRACKETED.fullmatch(cell.strip())):
            problem = f"'{cell.strip()[:60]}' is in brackets. Write the labels as a JSON list, or with {mark!r} alone"
            raise DataError(f"{problem} between them", code="label-brackets")
        return parts

    def from_cells(self, text: Any, label: Any, where: str, columns: tuple[str, str | None]) -> Example:
        """See `Task`; labels are a list, or a string as `example` takes it. Nothing in either means no label."""
        if not isinstance(label, list) or any(isinstance(one, list | dict) for one in label):
            return super().from_cells(text, label, where, columns)
        if any(map(is_missing, label)):
            problem = f"a label in the list of column '{columns[1]}' is missing (null): leave it out of the list"
            raise DataError(f"{problem}, or write null for the whole list", code="label-missing")
        string = super().from_cells(text, None, where, columns).string
        return self.example(string, tuple(str(one).strip() for one in label), where)

    def encode_label(self, example: Example, starts: Sequence[tuple[int, int]], length: int, ids: LabelIds) -> Any:
        """Return 1 for each label that the text has, otherwise 0: [labels]."""
        given = {label_id(tag, ids, example.where) for tag in example.tags}
        return [float(number in given) for number in ids.values()]


TASKS: dict[str, Task] = {task.name: task for task in (SequenceTask(), TokenTask(), MultiLabelTask())}
"""By name. A task of somebody else's is added here: `TASKS["mine"] = MyTask()`."""


def get_task(name: str) -> Task:
    """Return the task of a name; DataError if there is none."""
    if name not in TASKS:
        problem = f"there is no task '{name}'.{nearest(name, TASKS)} Known: {', '.join(TASKS)}"
        raise DataError(problem, code="unknown-task", task=name)
    return TASKS[name]


def label_id(label: str, ids: LabelIds, where: str) -> int:
    """Return the index of a label; DataError if it is not one of the labels to learn."""
    if label not in ids:
        raise DataError(f"{where}: label '{label}' is not one of {', '.join(ids)}", code="unknown-label", label=label)
    return ids[label]
