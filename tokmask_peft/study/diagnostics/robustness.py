"""`tokmask robustness`: how scores fall on masked and misspelt texts and on unseen words, against p of training."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokmask_peft.artifacts import find_saved, write_json
from tokmask_peft.console import make_console
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.encoding import Window
from tokmask_peft.errors import RunError
from tokmask_peft.inference.classifier import Classifier
from tokmask_peft.inference.load import load
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.pattern import masked_positions, word_start_table
from tokmask_peft.masking.replacement import maskable_table
from tokmask_peft.study.diagnostics.plans import Member
from tokmask_peft.study.diagnostics.robustness_report import markdown_report, plot_robustness, summary
from tokmask_peft.study.statistics import spread
from tokmask_peft.tasks import Example
from tokmask_peft.training.environment import versions
from tokmask_peft.training.metrics import Predictions, scores

Alphabet = dict[str, tuple[str, ...]]


def alphabet(words: Iterable[str]) -> Alphabet:
    """Return the letters of the words by script, in lower case where there is one, sorted."""
    found: dict[str, set[str]] = {}
    for character in set("".join(words)):
        if character.isalpha():
            lower = character.lower()
            found.setdefault(_script(character), set()).add(lower if len(lower) == 1 else character)
    return {script: tuple(sorted(letters)) for script, letters in found.items()}


def disturb(words: Sequence[str], share: float, seed: Sequence[int], letters: Alphabet) -> list[str]:
    """Return words of which about `share` are misspelt.

    A word that is misspelt at one share is misspelt in the same way at a higher one.

    Args:
        words: of a text.
        share: chance of each word that has a letter, 0 to 1.
        seed: of the choice and the edits, for example seed, draw and number of the text.
        letters: from `alphabet`.
    """
    random = np.random.default_rng(list(seed))
    chances, seeds = random.random(len(words)), random.integers(0, 2**63, len(words))
    return [
        edit(word, np.random.default_rng(int(own)), letters) if chance < share else word
        for word, chance, own in zip(words, chances, seeds, strict=True)
    ]


def disturb_text(text: str, share: float, seed: Sequence[int], letters: Alphabet) -> str:
    """Return a running text of which about `share` of the words are misspelt; white space stays."""
    changed = iter(disturb(text.split(), share, seed, letters))
    return re.sub(r"\S+", lambda _: next(changed), text)


def edit(word: str, random: np.random.Generator, letters: Alphabet) -> str:
    """Return the word with one edit; always another word if it has a letter and its script has two."""
    parts = clusters(word)
    places = [place for place, part in enumerate(parts) if part[0].isalpha()]
    kinds: list[Callable[[list[str], list[int], np.random.Generator, Alphabet], bool]]
    kinds = [_swap, _drop, _insert, _replace]
    for kind in random.permutation(len(kinds)) if places else ():
        if kinds[kind](parts, places, random, letters):
            break
    return "".join(parts)


def clusters(word: str) -> list[str]:
    """Split a word into characters, each with the combining marks and joiners that follow it."""
    found: list[str] = []
    for character in word:
        if found and (unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"):
            found[-1] += character
        else:
            found.append(character)
    return found


def _swap(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    pairs = [place for place in places if place + 1 in places and parts[place] != parts[place + 1]]
    if not pairs:
        return False
    at = int(random.choice(pairs))
    parts[at], parts[at + 1] = parts[at + 1], parts[at]
    return True


def _drop(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    if len(places) < 2:
        return False
    del parts[int(random.choice(places))]
    return True


def _insert(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    at = int(random.choice(places))
    new = _letter_like(parts[at][0], random, letters, other=False)
    if new:
        parts.insert(at + 1, new)
    return bool(new)


def _replace(parts: list[str], places: list[int], random: np.random.Generator, letters: Alphabet) -> bool:
    at = int(random.choice(places))
    new = _letter_like(parts[at][0], random, letters, other=True)
    if new:
        parts[at] = new + parts[at][1:]
    return bool(new)


def _letter_like(letter: str, random: np.random.Generator, letters: Alphabet, *, other: bool) -> str:
    """Return a letter of the script, in the case of `letter`; none if there is no (other) one."""
    choice = [one for one in letters.get(_script(letter), ()) if not (other and one == letter.lower())]
    if not choice:
        return ""
    new = str(random.choice(choice))
    return new.upper() if letter.isupper() and len(new.upper()) == 1 else new


def _script(character: str) -> str:
    """Return the first word of the character's name, which is its script: LATIN, DEVANAGARI, CYRILLIC."""
    return unicodedata.name(character, "?").split()[0]


def normal(word: str) -> str:
    """Return a word without case and without what is no letter or digit at its ends; empty for punctuation."""
    folded = word.casefold()
    inside = [place for place, character in enumerate(folded) if character.isalnum()]
    return folded[inside[0] : inside[-1] + 1] if inside else ""


def vocabulary(texts: Iterable[Example]) -> set[str]:
    """Return the words of the texts, normalised."""
    return {normal(word) for example in texts for word in example.words}


def unseen_words(words: Sequence[str], known: set[str]) -> list[bool]:
    """Say of each word whether it is unseen; what has no letter or digit never is."""
    return [bool(word) and word not in known for word in map(normal, words)]


METRICS = ("f1_macro", "f1_weighted", "accuracy")


@dataclass(frozen=True, slots=True)
class Disturbances:
    """What is done to the texts.

    Attributes:
        rates: masking rates above 0.
        noise: shares of misspelt words above 0.
        draws: random draws of each; scores are their means.
        seed: of the draws, the same for all runs.
        limit: score at most so many texts, drawn at random; none for all.
    """

    rates: tuple[float, ...]
    noise: tuple[float, ...]
    draws: int
    seed: int = 0
    limit: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def score_disturbed(
    classifier: Classifier, texts: Sequence[Example], known: set[str], what: Disturbances, batch_size: int = 64
) -> dict[str, Any]:
    """Return scores on the texts as they are, disturbed, and split by unseen words; JSON-able.

    Args:
        classifier: from `load`. As in `predict`, a text longer than those of training is read in windows, not cut.
        texts: labelled.
        known: the words of the training texts, from `unseen.vocabulary`.
        what: rates, shares and draws.
        batch_size: windows per forward pass.
    """
    if what.limit is not None and what.limit < len(texts):
        chosen = np.random.default_rng([what.seed, 0]).permutation(len(texts))[: what.limit]
        texts = [texts[index] for index in sorted(chosen)]
    ids = {label: number for number, label in enumerate(classifier.labels)}
    gold = [np.array([ids[tag] for tag in example.tags], dtype=np.int64) for example in texts]
    given = [example.string if classifier.task == "sequence" else list(example.words) for example in texts]
    plain = _predicted(classifier, given, batch_size)

    def mean(rounds: Sequence[list[NDArray[np.int64]]]) -> dict[str, Any]:
        found = [scores(*Predictions(gold, one).flat(), classifier.labels) for one in rounds]
        means = {metric: float(np.mean([one[metric] for one in found])) for metric in METRICS}
        return {**means, "f1_macro_by_draw": [one["f1_macro"] for one in found]}

    masks = _Masks(classifier, given, what.seed) if what.rates else None
    letters = alphabet(word for example in texts for word in example.words)

    def misspelt(share: float, draw: int) -> list[Any]:
        change: Any = disturb_text if classifier.task == "sequence" else disturb
        return [change(text, share, (what.seed, draw, number), letters) for number, text in enumerate(given)]

    draws = range(what.draws)
    return {
        "texts": len(texts),
        "clean": mean([plain]),
        "mask": [
            {"at": rate, **mean([masks.predicted(rate, draw, batch_size) for draw in draws])}
            for rate in what.rates
            if masks is not None
        ],
        "noise": [
            {"at": share, **mean([_predicted(classifier, misspelt(share, draw), batch_size) for draw in draws])}
            for share in what.noise
        ],
        "words": by_unseen(texts, gold, plain, known, classifier.labels),
    }


def by_unseen(
    texts: Sequence[Example],
    gold: Sequence[NDArray[np.int64]],
    predicted: Sequence[NDArray[np.int64]],
    known: set[str],
    labels: Sequence[str],
) -> dict[str, Any]:
    """Score texts with and without unseen words apart; in token tasks seen and unseen words."""
    parts: dict[str, Any] = {}
    unseen = [unseen_words(example.words, known) for example in texts]
    for name, wanted in (("seen", False), ("unseen", True)):
        pairs = []
        for flags, one, other in zip(unseen, gold, predicted, strict=True):
            chosen = np.array(flags if len(one) == len(flags) else [any(flags)]) == wanted
            pairs.append((one[chosen], other[chosen]))
        found = scores(*Predictions([a for a, _ in pairs], [b for _, b in pairs]).flat(), labels)
        parts[name] = {**{metric: found[metric] for metric in METRICS}, "items": found["items"]}
    return parts


class _Masks:
    """Texts under the masks that training would draw for them: same rule, unit, token and protection."""

    def __init__(self, classifier: Classifier, texts: Sequence[Any], seed: int) -> None:
        self._classifier, self._count, self._seed = classifier, len(texts), seed
        self._config = classifier.masking or TokenMaskConfig()
        self._windows = classifier.encoder.windows(texts)
        tokenizer = classifier.tokenizer
        rows = len(classifier.occlusion.maskable)
        table = maskable_table(tokenizer, rows, {*self._config.protect, tokenizer.pad_token_id})
        longest = max(len(window.ids) for window in self._windows)
        self._ids = torch.full((len(self._windows), longest), int(tokenizer.pad_token_id))
        self._maskable = torch.zeros(self._ids.shape, dtype=torch.bool)
        for number, window in enumerate(self._windows):
            self._ids[number, : len(window.ids)] = torch.tensor(window.ids)
            self._maskable[number, : len(window.ids)] = table[window.ids]
        self._starts = None
        if self._config.unit != "token":
            self._starts = word_start_table(tokenizer, rows)[self._ids]

    def predicted(self, rate: float, draw: int, batch_size: int) -> list[NDArray[np.int64]]:
        unit, length = self._config.unit, self._config.span_length
        masked = masked_positions(
            self._ids, rate, self._seed, draw, 0, self._maskable, self._starts, unit, length
        ).numpy()
        hidden = [masked[number, : len(window.ids)] for number, window in enumerate(self._windows)]
        logits = self._classifier.forward.logits(self._windows, batch_size, self._classifier.occlusion, hidden)
        return _labels(self._classifier, self._windows, logits, self._count)


def _predicted(classifier: Classifier, texts: Sequence[Any], batch_size: int) -> list[NDArray[np.int64]]:
    windows = classifier.encoder.windows(texts)
    return _labels(classifier, windows, classifier.forward.logits(windows, batch_size), len(texts))


def _labels(
    classifier: Classifier, windows: Sequence[Window], logits: Sequence[NDArray[np.float32]], texts: int
) -> list[NDArray[np.int64]]:
    """Return label ids per text, `[1]` or `[words]`, as `Classifier.predict` chooses them."""
    if classifier.task == "sequence":
        total = np.zeros((texts, len(classifier.labels)))
        for window, values in zip(windows, logits, strict=True):
            total[window.text] += values[0].astype(np.float64) * window.size
        return list(total.argmax(-1)[:, None])
    words = np.zeros(texts, dtype=np.int64)
    for window in windows:
        words[window.text] += len(window.words)
    found = [np.zeros(count, dtype=np.int64) for count in words]
    for window, values in zip(windows, logits, strict=True):
        found[window.text][window.words] = values.argmax(-1)
    return found


_FILE = "robustness.json"


@dataclass(frozen=True, slots=True)
class RobustnessReport:
    """Where the report lies, and what it says in short."""

    markdown: Path
    statistics: Path
    plots: tuple[Path, ...]
    summary: str


def robustness(
    members: Sequence[Member],
    what: Disturbances,
    folder: Path,
    *,
    backbone: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> RobustnessReport:
    """Score the runs and write the report; a run that was scored before in the same way is not scored again.

    Args:
        members: the runs.
        what: is done to their texts.
        folder: to write to.
        backbone: load the backbone from here.
        device: to compute on.
        quiet: print nothing.

    Raises:
        RunError, DataError, ModelError: with what to do.
    """
    console = make_console(quiet)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); choose a folder with --out") from error
    done = _read(folder / _FILE)
    runs: list[dict[str, Any]] = []
    for number, member in enumerate(members, start=1):
        key = _key(member, what)
        found = done.get(key)
        console.print(
            f"{number} of {len(members)}: {member.run.root} ({member.group}){'' if found is None else ', known'}",
            markup=False,
        )
        runs.append(found or {"key": key, **_score(member, what, backbone, device)})
        runs[-1]["group"] = member.group
        done[key] = runs[-1]
        write_json(folder / _FILE, {"runs": runs, "known": _others(done, runs)})
    analysis = analyse(runs, what)
    write_json(folder / _FILE, {**analysis, "known": _others(done, runs)})
    plots = plot_robustness(analysis, folder)
    (folder / "robustness.md").write_text(markdown_report(analysis), encoding="utf-8")
    return RobustnessReport(folder / "robustness.md", folder / _FILE, tuple(plots), summary(analysis))


def _score(member: Member, what: Disturbances, backbone: str | None, device: str | None) -> dict[str, Any]:
    recipe = member.recipe
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    split = "test" if corpus.test else "validation"
    classifier = load(find_saved(member.run.root, backbone), device)
    found = score_disturbed(classifier, corpus.test or corpus.validation, vocabulary(corpus.train), what)
    about = {"run": str(member.run.root), "seed": recipe.seed, "p": recipe.masking.p, "split": split}
    mask = None
    if what.rates:  # a model for which there is no mask token can still be scored on the rest
        mask = {"unit": recipe.masking.unit, "token": classifier.occlusion.mask_token.reason}
    found["reported"] = None
    if member.run.finished() and what.limit is None:
        found["reported"] = json.loads(member.run.result.read_text(encoding="utf-8")).get(split, {}).get("f1_macro")
    return {**about, "task": recipe.data.task, "mask_token": mask, **found}


def analyse(runs: Sequence[dict[str, Any]], what: Disturbances) -> dict[str, Any]:
    """Return means over the runs of each group, JSON-able."""
    groups = []
    for name in dict.fromkeys(run["group"] for run in runs):
        own = [run for run in runs if run["group"] == name]
        rows = [{"kind": "clean", "at": 0.0, **_over_runs([run["clean"] for run in own], own)}]
        for kind in ("mask", "noise"):
            for number, at in enumerate(one["at"] for one in own[0][kind]):
                rows.append({"kind": kind, "at": at, **_over_runs([run[kind][number] for run in own], own)})
        for kind in ("seen", "unseen"):
            parts = [run["words"][kind] for run in own]
            if all(part["items"] for part in parts):
                items = sum(part["items"] for part in parts) / len(parts)
                rows.append({"kind": kind, "at": 0.0, "items": items, **_over_runs(parts, own)})
        groups.append({"group": name, "p": own[0]["p"], "seeds": [run["seed"] for run in own], "rows": rows})
    return {
        "disturbances": what.to_dict(),
        "task": runs[0]["task"],
        "split": runs[0]["split"],
        "texts": runs[0]["texts"],
        "mask_token": runs[0]["mask_token"],
        "groups": groups,
        "runs": list(runs),
        "versions": versions(),
    }


def _over_runs(parts: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, deviation and interval over runs of the scores, and of what macro-F1 lost against clean texts."""
    found: dict[str, Any] = {metric: spread([part[metric] for part in parts]) for metric in METRICS}
    found["loss"] = spread([run["clean"]["f1_macro"] - part["f1_macro"] for part, run in zip(parts, runs, strict=True)])
    return found


def _key(member: Member, what: Disturbances) -> str:
    """Return what a score depends on: the adapter's weights and the disturbances."""
    weights = hashlib.sha256()
    for file in sorted(member.run.adapter.glob("adapter_model.*")):
        weights.update(file.read_bytes())
    content = [str(member.run.root.resolve()), weights.hexdigest(), what.to_dict()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _others(done: dict[str, dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that were scored by earlier commands and not asked for in this one."""
    asked = {run["key"] for run in runs}
    return [run for key, run in done.items() if key not in asked]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the runs that were scored before, by key."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {run["key"]: run for run in (*found["runs"], *found.get("known", ()))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
