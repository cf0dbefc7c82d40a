"""A small app to try an adapter in the browser (extra `demo`). It contacts no other server, not even for fonts."""

import contextlib
import os
import socket
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from tokmask_peft.artifacts import is_run, open_run
from tokmask_peft.console import baseline_verdict
from tokmask_peft.errors import MaskTokenError, ModelError, TokmaskError
from tokmask_peft.examples import Pair
from tokmask_peft.html import environment, influence_words, label_legend, label_words
from tokmask_peft.hub.card import plain
from tokmask_peft.tasks import get_task

HOST = "127.0.0.1"
_MOST_WORDS = 300  # explained: each word costs a forward pass
_MOST_CHARACTERS = 10_000  # of a text
_MOST_BYTES = 200_000  # of a request: such a text in JSON, where a letter may take twelve
_MOST_WAITING = 16  # texts of all visitors; one is answered at a time
_MOST_CLASSES = 8
_MOST_EXAMPLES, _LONGEST_EXAMPLE = 4, 200
_FONTS = ("system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")


def check_address(host: str, port: int | None) -> None:
    """Raise a ModelError if the app cannot listen there, before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"{host}:{port}" if port else host
        problem = f"the demo cannot listen on {where} ({error.strerror}); give another --host or --port"
        raise ModelError(problem, code="bad-address") from None


def answer(classifier: Any, text: Any) -> tuple[dict[str, float] | None, Markup]:
    """Return a text's (or `Pair`'s) label probabilities, none for words, and coloured words, or a problem, as HTML."""
    from tokmask_peft.inference.explain import explain

    task = get_task(classifier.task)
    if (length := len(str(text))) > _MOST_CHARACTERS:
        problem = f"the text has {length:,} characters, and only up to {_MOST_CHARACTERS:,} are answered here"
        return None, _page(problem=f"{problem}; for longer ones use: tokmask predict")
    try:
        (found,) = classifier.predict([text])
        if task.words_given:
            sure = [row[label] for row, label in zip(found.probabilities, found.labels, strict=True)]
            tinted = label_words(found.words, found.marks, found.all_marks, sure)
            rows, legend = list(zip(found.words, found.labels, sure, strict=True)), label_legend(found.all_marks)
            return None, _page(rows=rows, words=tinted, legend=legend, entities=found.entities)
        words, explanation, note = text.split(), None, ""
        if len(words) > _MOST_WORDS:
            note = f"Without colours: the text has {len(words):,} words, and only up to {_MOST_WORDS} are coloured."
        else:
            try:
                (explanation,) = explain(classifier, [text])
            except MaskTokenError as error:
                note = f"Without colours: {error}"
        tinted = influence_words(*(explanation.words, explanation.influences) if explanation else (words, ()))
        label, given = explanation.label if explanation else None, ""
        if task.several:
            given = f"labels: {', '.join(found.labels)}" if found.labels else "no label"
        return found.probabilities, _page(words=tinted, label=label, note=note, given=given)
    except TokmaskError as error:
        return None, _page(problem=str(error).replace("texts[0]", "the text"))


def _page(rows: Sequence[Any] = (), problem: str = "", entities: Sequence[Any] = (), **values: Any) -> Markup:
    template = environment().get_template("demo.html.j2")
    return Markup(template.render(rows=rows, problem=problem, entities=entities, **values))  # noqa: S704 - the template escapes


def of_run(model: str) -> tuple[str, list[str | Pair]]:
    """Return a sentence on a run's scores, and texts of its data for some labels; empty if not a run, or unreadable."""
    if not is_run(model):
        return "", []
    run = open_run(model)
    result = run.result
    sentence = f"Macro-F1 on {result.scored_split}: {result.scored['f1_macro']:.4f}. "
    sentence += baseline_verdict(result.scored, result.baseline) or "No baseline was scored."
    texts: dict[str, str | Pair] = {}
    from tokmask_peft.training.evaluate import split_examples

    with contextlib.suppress(TokmaskError):
        for example in split_examples(run.recipe, result.scored_split, None, run.folder.adapter)[0]:
            if len(example.string) <= _LONGEST_EXAMPLE:
                text = example.text if isinstance(example.text, Pair) else example.string
                tags = example.tags[:1] if get_task(run.recipe.data.task).words_given else example.tags
                texts.setdefault(", ".join(tags), text)
    return sentence, list(texts.values())[:_MOST_EXAMPLES]


def build(classifier: Any, name: str, about: str = "", examples: Sequence[str | Pair] = ()) -> Any:
    """Return the app, a `gradio.Blocks`, with a title, a sentence and texts; a model of pairs has two boxes."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    task = get_task(classifier.task)
    calibrated = "" if classifier.temperature == 1 else "Probabilities are calibrated on validation texts."

    def respond(*given: str) -> Any:
        first, *second = (text or "" for text in given)
        chances, page = answer(classifier, Pair(first, *second) if second else first)
        return str(page) if task.words_given else (chances, str(page))

    with gradio.Blocks(title=f"{name}: demo", analytics_enabled=False) as app:
        gradio.Markdown(f"# {plain(name)}\n{task.description.capitalize()}. {calibrated}\n\n{plain(about)}")
        boxes = [
            gradio.Textbox(
                label=label,
                lines=3,
                max_lines=12,
                max_length=_MOST_CHARACTERS,
                placeholder="Type or paste a text",
                autofocus=number == 0,
            )
            for number, label in enumerate(classifier.pair or ["Text"])
        ]
        button = gradio.Button("Classify", variant="primary")
        if examples:
            rows = [list(one) if isinstance(one, Pair) else [one] for one in examples]
            gradio.Examples(rows, boxes, label="Examples from the data", cache_examples=False)
        outputs = []
        if not task.words_given:
            count = min(len(classifier.labels), _MOST_CLASSES)
            # room for the answer, so that nothing moves when it comes
            gradio.HTML(f"<style>#label {{ min-height: {6.8 + 2.1 * count:.1f}rem }}</style>", padding=False)
            outputs.append(gradio.Label(label="Label", num_top_classes=count, elem_id="label"))
        outputs.append(gradio.HTML("<p class='note'>The answer appears here.</p>", label="Words", elem_id="words"))
        gradio.on([button.click, *(box.submit for box in boxes)], respond, inputs=boxes, outputs=outputs)
    app.queue(max_size=_MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return app


class _Gate:
    """Middleware that refuses uploads, for which gradio has an open address, and requests that are too large."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        too_large = int(headers.get(b"content-length", 0)) > _MOST_BYTES or b"transfer-encoding" in headers
        upload = scope["path"].rstrip("/").endswith(("/upload", "/upload_progress"))
        if not too_large and not upload:
            return await self.app(scope, receive, send)
        await send({"type": "http.response.start", "status": 404 if upload else 413, "headers": []})
        return await send({"type": "http.response.body", "body": b""})


def launch(app: Any, host: str = HOST, port: int | None = None, *, share: bool = False) -> Any:
    """Start the server and return what gradio returns: its app, the local and the public address.

    The default address is visible to this machine only, the default port is a free one from 7860 on; `share` opens a
    public link through gradio's servers.
    """
    import gradio
    from starlette.middleware import Middleware

    styles = (files("tokmask_peft.report") / "templates" / name for name in ("words.css", "demo.css"))
    return app.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=gradio.themes.Base(primary_hue="blue", font=_FONTS, font_mono=("ui-monospace", "monospace")),
        css="".join(style.read_text(encoding="utf-8") for style in styles),
        app_kwargs={"middleware": [Middleware(_Gate)]},
    )
