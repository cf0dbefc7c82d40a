"""What a run prints: decisions with their reasons, the data report, progress, scores and warnings."""

import contextlib
import gc
import logging
import os
import re
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What moves a cursor, recolours or reorders a terminal, and halves of characters; tabs and new lines stay."""


def printable(text: str) -> str:
    """Return untrusted text in a form that is safe for a terminal: control characters as JSON writes them."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def echo(text: object = "", *, err: bool = False, end: str = "\n") -> None:
    """Print a text on standard output, or on standard error, as `printable` shows it."""
    stream = sys.stderr if err else sys.stdout
    stream.write(printable(str(text)) + end)
    stream.flush()


class SafeConsole(Console):
    """A rich console that shows every string, in tables too, as `printable` does."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into styled text."""
        return super().render_str(printable(text), **options)


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice that was made for the user, with its reason."""

    what: str
    choice: str
    reason: str


def quiet_libraries() -> None:
    """Silence what libraries print in a normal run: loading reports, their progress bars, advice for developers."""
    # first: importing transformers imports bitsandbytes, which warns of optional kernels at once
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # not imported here: `predict` does without it
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|bitsandbytes|accelerate)(\..*)?$")


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Silence libraries, and import without collecting garbage, which takes a sixth of the time and finds nothing."""
    collects = gc.isenabled() and "transformers.modeling_utils" not in sys.modules
    if collects:
        gc.disable()
    try:
        quiet_libraries()
        yield
    finally:
        if collects:
            gc.freeze()
            gc.enable()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the messages about a model while it is loaded, and no others; also a decorator.

    transformers reports the weights of a head, which is new by design, as missing, and draws a bar for a fraction of a
    second; PEFT calls what transformers renamed (`is_gradient_checkpointing`; remove when PEFT has followed).
    """
    import transformers
    from huggingface_hub import utils as hub

    logger, bars = logging.getLogger("transformers.modeling_utils"), transformers.utils.logging
    had_bars, had_downloads = bars.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    bars.disable_progress_bar()  # those of downloads, too
    if had_downloads:
        hub.enable_progress_bars()
    logger.addFilter(_no_load_report)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(_no_load_report)
        if had_bars:
            bars.enable_progress_bar()
            if not had_downloads:
                hub.disable_progress_bars()


def _no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


MOST_CLASSES = 40  # in a terminal
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def stop_signals(handler: Callable[..., object]) -> Iterator[None]:
    """Call `handler` on Ctrl-C, SIGTERM, and the end of the terminal unless nohup ignores it; in the main thread."""

    def handle(number: int, frame: object) -> None:
        for descriptor in (1, 2):  # writing to a terminal that is gone would fail
            with contextlib.suppress(OSError):
                if not os.isatty(descriptor) and stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    mute(descriptor)
        handler(number, frame)

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS if is_main}
    for number, previous in before.items():
        if (number, previous) != (getattr(signal, "SIGHUP", None), signal.SIG_IGN):
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous or signal.SIG_DFL)


def mute(descriptor: int = 1) -> None:
    """Discard what is still written to a closed output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class _Output(SafeConsole):
    """A console that takes the end of its reader (`| head`) as Ctrl-C."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        mute()
        signal.raise_signal(signal.SIGINT)


def make_console(quiet: bool = False) -> Console:
    """Return the console of a run; outside a terminal its lines are wide and are not wrapped at 80 columns."""
    terminal = sys.stdout.isatty()
    return _Output(quiet=quiet, width=None if terminal else 120, highlight=False, soft_wrap=not terminal)


def _table(title: str, words: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """Return a table with columns of words, and then of numbers."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def print_decisions(console: Console, decisions: Sequence[Decision]) -> None:
    """Print what was decided, and why."""
    table = _table("Decisions", ("what", "choice", "reason"))
    for decision in decisions:
        table.add_row(escape(decision.what), f"[bold]{escape(decision.choice)}[/bold]", escape(decision.reason))
    console.print(table)
    console.print()


def print_lines(console: Console, title: str, lines: Sequence[str]) -> None:
    """Print a titled block of plain lines."""
    console.print(f"[italic]{title}[/italic]")
    for line in lines:
        console.print(f"  {line}", markup=False)
    console.print()


def print_scores(console: Console, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a row of scores for each named part."""
    shown = {"f1_macro": "macro-F1", "f1_weighted": "weighted F1", "accuracy": "accuracy"}
    if any("f1_entities" in part for part in parts.values()):
        shown["f1_entities"] = "entity F1"
    table = _table("Scores", ["split"], [*shown.values(), "items"])
    for name, part in parts.items():
        row = [f"{part[score]:.4f}" for score in shown]
        table.add_row(escape(name), *row, f"{part['items']:,}")
    console.print(table)
    for name, part in parts.items():
        if cut := part.get("without_prediction"):
            console.print(f"{name}: {cut:,} words have no prediction and count as errors", markup=False)
        if "f1_samples" in part:
            more = f"micro-F1 {part['f1_micro']:.4f}, F1 by text {part['f1_samples']:.4f}"
            console.print(f"{name}: {more}; accuracy is the share of texts with all labels right", markup=False)
        for row in part.get("by_mixing") or ():
            console.print(f"  code-mixing index {row['cmi']}: macro-F1 {row['f1_macro']:.4f} ({row['posts']:,} posts)")


def print_classes(console: Console, split: str, scores: Mapping[str, Any]) -> None:
    """Print precision, recall, F1 and support of each class of a split; if there are many, those with the lowest F1."""
    classes = list(scores.get("per_class", {}).items())
    table = _table(f"\nBy class on {escape(split)}", ["label"], ["precision", "recall", "F1", "support"])
    if left_out := max(0, len(classes) - MOST_CLASSES):
        classes = sorted(classes, key=lambda pair: pair[1]["f1"])[:MOST_CLASSES]
    for label, found in classes:
        row = [f"{found[score]:.4f}" for score in ("precision", "recall", "f1")]
        table.add_row(escape(label), *row, f"{found['support']:,}")
    if classes:
        console.print(table)
    if left_out:
        console.print(f"and {left_out:,} classes with a higher F1 (the report and --json show all)", markup=False)
    if entities := scores.get("entities"):
        print_classes(console, f"{split}: entities", {"per_class": {"all types": entities, **entities["per_type"]}})
        low, high = entities["interval"]
        console.print(f"95% interval of their F1, over texts: {low:.4f} to {high:.4f}", markup=False)


def print_result(console: Console, result: Any, adapter: Path) -> None:
    """Print the scores of a run, an `artifacts.Result`, next to those of the baseline, and where the adapter is."""
    parts = {
        "validation": result.validation,
        "test": result.test,
        "baseline: character n-grams": result.baseline,
        "frozen features: linear probe": result.probe,
    }
    print_scores(console, {name: part for name, part in parts.items() if part})
    print_classes(console, result.scored_split, result.scored)
    console.print()
    console.print(baseline_verdict(result.scored, result.baseline))
    if result.calibration:
        console.print(calibration_line(result.calibration))
    if thresholds := result.calibration.get("thresholds"):
        listed = ", ".join(f"{label} {value:.3f}" for label, value in thresholds.items())
        console.print(f"Thresholds of the labels, fitted on validation: {listed}.", markup=False)
    for message in beside_verdict(result.warnings):
        console.print(f"Warning: {message}", markup=False)
    console.print(f"\nAdapter: [bold]{escape(str(adapter))}[/bold]", soft_wrap=True)


def beside_verdict(warnings: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the messages of a run's warnings, except for what `baseline_verdict` says."""
    said = "not-above-floor", "character n-grams"
    return [one["message"] for one in warnings if one["code"] != said[0] or said[1] not in one["message"]]


def calibration_line(calibration: Mapping[str, Any]) -> str:
    """Return a sentence on what the temperature does to the probabilities of the test (or validation) texts."""
    split = "test" if "test" in calibration else "validation"
    before, after = (calibration[split][when]["ece"] for when in ("before", "after"))
    error = f"expected calibration error on {split} {before:.4f}"
    if reason := calibration.get("left_out"):
        same = "" if split == "test" else ", the texts it is fitted on"
        return f"Calibration: no temperature is used, because {reason} ({error} without, {after:.4f} with it{same})."
    found = f"Temperature {calibration['temperature']:.3f}, fitted on validation: {error} before, {after:.4f} after."
    return f"{found} It did not help on {split}." if after > before else found


def baseline_verdict(scores: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    """Return a sentence on whether the adapter beats character n-grams on the same split; empty without a baseline."""
    if not baseline:
        return ""
    gain = f"{scores['f1_macro'] - baseline['f1_macro']:+.4f} macro-F1"
    if "interval" in baseline:  # which older runs do not have
        low, high = baseline["interval"]
        gain += f", 95% interval {low:+.4f} to {high:+.4f}"
    if "gain_entities" in baseline:
        low, high = baseline["gain_entities"]
        gain += f"; entity F1 {scores['f1_entities'] - baseline['f1_entities']:+.4f}, {low:+.4f} to {high:+.4f}"
    sentences = {
        "beats": f"The adapter beats the character n-gram baseline ({gain}).",
        "does not beat": f"The adapter does NOT beat the character n-gram baseline ({gain}): "
        "use the baseline, or train longer, or with another learning rate or a larger backbone.",
        "cannot tell": "These texts are not enough to tell whether the adapter beats the character n-gram baseline "
        f"({gain}).",
    }
    return sentences[baseline.get("verdict", "cannot tell")]
