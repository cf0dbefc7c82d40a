"""The scores of a run: its best checkpoint on validation and test, compared with a baseline's."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tokmask_peft.artifacts import Result
from tokmask_peft.data.corpus import Corpus
from tokmask_peft.data.encoding import foreign_words
from tokmask_peft.errors import RunError
from tokmask_peft.examples import BETWEEN, Example, Pair
from tokmask_peft.html import file_name
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.spans import SCHEMES
from tokmask_peft.tasks import get_task
from tokmask_peft.training.metrics import (
    Predictions,
    calibrate,
    compared,
    entity_gain,
    entity_scores,
    scores_by_mixing,
    task_scores,
    thresholds_of,
)
from tokmask_peft.training.trainer import OrderedEvalTrainer, Split

MULTILINGUAL = "intfloat/multilingual-e5-small"
DOWNLOAD = (
    f"Set model.backbone={MULTILINGUAL} model.pooling=mean and model.backbone_path=null. If there is no network here, "
    f"download it elsewhere (hf download {MULTILINGUAL} --local-dir e5-small), and set model.backbone_path=e5-small."
)
"""How to train with a backbone of many languages."""
RISEN = 1.5  # times the least loss on validation above which that of the checkpoint is a warning


def baseline_scores(corpus: Corpus, weights: Any, adapter: Predictions) -> dict[str, Any]:
    """Fit logistic regression over character n-grams, and compare it with the adapter on the scored split.

    Validation chooses lower-cased or cased texts, then the class weights, balanced or those of the run, and C. The
    n-grams of the first and the second text of a pair are different features, and so are those that both texts have. In
    token tasks each word is classified without its context. Equal items with equal labels are one row, weighted by
    their number: the same fit in less time (though document frequencies count rows). If a text may have several labels,
    each label has a fit of its own, with balanced weights or none, and a threshold that validation fits.

    `weights` are `[classes]`, `adapter` its predictions for test or, without one, validation. Returns `metrics.scores`,
    `method`, `seconds`, and `metrics.compared`.
    """
    start, task, labels = time.perf_counter(), get_task(corpus.task), corpus.all_labels
    found, chosen = _label_by_label(corpus) if task.several else _item_by_item(corpus, weights)
    by_entity: dict[str, Any] = {}
    if (spans := corpus.spans) is not None:
        legal = [np.array(spans.repaired_ids(row.tolist()), np.int64) for row in found.predicted]
        found = Predictions(found.gold, legal)
        by_entity = entity_scores(found, labels) | {"gain_entities": entity_gain(adapter, found, labels)}
    of_both = "of each text and of both " if isinstance(corpus.train[0].text, Pair) else ""
    features = f"character 1- to 5-grams within words {of_both}(tf-idf)"
    return {
        **task_scores(task, found, labels),
        **by_entity,
        "method": f"{features}, logistic regression ({chosen}; by validation)",
        "seconds": round(time.perf_counter() - start, 1),
        **compared(adapter, found, len(labels)),
    }


def _vectorizers(corpus: Corpus) -> dict[str, Any]:
    """Return what makes features of texts, lower-cased and cased."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    found, usual = {}, {"min_df": 2, "sublinear_tf": True}
    for case in ("lower-cased", "cased"):
        grams = TfidfVectorizer(lowercase=case == "lower-cased", analyzer="char_wb", ngram_range=(1, 5), **usual)
        if isinstance(corpus.train[0].text, Pair):
            of_both = functools.partial(pair_grams, grams=grams.build_analyzer())
            grams = TfidfVectorizer(analyzer=of_both, **usual)
        found[case] = grams
    return found


def _label_by_label(corpus: Corpus) -> tuple[Predictions, str]:
    """Return the answers of a fit for each label, with thresholds fitted on validation, and what was chosen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    task, labels = get_task(corpus.task), corpus.all_labels
    ids = {label: number for number, label in enumerate(labels)}
    learned = np.array([[label in example.tags for label in corpus.labels] for example in corpus.train], dtype=np.int64)
    parts = (corpus.train, corpus.validation, corpus.test or corpus.validation)
    validation, scored = ([np.array(task.gold_ids(one, ids)) for one in part] for part in parts[1:])
    train, *others = ([example.string for example in part] for part in parts)
    features = {
        case: [vectorizer.fit_transform(train), *map(vectorizer.transform, others)]
        for case, vectorizer in _vectorizers(corpus).items()
    }

    def fit(case: str, balance: str, c: float) -> tuple[float, Predictions]:
        one = LogisticRegression(C=c, max_iter=300, tol=3e-4, class_weight=None if balance == "none" else balance)
        model = OneVsRestClassifier(one).fit(features[case][0], learned)
        seen, new = (np.asarray(model.decision_function(rows)) for rows in features[case][1:])
        cuts = task.fit_cuts(seen, np.concatenate(validation))
        found, answers = (
            Predictions(gold, [task.choose(row[None], cuts, len(labels)) for row in logits])
            for gold, logits in ((validation, seen), (scored, new))
        )
        return task_scores(task, found, labels)["f1_macro"], answers

    answers, chosen = _best_fit(fit, "none")
    return answers, f"label by label, {chosen}"


def _item_by_item(corpus: Corpus, weights: Any) -> tuple[Predictions, str]:
    """Return the answers of one fit of all items, and what was chosen."""
    from sklearn.linear_model import LogisticRegression

    task, labels = get_task(corpus.task), corpus.all_labels
    ids = {label: number for number, label in enumerate(labels)}
    counted = Counter(item for example in corpus.train for item in task.items(example))
    gold, times = np.array([ids[label] for _, label in counted]), np.array(list(counted.values()), dtype=np.float64)
    of_run = np.ones(len(corpus.labels)) if weights is None else np.array(weights)
    by_class = {"balanced": 1 / np.bincount(gold, times), "of the run": of_run}
    vectorizers = _vectorizers(corpus)
    texts = [text for text, _ in counted]
    features = {case: vectorizer.fit_transform(texts) for case, vectorizer in vectorizers.items()}

    def answers(model: Any, vectorizer: Any, examples: Sequence[Example]) -> Predictions:
        items = [task.items(example) for example in examples]
        texts = sorted({text for found in items for text, _ in found})
        answer = dict(zip(texts, model.predict(vectorizer.transform(texts)), strict=True))
        golds = [np.array([ids[label] for _, label in found], dtype=np.int64) for found in items]
        return Predictions(golds, [np.array([answer[text] for text, _ in found], dtype=np.int64) for found in items])

    def fit(case: str, kind: str, c: float) -> tuple[float, Callable[[Sequence[Example]], Predictions]]:
        weight = times * by_class[kind][gold]
        model = LogisticRegression(C=c, max_iter=300, tol=3e-4)
        model.fit(features[case], gold, sample_weight=weight * times.sum() / weight.sum())
        answer = functools.partial(answers, model, vectorizers[case])
        return task_scores(task, answer(corpus.validation), labels)["f1_macro"], answer

    answer, chosen = _best_fit(fit, "of the run")
    return answer(corpus.test or corpus.validation), chosen


def _best_fit(fit: Callable[[str, str, float], tuple[float, Any]], other: str) -> tuple[Any, str]:
    """Return the answers of the best fit on validation, and its settings: case first, then class weights and C."""
    tried = {(case, "balanced", 1.0): fit(case, "balanced", 1.0) for case in ("lower-cased", "cased")}
    case = max(tried, key=lambda settings: tried[settings][0])[0]
    for settings in ((case, "balanced", 10.0), (case, other, 1.0), (case, other, 10.0)):
        tried[settings] = fit(*settings)
    case, kind, c = best = max(tried, key=lambda settings: tried[settings][0])
    return tried[best][1], f"{case}, class weights {kind}, C = {c:g}"


def pair_grams(text: str, grams: Callable[[str], list[str]]) -> list[str]:
    """Return the n-grams of a pair, given as `Example.string`: those of each text, and once more those of both."""
    first, second = map(grams, text.split(f" {BETWEEN} ", 1))
    return [*first, *(f"second {gram}" for gram in second), *(f"both {gram}" for gram in {*first} & {*second})]


def scores_of(recipe: Recipe, found: Predictions, labels: Sequence[str], by_mixing: bool = True) -> dict[str, Any]:
    """Return the scores of a split, with those of its task, and `by_mixing` if the recipe names language labels."""
    task, languages = get_task(recipe.data.task), recipe.data.language_labels
    result = task_scores(task, found, labels)
    if recipe.data.spans in SCHEMES:
        result |= entity_scores(found, labels)
    if by_mixing and languages and task.words_given:
        result["by_mixing"] = scores_by_mixing(found, labels, languages)
    return result


def score_best(
    trainer: OrderedEvalTrainer,
    recipe: Recipe,
    corpus: Corpus,
    splits: Mapping[str, Split],
    probed: Predictions | None = None,
) -> tuple[Result, dict[str, Predictions]]:
    """Score the best checkpoint, which the trainer has loaded, next to what the head started from (`probed`).

    Returns what `result.json` will hold, except for decisions and speed, and the predictions for each split.
    """
    task, labels, predictions, logits = get_task(corpus.task), corpus.labels, dict[str, Predictions](), dict[str, Any]()
    cuts: list[float] = []
    for name in ("validation", "test"):
        if name in splits:
            predictions[name], *logits[name] = trainer.predict_windows(splits[name], cuts)
        if name == "validation" and (cuts := task.fit_cuts(*logits[name])):
            chosen = [task.choose(row[None], cuts, len(corpus.all_labels)) for row in logits[name][0]]
            predictions[name] = Predictions(predictions[name].gold, chosen)
    baseline = probe = None
    scored = predictions["test" if corpus.test else "validation"]
    if recipe.training.baseline and trainer.is_world_process_zero():
        baseline = baseline_scores(corpus, trainer.compute_loss_func.weights, scored)
    if probed is not None:
        probe = scores_of(recipe, probed, corpus.all_labels, by_mixing=False)
        probe |= compared(scored, probed, len(corpus.all_labels))
    calibration = calibrate({name: task.calibrated(*found) for name, found in logits.items()})
    if cuts:
        calibration["thresholds"] = thresholds_of(cuts, labels, calibration["temperature"])
    truncation = {name: asdict(splits[name].encoded.truncation) for name in ("train", "validation")}
    result = Result(
        name=recipe.name,
        task=recipe.data.task,
        labels=list(labels),
        seed=recipe.seed,
        masking=recipe.masking.model_dump(mode="json"),
        validation=scores_of(recipe, predictions["validation"], corpus.all_labels, by_mixing=False),
        best_step=trainer.state.best_global_step,
        steps=trainer.state.global_step,
        test=scores_of(recipe, predictions["test"], corpus.all_labels) if "test" in predictions else None,
        calibration=calibration,
        baseline=baseline,
        probe=probe,
        data=corpus.report.to_dict() | {"truncation": truncation},
    )
    return result, predictions


def language_warnings(backbone: str, tokenizer: Any, train: Sequence[Example]) -> list[dict[str, str]]:
    """Return a warning if the tokenizer of a backbone was made for another language than that of the texts."""
    if backbone == MULTILINGUAL or (foreign := foreign_words(tokenizer, (one.string for one in train))) is None:
        return []
    says = f"the backbone {file_name(backbone)} was made for another language: its tokenizer {foreign}"
    says += ". Its scores may be below n-grams"
    return [{"code": "another-language", "message": f"{says}. {DOWNLOAD}", "key": "model.backbone"}]


def warnings_of(result: Result, log: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, str]]:
    """Return what to know before trusting a run's scores, from them and a `log`: code, sentence, and key to change."""
    scored, where, item = result.scored, result.scored_split, get_task(result.task).item
    counts = get_task(result.task).counts_given(scored)
    given = [label for label in result.labels if counts.get(label)]
    found: list[tuple[str, str, str]] = []
    join = "" if "entities" in scored else ", or join {} (data.label_map)"  # B-X is never joined with I-X
    answered = scored["items"] - scored["without_prediction"]
    if len(given) == 1 < len(result.labels) and counts[given[0]] == answered:
        says = f"every {item} of {where} gets the label '{given[0]}', so nothing was learned"
        remedy = "train for more steps (training.epochs, training.batch_size), start with training.head=probe"
        found.append(("one-label", f"{says}: {remedy}, or try another training.learning_rate", "training.epochs"))
    elif never := [label for label in result.labels if label not in given and scored["per_class"][label]["support"]]:
        remedy = f"give rare labels more weight (training.class_weights=inverse){join.format('them')}"
        says = f"no {item} of {where} gets the {_listed(never)}, although some have it: {remedy}"
        found.append(("label-never-predicted", says, "training.class_weights"))
    lacking = [label for label in result.labels if not result.validation["per_class"][label]["support"]]
    if lacking:
        says = f"no {item} of validation has the {_listed(lacking)}, which had no part in choosing the checkpoint"
        remedy = f"set aside a larger share (data.validation){join.format('labels')}"
        found.append(("label-not-in-validation", f"{says}: {remedy}", "data.validation"))
    floors = {"character n-grams": result.baseline, "a linear probe on the frozen backbone": result.probe}
    for name, floor in floors.items():
        if floor is None or floor["verdict"] == "beats":
            continue
        gain = scored["f1_macro"] - floor["f1_macro"]
        interval = f"{gain:+.3f} macro-F1, 95% interval {floor['interval'][0]:+.3f} to {floor['interval'][1]:+.3f}"
        how = "is below" if floor["verdict"] == "does not beat" else "cannot be distinguished from"
        remedy = "a backbone that knows these languages (model.backbone), more texts or more steps (training.epochs)"
        says = f"the score on {where} {how} that of {name} ({interval}): {remedy} may help"
        found.append(("not-above-floor", says, "model.backbone"))
    losses = {row["step"]: (row["eval_loss"], row["epoch"]) for row in log if "eval_loss" in row}
    kept, least = losses.get(result.best_step), min(losses.values(), default=None)
    if kept and least and kept[0] > RISEN * least[0] and kept[1] > least[1]:
        says = f"the loss on validation rose after epoch {least[1]:g}, from {least[0]:.2f} to {kept[0]:.2f} at epoch "
        says += f"{kept[1]:g}, which is kept for its F1: the adapter is too sure of wrong answers"
        remedy = "training.label_smoothing=0.1, adapter.dropout=0.1, fewer epochs (training.epochs) or more texts"
        found.append(("loss-rose", f"{says}; {remedy} may help", "training.epochs"))
    return [{"code": code, "message": f"{says}.", "key": key} for code, says, key in found]


def _listed(labels: Sequence[str]) -> str:
    names = ", ".join(f"'{label}'" for label in labels[:5]) + (f" and {len(labels) - 5} more" if labels[5:] else "")
    return f"label{'s' if labels[1:] else ''} {names}"


def check_best(trainer: OrderedEvalTrainer, result: Result, validation: Split) -> None:
    """Raise a RunError unless the loaded adapter scores as the best one in training did, where texts are cut."""
    name = str(trainer.args.metric_for_best_model)
    found, best = result.validation[name], trainer.state.best_metric
    if validation.encoded.truncation.texts_cut:
        found = trainer.predict(validation.dataset).metrics[f"test_{name}"]
    if best is not None and abs(found - best) > 0.005:
        problem = f"the best checkpoint has {name} {best:.4f} on validation, but loaded again it has {found:.4f}"
        remedy = "no adapter is saved. Please report this with log.jsonl."
        raise RunError(f"{problem}: {remedy}", code="not-the-best")
