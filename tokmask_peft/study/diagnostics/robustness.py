"""`tokmask robustness`: how scores fall on masked and misspelt texts and on unseen words, against p of training."""

import contextlib
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tokmask_peft.artifacts import find_saved, open_run
from tokmask_peft.console import make_console
from tokmask_peft.data.corpus import load_corpus, with_unseen
from tokmask_peft.data.encoding import Window
from tokmask_peft.errors import RunError, read_json, write_json
from tokmask_peft.examples import Example, Pair
from tokmask_peft.inference.classifier import Classifier, load
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.pattern import maskable_table, masked_positions, word_start_table
from tokmask_peft.study.diagnostics.plans import Member, Perturbations
from tokmask_peft.study.diagnostics.reports import make_folder, robustness_report
from tokmask_peft.study.report import Report
from tokmask_peft.study.statistics import spread
from tokmask_peft.tasks import Task, get_task
from tokmask_peft.training.environment import versions
from tokmask_peft.training.metrics import Predictions, task_scores

METRICS = ("f1_macro", "f1_weighted", "accuracy")
_FILE = "robustness.json"
Labels = list[NDArray[np.int64]]  # label ids of each text: `[1]` or `[words]`
Alphabet = dict[str, tuple[str, ...]]


def alphabet(words: Iterable[str]) -> Alphabet:
    """Return the letters of the words by script, in lower case if there is one, sorted."""
    found: dict[str, set[str]] = {}
    for character in set("".join(words)):
        if character.isalpha():
            lower = character.lower()
            found.setdefault(_script(character), set()).add(lower if len(lower) == 1 else character)
    return {script: tuple(sorted(letters)) for script, letters in found.items()}


def misspell(words: Sequence[str], share: float, seed: Sequence[int], letters: Alphabet) -> list[str]:
    """Misspell each word that has a letter with the chance `share`; a higher one adds words to those of a lower one."""
    random = np.random.default_rng(list(seed))
    chances, seeds = random.random(len(words)), random.integers(0, 2**63, len(words))
    return [
        edit(word, np.random.default_rng(int(own)), letters) if chance < share else word
        for word, chance, own in zip(words, chances, seeds, strict=True)
    ]


def misspell_text(text: str | Pair, share: float, seed: Sequence[int], letters: Alphabet) -> str | Pair:
    """Return a running text, or a pair, of which about `share` of the words are misspelt; white space stays."""
    if isinstance(text, Pair):
        return Pair(*(str(misspell_text(part, share, (*seed, at), letters)) for at, part in enumerate(text)))
    changed = iter(misspell(text.split(), share, seed, letters))
    return re.sub(r"\S+", lambda _: next(changed), text)


def edit(word: str, random: np.random.Generator, letters: Alphabet) -> str:
    """Return the word with two letters swapped, or one dropped, inserted or replaced: another word, if there is one."""
    parts = clusters(word)
    places = [place for place, part in enumerate(parts) if part[0].isalpha()]

    def letter_like(old: str, exclude: str = "") -> str:
        """Return a letter of the script in the case of `old`; none if there is none."""
        choice = [one for one in letters.get(_script(old), ()) if one != exclude]
        new = str(random.choice(choice)) if choice else ""
        return new.upper() if old.isupper() and len(new.upper()) == 1 else new

    for kind in random.permutation(4) if places else ():
        if kind == 0:  # swap
            if pairs := [place for place in places if place + 1 in places and parts[place] != parts[place + 1]]:
                at = int(random.choice(pairs))
                parts[at], parts[at + 1] = parts[at + 1], parts[at]
                break
        elif kind == 1:  # drop
            if len(places) > 1:
                del parts[int(random.choice(places))]
                break
        else:  # insert or replace
            at = int(random.choice(places))
            old = parts[at][0]
            if new := letter_like(old, "" if kind == 2 else old.lower()):
                parts[at : at + 1] = [parts[at], new] if kind == 2 else [new + parts[at][1:]]
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


def _script(character: str) -> str:
    """Return the first word of the character's name, which is its script: LATIN, DEVANAGARI, CYRILLIC."""
    return unicodedata.name(character, "?").split()[0]


def normal(word: str) -> str:
    """Return a word without case, and without anything but letters and digits at its ends; empty for punctuation."""
    folded = word.casefold()
    inside = [place for place, character in enumerate(folded) if character.isalnum()]
    return folded[inside[0] : inside[-1] + 1] if inside else ""


def unseen_words(words: Sequence[str], known: set[str]) -> list[bool]:
    """Return for each word whether it is unseen; a word without letters and digits never is."""
    return [bool(word) and word not in known for word in map(normal, words)]


def score_perturbed(
    classifier: Classifier, texts: Sequence[Example], known: set[str], what: Perturbations, batch_size: int = 64
) -> dict[str, Any]:
    """Return scores on texts as they are, perturbed, and split by words that are not `known` (`normal`); JSON-able."""
    if what.limit is not None and what.limit < len(texts):
        chosen = np.random.default_rng([what.seed, 0]).permutation(len(texts))[: what.limit]
        texts = [texts[index] for index in sorted(chosen)]
    labels = with_unseen(classifier.labels, texts)
    ids = {label: number for number, label in enumerate(labels)}
    task = get_task(classifier.task)
    gold = [np.array(task.gold_ids(one, ids), dtype=np.int64) for one in texts]
    given: list[Any] = [example.text for example in texts]
    windows = list(classifier.encoder.windows(given))
    predict = functools.partial(predicted, classifier, batch_size=batch_size, labels=len(labels))
    plain = predict(windows)

    def mean(rounds: Sequence[Labels]) -> dict[str, Any]:
        found = [task_scores(task, Predictions(gold, one), labels) for one in rounds]
        means = {metric: float(np.mean([one[metric] for one in found])) for metric in METRICS}
        return {**means, "f1_macro_by_draw": [one["f1_macro"] for one in found]}

    letters = alphabet(word for example in texts for word in example.words)
    change: Any = misspell if task.words_given else misspell_text

    def misspelt(share: float, draw: int) -> Labels:
        changed = [change(text, share, (what.seed, draw, number), letters) for number, text in enumerate(given)]
        return predict(list(classifier.encoder.windows(changed)))

    def rows(values: Sequence[float], perturbed: Callable[[float, int], Labels]) -> list[dict[str, Any]]:
        return [{"at": at, **mean([perturbed(at, draw) for draw in range(what.draws)])} for at in values]

    masked = []
    if what.rates:  # without rates a model that has no mask token can be scored too
        config, tokenizer = classifier.masking or TokenMaskConfig(), classifier.tokenizer
        size, padding = len(classifier.occlusion.maskable), int(tokenizer.pad_token_id)
        padded = pad_sequence([torch.tensor(window.ids) for window in windows], batch_first=True, padding_value=padding)
        maskable = maskable_table(tokenizer, size, {*config.protect, padding})[padded]
        starts = word_start_table(tokenizer, size)[padded] if config.unit != "token" else None
        rule = (maskable, starts, config.unit, config.span_length)  # of training

        def hidden(rate: float, draw: int) -> Labels:
            found = masked_positions(padded, rate, what.seed, draw, 0, *rule).numpy()
            masks = [row[: len(window.ids)] for row, window in zip(found, windows, strict=True)]
            return predict(windows, hidden=masks)

        masked = rows(what.rates, hidden)
    return {
        "texts": len(texts),
        "clean": mean([plain]),
        "mask": masked,
        "noise": rows(what.noise, misspelt),
        "words": by_unseen(texts, gold, plain, known, labels, task),
    }


def by_unseen(
    texts: Sequence[Example], gold: Labels, predicted: Labels, known: set[str], labels: Sequence[str], task: Task
) -> dict[str, Any]:
    """Score texts with and without unseen words separately; in token tasks seen and unseen words."""
    parts: dict[str, Any] = {}
    unseen = [unseen_words(example.words, known) for example in texts]
    for name, wanted in (("seen", False), ("unseen", True)):
        flagged = zip(unseen, gold, strict=True)
        chosen = [np.array(flags if task.words_given else [any(flags)] * len(one)) == wanted for flags, one in flagged]
        both = ([row[part] for row, part in zip(rows, chosen, strict=True)] for rows in (gold, predicted))
        found = task_scores(task, Predictions(*both), labels)
        parts[name] = {**{metric: found[metric] for metric in METRICS}, "items": found["items"]}
    return parts


def predicted(
    classifier: Classifier, windows: Sequence[Window], batch_size: int, labels: int, hidden: Sequence[Any] = ()
) -> Labels:
    """Return the label ids of each text, of the data's `labels`, as `predict` chooses them; `hidden` masks windows."""
    logits = classifier.forward.logits(windows, batch_size, classifier.occlusion if hidden else None, hidden)
    of_text: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        of_text.setdefault(window.text, []).append(number)
    task, parts = get_task(classifier.task), [of_text[text] for text in sorted(of_text)]
    rows = (task.join([windows[n] for n in own], [logits[n] for n in own]) for own in parts)
    found = [task.choose(row, classifier.cuts, labels) for row in rows]
    return [np.array(classifier.legal.repaired_ids(row.tolist())) for row in found] if classifier.legal else found


def robustness(
    members: Sequence[Member],
    what: Perturbations,
    folder: Path,
    *,
    backbone: str | None = None,
    device: str | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Score the runs and write the report; a run that was already scored in the same way is not scored again."""
    console, known, runs = make_console(quiet), dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    make_folder(folder)
    with contextlib.suppress(RunError, KeyError, TypeError):  # what earlier commands have scored
        found = read_json(folder / _FILE, RunError, "bad-report")
        known = {run["key"]: run for run in (*found["runs"], *found.get("known", ()))}
    for number, member in enumerate(members, start=1):
        weights = hashlib.sha256()
        for file in sorted(member.run.adapter.glob("adapter_model.*")):
            weights.update(file.read_bytes())
        content = [str(member.run.root.resolve()), weights.hexdigest(), asdict(what)]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        note = ", already scored" if key in known else ""
        console.print(f"{number} of {len(members)}: {member.run.root} ({member.group}){note}", markup=False)
        scored = known.pop(key, None) or {"key": key, **_score(member, what, backbone, device, trust_remote_code)}
        runs[key] = {**scored, "group": member.group}
        write_json(folder / _FILE, {"runs": list(runs.values()), "known": list(known.values())})
    return robustness_report(analyse(list(runs.values()), what), folder, known=list(known.values()))


def _score(
    member: Member, what: Perturbations, backbone: str | None, device: str | None, trusted: bool
) -> dict[str, Any]:
    recipe = member.recipe
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    split = "test" if corpus.test else "validation"
    classifier = load(find_saved(member.run.root, backbone, trust_remote_code=trusted), device)
    words = {normal(word) for example in corpus.train for word in example.words}
    found = score_perturbed(classifier, corpus.test or corpus.validation, words, what)
    mask = {"unit": recipe.masking.unit, "token": classifier.occlusion.mask_token.reason} if what.rates else None
    known = getattr(open_run(member.run.root).result, split) if member.run.finished() and what.limit is None else None
    return {
        "run": str(member.run.root),
        "seed": recipe.seed,
        "p": recipe.masking.p,
        "split": split,
        "task": recipe.data.task,
        "mask_token": mask,
        **found,
        "reported": (known or {}).get("f1_macro"),
    }


def analyse(runs: Sequence[dict[str, Any]], what: Perturbations) -> dict[str, Any]:
    """Return means over the runs of each group, JSON-able."""
    groups = []
    for name in dict.fromkeys(run["group"] for run in runs):
        own = [run for run in runs if run["group"] == name]
        clean = [run["clean"] for run in own]
        rows = [{"kind": "clean", "at": 0.0, **_over_runs(clean, clean)}]
        for kind in ("mask", "noise"):
            for number, one in enumerate(own[0][kind]):
                rows.append({"kind": kind, "at": one["at"], **_over_runs([run[kind][number] for run in own], clean)})
        for kind in ("seen", "unseen"):
            parts = [run["words"][kind] for run in own]
            if all(part["items"] for part in parts):
                items = sum(part["items"] for part in parts) / len(parts)
                rows.append({"kind": kind, "at": 0.0, "items": items, **_over_runs(parts, clean)})
        groups.append({"group": name, "p": own[0]["p"], "seeds": [run["seed"] for run in own], "rows": rows})
    return {
        "disturbances": asdict(what),
        **{key: runs[0][key] for key in ("task", "split", "texts", "mask_token")},
        "groups": groups,
        "runs": list(runs),
        "versions": versions(),
    }


def _over_runs(parts: Sequence[dict[str, Any]], clean: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, deviation and interval over runs of the scores, and of the macro-F1 lost against clean texts."""
    lost = [one["f1_macro"] - part["f1_macro"] for part, one in zip(parts, clean, strict=True)]
    return {**{metric: spread([part[metric] for part in parts]) for metric in METRICS}, "loss": spread(lost)}
