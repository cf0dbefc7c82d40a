"""Push the adapter of a run, or the merged model, to the Hugging Face Hub: what belongs to it, and nothing else.

huggingface_hub does the transport, with its own login and its own retries. One commit holds all files, so a push that
breaks leaves the repository as it was; what was uploaded by then is not sent twice.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tokmask_peft.errors import HubError, RunError
from tokmask_peft.training.run_folder import open_finished

ANSWER_SECONDS = 120.0
"""How long the Hub may take for an answer; huggingface_hub itself would wait for ever."""

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


def push(run: str | Path, repo_id: str, private: bool = False, *, merged: bool = False, quiet: bool = False) -> str:
    """Push the adapter of a finished run, with its tokenizer, labels and model card, to the Hugging Face Hub.

    A repository that exists is updated. Files of an earlier push that this run does not have are removed there;
    files that tokmask_peft never writes are left alone. A repository holds an adapter or a whole model, not both:
    transformers would put the adapter on the model, too.

    Args:
        run: the run folder.
        repo_id: `user/name` or `organisation/name`.
        private: make the repository private. One that exists and is public is refused, not pushed to.
        merged: push the adapter merged into its backbone, a plain transformers model.
        quiet: print nothing but huggingface_hub's progress bars.

    Returns:
        The address of the repository.

    Raises:
        RunError: the folder is no run, or the run is not finished.
        HubError: with what to do. A push that breaks can be repeated.
    """
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    _check_repo_id(repo_id)
    folder = open_finished(run)
    if not folder.finished():
        raise RunError(f"the run {run} has no result yet; finish it with `tokmask train {folder.recipe} --resume`")
    if merged:
        token = _login()
        with tempfile.TemporaryDirectory() as place:
            from tokmask_peft.hub_merged import write_merged

            notes = write_merged(folder, repo_id, Path(place) / "merged")
            files = [PushFile(path.name, path) for path in sorted((Path(place) / "merged").iterdir())]
            _check_no_token(files, token)
            _list(console, f"To {repo_id}, the merged model of {folder.root.name}:", files)
            for note in notes:
                console.print(f"Note: {note}.", markup=False)
            url = _send(files, repo_id, private, token, console, merged)
    else:
        files, stay = files_to_push(folder.adapter, repo_id)
        base = _base_model(folder.adapter / "adapter_config.json")
        token = _login()
        _check_no_token(files, token)
        _list(console, f"To {repo_id}, an adapter for {base}:", files)
        if stay:
            console.print(f"Not pushed: {', '.join(stay)}", markup=False)
        url = _send(files, repo_id, private, token, console, merged)
    console.print(url, markup=False)
    return url


def _list(console: Console, title: str, files: list[PushFile]) -> None:
    """Print what is pushed, with its sizes."""
    width = max(len(file.name) for file in files)
    console.print(title, markup=False)
    for file in files:
        console.print(f"  {file.name:<{width}}  {file.size:>13,} bytes", markup=False)
    console.print(f"  {len(files)} files, {sum(file.size for file in files):,} bytes")


def files_to_push(adapter: Path, repo_id: str) -> tuple[list[PushFile], list[str]]:
    """Return the files of an adapter's folder that belong to it, and the names of those that stay.

    The snippet of the card is given the id of the repository, so that it runs as it stands on the page.

    Raises:
        HubError: one is missing, or is a link, which could lead anywhere.
    """
    from tokmask_peft.card import PLACEHOLDER

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


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} cannot be a repository on the Hub: {error}") from None
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id!r} is no repository on the Hub: give user/name or organisation/name")


def _base_model(config: Path) -> str:
    """Return the backbone that the adapter names.

    Raises:
        HubError: it is a place on this machine, where nobody else can load it from.
    """
    from tokmask_peft.card_metadata import hub_id

    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or hub_id(base) is None:
        raise HubError(
            f"the adapter names {base!r} as its backbone, a place on this machine: nobody else could load it. Train "
            "with model.backbone set to the Hub id (model.backbone_path may say where to load it from), or write the "
            f"id into base_model_name_or_path of {config} if it is the same model"
        )
    return str(base)


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


def _check_no_token(files: list[PushFile], token: str) -> None:
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


def _send(files: list[PushFile], repo_id: str, private: bool, token: str, console: Console, merged: bool) -> str:
    """Make the repository if need be, and commit the files."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    from tokmask_peft import __version__
    from tokmask_peft.hub_errors import explain

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
