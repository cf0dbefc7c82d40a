"""The confound study as Markdown, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from findings import Finding

TITLES = {
    "encoder": "Encoder: MiniLM, one label per text (TREC)",
    "words": "Words: MiniLM, language of each word (LinCE Spanish-English)",
    "causal": "Causal model, pooled at the last token (TREC)",
}


def section(result: Mapping[str, Any]) -> str:
    """Return the section of the confound study.

    Args:
        result: content of `results/confounds.json`.
    """
    parts = ["## The confounds of the authors' code, one at a time", _found(result), _protocol(result)]
    for name, group in result["groups"].items():
        parts += [f"### {TITLES[name]}", _table(result, group)]
        parts += [text for text in (_facts(name, result, group), _selection(group)) if text]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(result: Mapping[str, Any]) -> Finding:
    """Say what lifting a confound clearly changed, and what masking clearly did at all."""
    cells: dict[str, list[tuple[str, Mapping[str, Any]]]] = {"change": [], "difference": []}
    for name, group in result["groups"].items():
        for row in group["arms"]:
            for p, rate in row["rates"].items():
                for what in cells:
                    if what in rate:
                        cells[what].append((f"{name}, {row['lifted']}, p = {p}", rate[what]))
    changed = _clear(cells["change"], (-1, 1))
    raised, lowered = (_clear(cells["difference"], (sign,)) for sign in (1, -1))
    return Finding(
        "The authors' protocol on small models, its confounds changed one at a time: that clearly changed what masking "
        f"does in {len(changed)} of {len(cells['change'])} comparisons{_listed(changed)}",
        f"masking itself clearly raised macro-F1 in {len(raised)} of {len(cells['difference'])} cells{_listed(raised)} "
        f"and clearly lowered it in {len(lowered)}{_listed(lowered)}",
    )


def _found(result: Mapping[str, Any]) -> str:
    return (
        f"**{headline(result)}** Clearly: both the t interval over {len(result['seeds'])} seeds and the bootstrap "
        "interval over seeds and texts exclude 0, without a correction for the number of comparisons: about one in "
        "twenty would by chance. So few seeds and small training sets show large effects only: no clear change is not "
        "the same as no change."
    )


def _clear(cells: Sequence[tuple[str, Mapping[str, Any]]], signs: Sequence[int]) -> list[str]:
    """Name the cells that are clear and of one of the signs."""
    return [
        f"{name}: {_signed(found['mean'])}"
        for name, found in cells
        if found["clear"] and (1 if found["mean"] > 0 else -1) in signs
    ]


def _listed(names: Sequence[str]) -> str:
    return f" [{'; '.join(names)}]" if names else ""


def _protocol(result: Mapping[str, Any]) -> str:
    """Say what is as in the authors' code, and what is not."""
    sizes = "; ".join(
        f"{name}: {one['train']} training texts, at most {one['epochs']} epochs, batch {one['batch_size']}, nominal "
        f"rate {one['learning_rate']:g}, patience {one['patience']}"
        for name, one in result["settings"].items()
    )
    return (
        "As in the authors' code (Sean652039/Token-Masking at fad3fc1): full fine-tuning with AdamW (weight "
        "decay .01), focal loss with gamma 1 on class-weighted cross entropy, dropout off after epoch 1, a "
        "linear warm-up ten times as long as the run, early stopping and the checkpoint by the set that is "
        "reported. Different here: small models and few texts, hence a higher nominal learning rate, of which "
        "a run reaches a tenth (theirs, 2e-5, would learn nothing in so few steps); smaller batches; and 2 "
        "epochs of patience where theirs are 10 of up to 2,000, so that most runs end at the last epoch and "
        "masked runs cannot train longer, as theirs did. Warm-up is lifted to a tenth of the run, up to the "
        "rate that the authors' schedule ends at: the nominal one, chosen for the long warm-up, would be ten "
        "times too high. In the encoder [MASK] is right, as in their mBERT runs; its arms with other mask tokens take "
        "in what their code does where a tokenizer has none. Hashtags and length change together. Special tokens are "
        "never masked, padding in the causal arms only. "
        f"{sizes}. Each arm has its own p = 0, unless what it lifts acts on masked tokens alone; for one seed "
        "all arms share texts, initial head and batch order, and masked positions nest across p. "
        f"Command: `{result['command']}`; {result['precision']} for MiniLM."
    )


def _table(result: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    rates = [f"{p:g}" for p in result["rates"] if p > 0]
    rates = [p for p in rates if any(p in row["rates"] for row in group["arms"])]
    header = ["changed", "macro-F1, p = 0"]
    header += [f"p = {p} minus p = 0" for p in rates] + [f"difference, changed minus theirs, p = {p}" for p in rates]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in group["arms"]:
        cells = [row["lifted"], f"{row['rates']['0']['score']['mean']:.3f}"]
        for what in ("difference", "change"):
            cells += [_cell(row["rates"][p].get(what)) if p in row["rates"] else "not run" for p in rates]
        lines.append("| " + " | ".join(cells) + " |")
    note = "In brackets: 95% t interval over seeds; bold where the bootstrap, too, excludes 0."
    left_out = [f"{p:g}" for p in result["rates"] if p > 0 and f"{p:g}" not in rates]
    if left_out:
        note += f" Not run with every seed, and left out: p = {', '.join(left_out)}."
    return "\n".join(lines) + "\n\n" + note


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["interval"] or (float("nan"), float("nan"))
    text = f"{_signed(found['mean'])} [{_signed(low)}, {_signed(high)}]"
    return f"**{text}**" if found["clear"] else text


def _facts(name: str, result: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """Say what the mechanism of a confound did in these runs."""
    rows = {row["arm"]: row["rates"] for row in group["arms"]}
    theirs = rows["authors"]
    if name == "words" and "whole-texts" in rows:
        whole = rows["whole-texts"]
        pairs = ", ".join(
            f"p = {p}: {theirs[p]['score_all']['mean']:.3f} against {whole[p]['score_all']['mean']:.3f}"
            for p in theirs
            if p in whole
        )
        return (
            f"Without hashtags and at length 15, {theirs['0']['scored_share']:.1%} of the test words are scored at all "
            f"({whole['0']['scored_share']:.1%} of whole texts). Macro-F1 with all other words counted as errors, the "
            f"authors' protocol against whole texts: {pairs}."
        )
    if name == "causal":
        moved = ", ".join(f"{rate['moved_share']:.0%} at p = {p}" for p, rate in theirs.items() if p != "0")
        model = result["language_model"]
        unseen = "" if model["texts_with_id_0"] else ", so that it, too, is a row that no text uses"
        return (
            f"Texts are padded to 20 sub-tokens. Masked padding moved the pooled position of this share of the "
            f"training rows: {moved}. The model is a Qwen2 of {model['shape']['num_hidden_layers']} layers and "
            f"{model['shape']['hidden_size']} units with those {model['rows']} rows of Qwen2.5's vocabulary that the "
            f"texts use, first trained as a language model on {model['texts']} questions without their labels "
            f"({model['epochs']} epochs, training loss {model['loss_by_epoch'][-1]:.2f}); id 0 is {model['id_0']!r}, "
            f"which {model['texts_with_id_0']} of all texts hold{unseen}. It stands for no real backbone: only the "
            "comparison counts."
        )
    reached = "; ".join(
        f"p = {p}: epoch {rate['epoch']['mean']:.1f}, rate {rate['learning_rate']['mean']:.1e}"
        for p, rate in theirs.items()
    )
    stopped = [early for p, rate in theirs.items() if p != "0" for early in rate["stopped_early"]]
    return (
        f"Reported checkpoint under the authors' protocol, mean over seeds: {reached}. Early stopping ended "
        f"{sum(stopped)} of its {len(stopped)} masked runs, the last epoch the others: where masking slows learning "
        "down under a rate that still rises, these differences count the delay, which longer runs might make up, as a "
        "loss."
    )


def _selection(group: Mapping[str, Any]) -> str:
    found = group["selection"]
    return (
        "Macro-F1 of the checkpoint chosen on the set that is reported, minus that of the one chosen on validation: "
        f"{_signed(found['mean'])} on average over {found['runs']} runs ({_signed(found['least'])} to "
        f"{_signed(found['most'])})."
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}"
