"""A small app to try an adapter in the browser: text in, label and coloured words out. Needs the extra `demo`.

It talks to nobody: no analytics, no version check, no fonts or scripts from elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from tokmask_peft.errors import ExtraError, MaskTokenError, ModelError, TokmaskError

HOST = "127.0.0.1"
_MOST_WORDS = 300  # explained: each word costs a forward pass
_FONTS = ("system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")


def require_gradio() -> None:
    """Check that the app can be made, without importing anything.

    Raises:
        ExtraError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ExtraError("the demo is made with gradio, which is not installed: pip install 'tokmask-peft[demo]'")


def check_address(host: str, port: int | None) -> None:
    """Check that the app can listen there, before a model is loaded.

    Raises:
        ModelError: the address is not of this machine, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"{host}:{port}" if port else host
        raise ModelError(
            f"the demo cannot listen on {where} ({error.strerror}); give another --host or --port"
        ) from None


def answer(classifier: Any, text: str) -> tuple[dict[str, float] | None, Markup]:
    """Classify a text for the app.

    Args:
        classifier: from `load`.
        text: what the user typed.

    Returns:
        Calibrated probabilities in sequence tasks, else none; and HTML with the coloured words, or with what is wrong
        with the text.
    """
    from tokmask_peft.inference.display import influence_words, label_legend, label_words

    try:
        (found,) = classifier.predict([text])
        if classifier.task == "token":
            sure = [row[label] for row, label in zip(found.probabilities, found.labels, strict=True)]
            tinted = label_words(found.words, found.labels, classifier.labels, sure)
            rows = Markup("").join(
                Markup('<tr><th scope="row"><bdi>{}</bdi></th><td>{}</td><td>{:.3f}</td></tr>').format(*row)
                for row in zip(found.words, found.labels, sure, strict=True)
            )
            return None, Markup(
                '{}<p class="words" dir="auto">{}</p><div class="scroll"><table><thead><tr><th scope="col">word</th>'
                '<th scope="col">label</th><th scope="col">probability</th></tr></thead><tbody>{}</tbody></table></div>'
            ).format(label_legend(classifier.labels), tinted, rows)
        words, influences, note = text.split(), (), ""
        if len(words) > _MOST_WORDS:
            note = f"Without colours: they are for texts of up to {_MOST_WORDS} words, and this one has {len(words):,}."
        else:
            try:
                words, influences, note = _explained(classifier, text)
            except MaskTokenError as error:
                note = f"Without colours: {error}"
        return found.probabilities, Markup('<p class="words" dir="auto">{}</p><p class="note">{}</p>').format(
            influence_words(words, influences), note
        )
    except TokmaskError as error:
        return None, _message(str(error).replace("texts[0]", "the text"))


def _explained(classifier: Any, text: str) -> tuple[Any, Any, Markup]:
    from tokmask_peft.inference.explain import explain

    (explanation,) = explain(classifier, [text])
    note = Markup(
        '<span class="words"><span class="for" style="--w:.6">Blue</span> words speak for “{}”, '
        '<span class="against" style="--w:.6">red, dotted</span> ones against it: masked, they lower or raise its '
        "log-odds.</span>"
    ).format(explanation.label)
    return explanation.words, explanation.influences, note


def _message(text: str) -> Markup:
    return Markup('<p class="message" role="alert">{}</p>').format(text)


def build(classifier: Any, name: str) -> Any:
    """Return the app, a `gradio.Blocks`.

    Args:
        classifier: from `load`.
        name: of the model, for the title.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    per = "word" if classifier.task == "token" else "text"

    calibrated = "" if classifier.temperature == 1 else "Probabilities are calibrated on validation texts."

    def respond(text: str) -> Any:
        chances, page = answer(classifier, text or "")
        return str(page) if per == "word" else (chances, str(page))

    with gradio.Blocks(title=f"{name}: demo", analytics_enabled=False) as app:
        gradio.Markdown(f"# {_plain(name)}\nOne label per {per}. {calibrated}")
        text = gradio.Textbox(label="Text", lines=3, max_lines=12, placeholder="Type or paste a text", autofocus=True)
        button = gradio.Button("Classify", variant="primary")
        outputs = []
        if per == "text":
            outputs.append(gradio.Label(label="Label", num_top_classes=min(len(classifier.labels), 8), elem_id="label"))
        outputs.append(gradio.HTML(label="Words", elem_id="words"))
        gradio.on([button.click, text.submit], respond, inputs=text, outputs=outputs)
    return app


def serve(
    app: Any, host: str = HOST, port: int | None = None, *, share: bool = False, said: Callable[[str], None] = print
) -> None:
    """Serve the app until Ctrl-C.

    Args:
        app: from `build`.
        host: address to listen on; the default is seen by this machine only.
        port: port; none takes a free one from 7860 on.
        share: open a public link through gradio's servers.
        said: takes the lines to print.
    """
    _, url, public = launch(app, host, port, share=share)
    said(f"The demo runs at {public or url} (Ctrl-C stops it)")
    app.block_thread()


def launch(app: Any, host: str = HOST, port: int | None = None, *, share: bool = False) -> Any:
    """Start the server and return what gradio does: its app, the local and the public address."""
    import gradio

    theme = gradio.themes.Base(primary_hue="blue", font=_FONTS, font_mono=("ui-monospace", "monospace"))
    styles = files("tokmask_peft.inference") / "words.css", files("tokmask_peft.report") / "templates/demo.css"
    css = "".join(style.read_text(encoding="utf-8") for style in styles)
    return app.launch(
        server_name=host,
        server_port=port,
        share=share,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        footer_links=[],
        theme=theme,
        css=css,
    )


def _plain(name: str) -> str:
    """Return a name that Markdown does not read as its own signs."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+-.!|~$" else letter for letter in name)
