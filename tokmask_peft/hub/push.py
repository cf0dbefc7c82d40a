"""Push the adapter of a run, or the merged model, to the Hugging Face Hub, with huggingface_hub's own login."""

from __future__ import annotations

import json
import mmap
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tokmask_peft import __version__
from tokmask_peft.artifacts import RunFolder, open_finished
from tokmask_peft.errors import HubError, RunError
from tokmask_peft.hub.card import PLACEHOLDER

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_AGAIN = "Push again: what has arrived is not sent twice."


def explain(error: BaseException, api: HfApi, repo_id: str, token: str, seconds: float) -> str:
    """Say what went wrong and what to do.

    Args:
        error: what huggingface_hub raised; the causes behind it are looked at, too.
        api: to ask whose token it is.
        repo_id: the repository.
        token: cut out of whatever the other side said.
        seconds: the time limit for an answer.
    """
    chain = list(_chain(error))
    answer = next((found for one in chain if (found := getattr(one, "response", None)) is not None), None)
    if isinstance(chain[0], ValueError) and "Invalid metadata" in str(chain[0]):
        text = f"the Hub cannot read the head of README.md: {' '.join(str(chain[0]).split()[4:])}"
    elif answer is not None:
        said = next((words for one in chain if (words := getattr(one, "server_message", None))), "")
        text = _by_status(answer.status_code, api, repo_id)
        text += f" The Hub says: {' '.join(said.split())}" if said else ""
    else:
        text = _without_answer(chain, api.endpoint, seconds)
    return text.replace(token, "…")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _by_status(status: int, api: HfApi, repo_id: str) -> str:
    namespace = repo_id.partition("/")[0]
    if status == 401:
        text = "the Hub does not accept your token (401): it is wrong or has expired. Log in again: hf auth login."
        return f"{text} HF_TOKEN in the environment wins over that login." if os.environ.get("HF_TOKEN") else text
    if status == 403:
        return (
            f"your token may not write to {repo_id} (403){_whose(api)}. Push under your own name or an organisation of "
            "yours, with a token that may write (https://huggingface.co/settings/tokens)."
        )
    if status == 404:
        return f"the Hub knows no user or organisation {namespace}, or hides it from your token (404){_whose(api)}."
    if status in {409, 412}:
        return f"{repo_id} was changed by somebody else at the same time ({status}). {_AGAIN}"
    if status == 429:
        return f"the Hub has had too many requests from you (429). Wait some minutes. {_AGAIN}"
    if status >= 500:
        return f"the Hub has trouble of its own ({status}); try later. {_AGAIN}"
    return f"the Hub refused the push to {repo_id} ({status})."


def _whose(api: HfApi) -> str:
    """Say whose token it is, if the Hub tells."""
    from huggingface_hub.errors import HTTPError

    try:
        who = api.whoami()
        names = [who["name"], *(group["name"] for group in who.get("orgs", ()))]
    except (HTTPError, OSError, ValueError, LookupError):
        return ""
    return f"; you are {names[0]}" + (f" and may act for {', '.join(names[1:])}" if names[1:] else "")


def _without_answer(chain: list[BaseException], endpoint: str, seconds: float) -> str:
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    if "TimeoutException" in kinds:
        return f"{endpoint} gave no answer within {seconds:g} seconds. {_AGAIN}"
    if kinds & {"TransportError", "ConnectionError"}:
        return f"the connection to {endpoint} could not be made, or broke ({_words(chain[-1])}). {_AGAIN}"
    return f"the push failed: {_words(chain[0])}. {_AGAIN}"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


_NEEDED = ("README.md", "adapter_config.json", "adapter_model.safetensors")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "chat_template.jinja"),
)
_OURS = ("labels.json", "tokmask.json", "tokmask_config.json", "calibration.json", "confusion_matrix.png")
WEIGHTS = re.compile(r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Names of the files of a merged model, besides the tokenizer's."""
BELONG = frozenset({*_NEEDED, *_TOKENIZER, *_OURS})
"""Names of the files that are pushed; everything else stays where it is."""


@dataclass(frozen=True, slots=True)
class PushFile:
    """A file to push: its name in the repository, and where its content is."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def files_to_push(adapter: Path, repo_id: str) -> tuple[list[PushFile], list[str]]:
    """Return the files of an adapter's folder that belong to it, and the names of those that stay.

    The snippet of the card is given the id of the repository, so that it runs as it stands on the page.

    Raises:
        HubError: one is missing, or is a link, which could lead anywhere.
    """
    if adapter.is_symlink():
        raise HubError(f"{adapter} is a link; push a run whose adapter folder is a folder")
    entries = sorted(adapter.iterdir())
    found = [path for path in entries if path.name in BELONG]
    links = [path.name for path in found if path.is_symlink() or not path.is_file()]
    if links:
        raise HubError(f"{', '.join(links)} in {adapter}: links and folders are not pushed; put the files there")
    missing = [name for name in _NEEDED if name not in {path.name for path in found}]
    if missing:
        raise HubError(f"{', '.join(missing)} is missing in {adapter}: there is nothing complete to push")
    files = [PushFile(path.name, path) for path in found if path.name != "README.md"]
    card = (adapter / "README.md").read_bytes().replace(PLACEHOLDER.encode(), repo_id.encode())
    files.append(PushFile("README.md", card))
    return files, [path.name for path in entries if path.name not in BELONG]


def base_model(config: Path) -> str:
    """Return the backbone that the adapter names.

    Raises:
        HubError: it is a place on this machine, where nobody else can load it from.
    """
    from tokmask_peft.hub.card import hub_id

    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or hub_id(base) is None:
        raise HubError(
            f"the adapter names {base!r} as its backbone, a place on this machine: nobody else could load it. Train "
            "with model.backbone set to the Hub id (model.backbone_path may say where to load it from), or write the "
            f"id into base_model_name_or_path of {config} if it is the same model"
        )
    return str(base)


def check_no_token(files: list[PushFile], token: str) -> None:
    """Refuse to push files that hold the token.

    Raises:
        HubError: one does.
    """
    for file in files:
        if _holds(file.content, token.encode()):
            raise HubError(
                f"{file.name} holds your Hub token: nothing was pushed. Remove it there, and renew the token"
            )


def _holds(content: Path | bytes, token: bytes) -> bool:
    """Say whether a file holds the token; a large one is not read into memory as a whole."""
    if isinstance(content, bytes) or content.stat().st_size == 0:
        return isinstance(content, bytes) and token in content
    with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(token) >= 0


ANSWER_SECONDS = 120.0
"""How long the Hub may take for an answer; huggingface_hub itself would wait for ever."""


def send(files: list[PushFile], repo_id: str, private: bool, token: str, console: Console, merged: bool) -> str:
    """Make the repository if need be, and commit the files."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(token=token, library_name="tokmask-peft", library_version=__version__)
    with _answer_in_time(), _card_warnings(console):
        try:
            url = api.create_repo(repo_id, private=private or None, exist_ok=True)
            before = api.model_info(repo_id)
            if private and not before.private:
                raise HubError(
                    f"{repo_id} exists and is public, so --private cannot hold: nothing was pushed. Make it private in "
                    "its settings on the Hub, push to another name, or leave --private out"
                )
            held = {sibling.rfilename for sibling in before.siblings or ()}
            sent = {file.name for file in files}
            other = "adapter_config.json" if merged else "config.json"
            if other in held:
                raise HubError(
                    f"{repo_id} holds {'an adapter' if merged else 'a whole model'} ({other}), and one repository "
                    "cannot hold both: transformers would load the two together. Push to another name"
                )
            gone = sorted(name for name in held - sent if name in BELONG or (merged and WEIGHTS.fullmatch(name)))
            if gone:
                console.print(f"Removed there, as this run has none: {', '.join(gone)}")
            what, first = ("merged model", "config.json") if merged else ("adapter", "adapter_config.json")
            commit = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(file.name, file.content) for file in files),
                    *(CommitOperationDelete(name) for name in gone),
                ],
                commit_message=f"{'Update' if first in held else 'Add'} the {what}",
            )
        except (HTTPError, OSError, RuntimeError, ValueError, LookupError) as error:
            raise HubError(explain(error, api, repo_id, token, ANSWER_SECONDS)) from None
    if commit.oid == before.sha:
        console.print("The Hub had all of it already.")
    return str(url)


@contextmanager
def _card_warnings(console: Console) -> Iterator[None]:
    """Print what the Hub warns of in the card as a plain line."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    for warning in said:
        if "README.md" in str(warning.message):
            console.print(str(warning.message), markup=False)


@contextmanager
def _answer_in_time() -> Iterator[None]:
    """Give huggingface_hub's client a time limit if it has none."""
    from huggingface_hub.utils import get_session

    client = get_session()
    before = client.timeout
    if before.read is None:
        client.timeout = ANSWER_SECONDS
    try:
        yield
    finally:
        client.timeout = before


def push_adapter(run: str | Path, repo_id: str, private: bool = False, *, quiet: bool = False) -> str:
    """Push the adapter of a finished run, with its tokenizer, labels and model card, to the Hugging Face Hub.

    A repository that exists is updated. Files of an earlier push that this run does not have are removed there;
    files that tokmask_peft never writes are left alone. A repository holds an adapter or a whole model, not both:
    transformers would put the adapter on the model, too.

    Args:
        run: the run folder.
        repo_id: `user/name` or `organisation/name`.
        private: make the repository private. One that exists and is public is refused, not pushed to.
        quiet: print nothing but huggingface_hub's progress bars.

    Returns:
        The address of the repository.

    Raises:
        RunError: the folder is no run, or the run is not finished.
        HubError: with what to do. A push that breaks can be repeated.
    """
    _check_repo_id(repo_id)
    folder = _finished(run)
    files, stay = files_to_push(folder.adapter, repo_id)
    base = base_model(folder.adapter / "adapter_config.json")
    notes = [f"Not pushed: {', '.join(stay)}"] if stay else []
    return _push(files, f"an adapter for {base}", notes, repo_id, private, _login(), quiet, False)


def push_model(
    folder: Path, run: RunFolder, repo_id: str, private: bool = False, *, notes: Sequence[str] = (), quiet: bool = False
) -> str:
    """Push the files of `folder`, a merged model with its card, made from `run`; otherwise as `push_adapter`."""
    _, token = check_push(run.root, repo_id)
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id), encoding="utf-8")
    files = [PushFile(path.name, path) for path in sorted(folder.iterdir())]
    said = [f"Note: {note}." for note in notes]
    return _push(files, f"the merged model of {run.root.name}", said, repo_id, private, token, quiet, True)


def check_push(run: str | Path, repo_id: str) -> tuple[RunFolder, str]:
    """Check what can be checked before anything is merged or sent; return the run and the token of the login."""
    _check_repo_id(repo_id)
    return _finished(run), _login()


def _finished(run: str | Path) -> RunFolder:
    folder = open_finished(run)
    if not folder.finished():
        raise RunError(f"the run {run} has no result yet; finish it with `tokmask train {folder.recipe} --resume`")
    return folder


def _push(
    files: list[PushFile],
    what: str,
    notes: Sequence[str],
    repo_id: str,
    private: bool,
    token: str,
    quiet: bool,
    merged: bool,
) -> str:
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    check_no_token(files, token)
    _list(console, f"To {repo_id}, {what}:", files)
    for note in notes:
        console.print(note, markup=False)
    url = send(files, repo_id, private, token, console, merged)
    console.print(url, markup=False)
    return url


def _list(console: Console, title: str, files: list[PushFile]) -> None:
    """Print what is pushed, with its sizes."""
    width = max(len(file.name) for file in files)
    console.print(title, markup=False)
    for file in files:
        console.print(f"  {file.name:<{width}}  {file.size:>13,} bytes", markup=False)
    console.print(f"  {len(files)} files, {sum(file.size for file in files):,} bytes")


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} cannot be a repository on the Hub: {error}") from None
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} is no repository on the Hub: give user/name or organisation/name")


def _login() -> str:
    """Return the token of huggingface_hub's login.

    Raises:
        HubError: there is none.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import DeviceCodeError, OIDCError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    try:
        token = get_token()
    except (DeviceCodeError, OIDCError, OSError) as error:
        raise HubError(
            f"the login to the Hub failed ({type(error).__name__}); log in again with: hf auth login"
        ) from None
    if not token:
        raise HubError("not logged in to the Hugging Face Hub; log in with: hf auth login")
    return token
