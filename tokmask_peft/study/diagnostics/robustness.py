"""`tokmask robustness`: how scores fall on masked and misspelt texts and on unseen words, against p of training."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tokmask_peft.artifacts import find_saved, open_run
from tokmask_peft.console import make_console
from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.encoding import Window
from tokmask_peft.errors import RunError, read_json, write_json
from tokmask_peft.inference.classifier import Classifier, load
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.masking.pattern import maskable_table, masked_positions, word_start_table
from tokmask_peft.study.diagnostics.perturbations import alphabet, misspell, misspell_text, unseen_words, vocabulary
from tokmask_peft.study.diagnostics.plans import Member, Perturbations
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


def score_perturbed(
    classifier: Classifier, texts: Sequence[Example], known: set[str], what: Perturbations, batch_size: int = 64
) -> dict[str, Any]:
    """Return scores on labelled texts as they are, perturbed, and split by unseen words; JSON-able.

    As in `predict`, a text longer than those of training is read in windows, not cut; `batch_size` is windows per
    forward pass. `known` are the words of the training texts, from `vocabulary`.
    """
    if what.limit is not None and what.limit < len(texts):
        chosen = np.random.default_rng([what.seed, 0]).permutation(len(texts))[: what.limit]
        texts = [texts[index] for index in sorted(chosen)]
    ids = {label: number for number, label in enumerate(classifier.labels)}
    gold = [np.array([ids[tag] for tag in example.tags], dtype=np.int64) for example in texts]
    words_given = get_task(classifier.task).words_given
    given: list[Any] = [list(example.words) if words_given else example.string for example in texts]
    windows = classifier.encoder.windows(given)
    plain = _predicted(classifier, windows, batch_size)

    def mean(rounds: Sequence[Labels]) -> dict[str, Any]:
        found = [scores(*Predictions(gold, one).flat(), classifier.labels) for one in rounds]
        means = {metric: float(np.mean([one[metric] for one in found])) for metric in METRICS}
        return {**means, "f1_macro_by_draw": [one["f1_macro"] for one in found]}

    letters = alphabet(word for example in texts for word in example.words)
    change: Any = misspell if words_given else misspell_text

    def misspelt(share: float, draw: int) -> Labels:
        changed = [change(text, share, (what.seed, draw, number), letters) for number, text in enumerate(given)]
        return predicted(classifier, changed, batch_size)

    def rows(values: Sequence[float], perturbed: Callable[[float, int], Labels]) -> list[dict[str, Any]]:
        return [{"at": at, **mean([perturbed(at, draw) for draw in range(what.draws)])} for at in values]

    masked = []
    if what.rates:  # without rates a model that has no mask token can be scored too
        masks = _masks(classifier, windows, what.seed)
        masked = rows(what.rates, lambda rate, draw: _predicted(classifier, windows, batch_size, masks(rate, draw)))
    return {
        "texts": len(texts),
        "clean": mean([plain]),
        "mask": masked,
        "noise": rows(what.noise, misspelt),
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


def predicted(classifier: Classifier, texts: Sequence[Any], batch_size: int) -> Labels:
    """Return the label ids of each text, as `Classifier.predict` chooses them."""
    return _predicted(classifier, classifier.encoder.windows(texts), batch_size)


def _predicted(
    classifier: Classifier, windows: Sequence[Window], batch_size: int, hidden: Sequence[Any] = ()
) -> Labels:
    logits = classifier.forward.logits(windows, batch_size, classifier.occlusion if hidden else None, hidden)
    of_text: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        of_text.setdefault(window.text, []).append(number)
    join, parts = get_task(classifier.task).join, [of_text[text] for text in sorted(of_text)]
    return [join([windows[n] for n in own], [logits[n] for n in own]).argmax(-1) for own in parts]


def _masks(classifier: Classifier, windows: Sequence[Window], seed: int) -> Callable[[float, int], list[Any]]:
    """Return what draws the masks of training for each window, given rate and draw: same rule, unit and protection."""
    config, tokenizer = classifier.masking or TokenMaskConfig(), classifier.tokenizer
    rows, padding = len(classifier.occlusion.maskable), int(tokenizer.pad_token_id)
    ids = pad_sequence([torch.tensor(window.ids) for window in windows], batch_first=True, padding_value=padding)
    maskable = maskable_table(tokenizer, rows, {*config.protect, padding})[ids]
    starts = word_start_table(tokenizer, rows)[ids] if config.unit != "token" else None

    def draw_masks(rate: float, draw: int) -> list[Any]:
        masked = masked_positions(ids, rate, seed, draw, 0, maskable, starts, config.unit, config.span_length).numpy()
        return [row[: len(window.ids)] for row, window in zip(masked, windows, strict=True)]

    return draw_masks


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
    mask = {"unit": recipe.masking.unit, "token": classifier.occlusion.mask_token.reason} if what.rates else None
    reported = None
    if member.run.finished() and what.limit is None:
        reported = (getattr(open_run(member.run.root).result, split) or {}).get("f1_macro")
    return {
        "run": str(member.run.root),
        "seed": recipe.seed,
        "p": recipe.masking.p,
        "split": split,
        "task": recipe.data.task,
        "mask_token": mask,
        **found,
        "reported": reported,
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


def _key(member: Member, what: Perturbations) -> str:
    """Return what a score depends on: the adapter's weights and the perturbations."""
    weights = hashlib.sha256()
    for file in sorted(member.run.adapter.glob("adapter_model.*")):
        weights.update(file.read_bytes())
    content = [str(member.run.root.resolve()), weights.hexdigest(), asdict(what)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the runs that earlier commands have scored, by key."""
    with contextlib.suppress(RunError, KeyError, TypeError):
        found = read_json(file, RunError, "bad-report")
        return {run["key"]: run for run in (*found["runs"], *found.get("known", ()))}
    return {}
