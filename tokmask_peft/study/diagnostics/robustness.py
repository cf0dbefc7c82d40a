"""`tokmask robustness`: how scores fall on masked and misspelt texts and on unseen words, against p of training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokmask_peft.artifacts import Result, find_saved, write_json
from tokmask_peft.console import make_console
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.encoding import Window
from tokmask_peft.inference.classifier import Classifier, load
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.pattern import maskable_table, masked_positions, word_start_table
from tokmask_peft.study.diagnostics.perturbations import alphabet, misspell, misspell_text, unseen_words, vocabulary
from tokmask_peft.study.diagnostics.plans import Member
from tokmask_peft.study.diagnostics.reports import make_folder, robustness_report
from tokmask_peft.study.report import Report
from tokmask_peft.study.statistics import spread
from tokmask_peft.tasks import Example, get_task
from tokmask_peft.training.environment import versions
from tokmask_peft.training.metrics import Predictions, scores

METRICS = ("f1_macro", "f1_weighted", "accuracy")
_FILE = "robustness.json"
Labels = list[NDArray[np.int64]]
"""Label ids of each text: `[1]` or `[words]`."""


@dataclass(frozen=True, slots=True)
class Perturbations:
    """Masking rates and shares of misspelt words, all above 0, and how often each is drawn; scores are means of draws.

    The seed is the same for all runs. `limit` scores at most this many texts, drawn at random.
    """

    rates: tuple[float, ...]
    noise: tuple[float, ...]
    draws: int
    seed: int = 0
    limit: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def score_perturbed(
    classifier: Classifier, texts: Sequence[Example], known: set[str], what: Perturbations, batch_size: int = 64
) -> dict[str, Any]:
    """Return scores on the texts as they are, perturbed, and split by unseen words; JSON-able.

    Args:
        classifier: from `load`. As in `predict`, a text longer than those of training is read in windows, not cut.
        texts: labelled.
        known: the words of the training texts, from `vocabulary`.
        what: rates, shares and draws.
        batch_size: windows per forward pass.
    """
    if what.limit is not None and what.limit < len(texts):
        chosen = np.random.default_rng([what.seed, 0]).permutation(len(texts))[: what.limit]
        texts = [texts[index] for index in sorted(chosen)]
    ids = {label: number for number, label in enumerate(classifier.labels)}
    gold = [np.array([ids[tag] for tag in example.tags], dtype=np.int64) for example in texts]
    words_given = get_task(classifier.task).words_given
    given: list[Any] = [list(example.words) if words_given else example.string for example in texts]
    plain = predicted(classifier, given, batch_size)

    def mean(rounds: Sequence[Labels]) -> dict[str, Any]:
        found = [scores(*Predictions(gold, one).flat(), classifier.labels) for one in rounds]
        means = {metric: float(np.mean([one[metric] for one in found])) for metric in METRICS}
        return {**means, "f1_macro_by_draw": [one["f1_macro"] for one in found]}

    letters = alphabet(word for example in texts for word in example.words)
    change: Any = misspell if words_given else misspell_text

    def misspelt(share: float, draw: int) -> Labels:
        changed = [change(text, share, (what.seed, draw, number), letters) for number, text in enumerate(given)]
        return predicted(classifier, changed, batch_size)

    draws = range(what.draws)
    masked = _Masks(classifier, given, what.seed, batch_size).predicted if what.rates else None
    return {
        "texts": len(texts),
        "clean": mean([plain]),
        "mask": [{"at": rate, **mean([masked(rate, draw) for draw in draws])} for rate in what.rates if masked],
        "noise": [{"at": share, **mean([misspelt(share, draw) for draw in draws])} for share in what.noise],
        "words": by_unseen(texts, gold, plain, known, classifier.labels),
    }


def by_unseen(
    texts: Sequence[Example], gold: Labels, predicted: Labels, known: set[str], labels: Sequence[str]
) -> dict[str, Any]:
    """Score texts with and without unseen words separately; in token tasks seen and unseen words."""
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

    def __init__(self, classifier: Classifier, texts: Sequence[Any], seed: int, batch_size: int) -> None:
        self._classifier, self._count, self._seed, self._batch_size = classifier, len(texts), seed, batch_size
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
        self._starts = word_start_table(tokenizer, rows)[self._ids] if self._config.unit != "token" else None

    def predicted(self, rate: float, draw: int) -> Labels:
        unit, length = self._config.unit, self._config.span_length
        masked = masked_positions(
            self._ids, rate, self._seed, draw, 0, self._maskable, self._starts, unit, length
        ).numpy()
        hidden = [masked[number, : len(window.ids)] for number, window in enumerate(self._windows)]
        forward = self._classifier.forward
        logits = forward.logits(self._windows, self._batch_size, self._classifier.occlusion, hidden)
        return _label_ids(self._classifier, self._windows, logits, self._count)


def predicted(classifier: Classifier, texts: Sequence[Any], batch_size: int) -> Labels:
    """Return the label ids of each text, as `Classifier.predict` chooses them."""
    windows = classifier.encoder.windows(texts)
    logits = classifier.forward.logits(windows, batch_size)
    return _label_ids(classifier, windows, logits, len(texts))


def _label_ids(
    classifier: Classifier, windows: Sequence[Window], logits: Sequence[NDArray[np.float32]], texts: int
) -> Labels:
    of_text: list[list[int]] = [[] for _ in range(texts)]
    for number, window in enumerate(windows):
        of_text[window.text].append(number)
    join = get_task(classifier.task).join
    return [join([windows[n] for n in own], [logits[n] for n in own]).argmax(-1) for own in of_text]


def robustness(
    members: Sequence[Member],
    what: Perturbations,
    folder: Path,
    *,
    backbone: str | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Report:
    """Score the runs and write the report; a run that was already scored in the same way is not scored again.

    Raises:
        RunError, DataError, ModelError: with what to do.
    """
    console = make_console(quiet)
    make_folder(folder)
    known = _read(folder / _FILE)
    runs: dict[str, dict[str, Any]] = {}
    for number, member in enumerate(members, start=1):
        key = _key(member, what)
        note = ", already scored" if key in known else ""
        console.print(f"{number} of {len(members)}: {member.run.root} ({member.group}){note}", markup=False)
        found = known.pop(key, None) or {"key": key, **_score(member, what, backbone, device)}
        runs[key] = {**found, "group": member.group}
        write_json(folder / _FILE, {"runs": list(runs.values()), "known": list(known.values())})
    return robustness_report(analyse(list(runs.values()), what), folder, known=list(known.values()))


def _score(member: Member, what: Perturbations, backbone: str | None, device: str | None) -> dict[str, Any]:
    recipe = member.recipe
    corpus = load_corpus(recipe.data.expanded(), recipe.seed)
    split = "test" if corpus.test else "validation"
    classifier = load(find_saved(member.run.root, backbone), device)
    found = score_perturbed(classifier, corpus.test or corpus.validation, vocabulary(corpus.train), what)
    mask = None
    if what.rates:  # without rates a model that has no mask token can be scored too
        mask = {"unit": recipe.masking.unit, "token": classifier.occlusion.mask_token.reason}
    reported = None
    if member.run.finished() and what.limit is None:
        result = Result.from_dict(json.loads(member.run.result.read_text(encoding="utf-8")))
        reported = (getattr(result, split) or {}).get("f1_macro")
    about = {"run": str(member.run.root), "seed": recipe.seed, "p": recipe.masking.p, "split": split}
    about["task"] = recipe.data.task
    return {**about, "mask_token": mask, **found, "reported": reported}


def analyse(runs: Sequence[dict[str, Any]], what: Perturbations) -> dict[str, Any]:
    """Return means over the runs of each group, JSON-able."""
    groups = []
    for name in dict.fromkeys(run["group"] for run in runs):
        own = [run for run in runs if run["group"] == name]
        rows = [{"kind": "clean", "at": 0.0, **_over_runs([run["clean"] for run in own], own)}]
        for kind in ("mask", "noise"):
            for number, one in enumerate(own[0][kind]):
                rows.append({"kind": kind, "at": one["at"], **_over_runs([run[kind][number] for run in own], own)})
        for kind in ("seen", "unseen"):
            parts = [run["words"][kind] for run in own]
            if all(part["items"] for part in parts):
                items = sum(part["items"] for part in parts) / len(parts)
                rows.append({"kind": kind, "at": 0.0, "items": items, **_over_runs(parts, own)})
        groups.append({"group": name, "p": own[0]["p"], "seeds": [run["seed"] for run in own], "rows": rows})
    return {
        "disturbances": what.to_dict(),
        **{key: runs[0][key] for key in ("task", "split", "texts", "mask_token")},
        "groups": groups,
        "runs": list(runs),
        "versions": versions(),
    }


def _over_runs(parts: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, deviation and interval over runs of the scores, and of the macro-F1 lost against clean texts."""
    found: dict[str, Any] = {metric: spread([part[metric] for part in parts]) for metric in METRICS}
    found["loss"] = spread([run["clean"]["f1_macro"] - part["f1_macro"] for part, run in zip(parts, runs, strict=True)])
    return found


def _key(member: Member, what: Perturbations) -> str:
    """Return what a score depends on: the adapter's weights and the perturbations."""
    weights = hashlib.sha256()
    for file in sorted(member.run.adapter.glob("adapter_model.*")):
        weights.update(file.read_bytes())
    content = [str(member.run.root.resolve()), weights.hexdigest(), what.to_dict()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the runs that earlier commands have scored, by key."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {run["key"]: run for run in (*found["runs"], *found.get("known", ()))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
