"""Push an adapter or a merged model to the Hugging Face Hub, with the login and the transport of huggingface_hub."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from tokmask_peft import __version__
from tokmask_peft.artifacts import LOADED_FILES, RunFolder, open_finished
from tokmask_peft.console import SafeConsole
from tokmask_peft.errors import HubError, read_json
from tokmask_peft.hub.card import PLACEHOLDER, hub_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ANSWER_SECONDS = 120.0  # how long the Hub may take to answer; huggingface_hub itself would wait forever
_NEEDED = ("README.md", "adapter_config.json", "adapter_model.safetensors")
ADAPTER_FILES = (*LOADED_FILES, "README.md", "confusion_matrix.png")  # all else stays here
MODEL_FILES = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Patterns of the files that a merged model has and an adapter does not."""


def push_adapter(run: str | Path, repo_id: str, private: bool = False, *, quiet: bool = False) -> str:
    """Push the adapter of a finished run, with its tokenizer, labels and model card, to the Hub; return the address.

    A repository that exists is updated; one that is public is refused with `private`. Files of an earlier push that
    this run does not have are removed; those that tokmask_peft never writes stay. A repository holds an adapter or a
    whole model, not both: transformers would apply the adapter to the model, too. RunError if the run is not finished;
    HubError with what to do: a push that breaks can be repeated.
    """
    folder, token = check_push(run, repo_id)
    adapter = folder.adapter
    if adapter.is_symlink():
        raise HubError(f"{adapter} is a link; push a run whose adapter folder is a folder", code="link")
    files = _matching_files(adapter, ADAPTER_FILES)
    if missing := sorted(set(_NEEDED) - {file.name for file in files}):
        problem = f"{adapter} is incomplete: {', '.join(missing)} is missing"
        raise HubError(problem, code="incomplete-adapter", missing=missing)
    config = adapter / "adapter_config.json"
    base = read_json(config, HubError, "bad-adapter-file").get("base_model_name_or_path")
    if not base or hub_id(base) is None:
        problem = f"the adapter names {base!r} as its backbone, which is not a Hub id, so that nobody else could load "
        problem += "it. Train with model.backbone set to the Hub id (model.backbone_path says where to load it from), "
        problem += f"or write the id into base_model_name_or_path of {config} if it is the same model"
        raise HubError(problem, code="local-backbone", backbone=base)
    left = sorted(path.name for path in adapter.iterdir() if path not in files)
    notes = [f"Not pushed: {', '.join(left)}"] if left else []
    return _push(files, f"an adapter for {base}", notes, repo_id, private, token, quiet, merged=False)


def push_model(
    folder: Path, run: RunFolder, repo_id: str, private: bool = False, *, notes: Sequence[str] = (), quiet: bool = False
) -> str:
    """Push the files of `folder`, a merged model made from `run`, as `push_adapter` does; `notes` are printed."""
    _, token = check_push(run.root, repo_id)
    files, what = _matching_files(folder, ("*",)), f"the merged model of {run.root.name}"
    return _push(files, what, [f"Note: {note}." for note in notes], repo_id, private, token, quiet, merged=True)


def check_push(run: str | Path, repo_id: str) -> tuple[RunFolder, str]:
    """Check what can be checked before anything is merged or sent; return the run and the token of the login."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import DeviceCodeError, HFValidationError, OIDCError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        problem = "" if repo_id.count("/") == 1 else "give user/name or organisation/name"
    except HFValidationError as error:
        problem = str(error)
    if problem:
        raise HubError(f"{repo_id!r} is not a repository name: {problem}", code="bad-repo", repo=repo_id)
    folder = open_finished(run, scored=True)
    if constants.HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be pushed; unset it"
        raise HubError(problem, code="offline")
    try:
        token = get_token()
    except (DeviceCodeError, OIDCError, OSError) as error:
        problem = f"the login to the Hub failed ({type(error).__name__}); log in again with: hf auth login"
        raise HubError(problem, code="login-failed") from None
    if not token:
        raise HubError("not logged in to the Hugging Face Hub; log in with: hf auth login", code="not-logged-in")
    return folder, token


def _matching_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of a folder that match the patterns; a link is refused, as it could lead anywhere."""
    found = [path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, pattern) for pattern in patterns)]
    if links := [path.name for path in found if path.is_symlink() or not path.is_file()]:
        problem = f"{', '.join(links)} in {folder}: links and folders are not pushed; put the files themselves there"
        raise HubError(problem, code="link", files=links)
    return found


def _push(
    files: list[Path], what: str, notes: list[str], repo_id: str, private: bool, token: str, quiet: bool, merged: bool
) -> str:
    """List the files, stage them with the repository's id in the card, and send them."""
    console = SafeConsole(quiet=quiet, highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as place:
        staged = [Path(place) / file.name for file in files]
        for file, target in zip(files, staged, strict=True):
            if file.name == "README.md":
                target.write_bytes(file.read_bytes().replace(PLACEHOLDER.encode(), repo_id.encode()))
                continue
            try:
                os.link(file, target)  # no copy if both are on one file system
            except OSError:
                shutil.copyfile(file, target)
        if holders := [file.name for file in staged if _holds(file, token.encode())]:
            problem = f"{', '.join(holders)} holds your Hub token, so nothing was pushed. Remove it there, and renew it"
            raise HubError(problem, code="token-in-file", files=holders)
        console.print(f"To {repo_id}, {what}:", markup=False)
        width, sizes = max(len(file.name) for file in staged), {file.name: file.stat().st_size for file in staged}
        for name, size in sizes.items():
            console.print(f"  {name:<{width}}  {size:>13,} bytes", markup=False)
        console.print(f"  {len(staged)} files, {sum(sizes.values()):,} bytes")
        for note in notes:
            console.print(note, markup=False)
        url = _send(Path(place), repo_id, private, token, console, merged)
    console.print(url, markup=False)
    return url


def _holds(file: Path, token: bytes) -> bool:
    """Return whether a file contains the token; a large one is not read into memory as a whole."""
    if file.stat().st_size == 0:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(token) >= 0


def _send(folder: Path, repo_id: str, private: bool, token: str, console: SafeConsole, merged: bool) -> str:
    """Make the repository if need be, and upload the folder in one commit; return the address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(token=token, library_name="tokmask-peft", library_version=__version__)
    sent = {file.name for file in folder.iterdir()}
    if merged:
        what, mark, other, kind = "merged model", "config.json", "adapter_config.json", "an adapter"
    else:
        what, mark, other, kind = "adapter", "adapter_config.json", "config.json", "a whole model"
    ours = (*ADAPTER_FILES, *(MODEL_FILES if merged else ()))
    with _answers_in_time(console):
        try:
            url = api.create_repo(repo_id, private=private or None, exist_ok=True)
            before = api.model_info(repo_id)
            if private and not before.private:
                problem = f"{repo_id} exists and is public, so --private cannot apply: nothing was pushed. Make it "
                problem += "private in its settings on the Hub, push to another name, or omit --private"
                raise HubError(problem, code="public-repo", repo=repo_id)
            there = {sibling.rfilename for sibling in before.siblings or ()}
            if other in there:
                problem = f"{repo_id} holds {kind} ({other}), and a repository cannot hold both: transformers would "
                raise HubError(f"{problem}load the two together. Push to another name", code="mixed-repo", repo=repo_id)
            if removed := sorted(name for name in there - sent if any(fnmatch(name, pattern) for pattern in ours)):
                console.print(f"Removed from the repository, as this run does not have them: {', '.join(removed)}")
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=sorted(sent),
                delete_patterns=removed or None,
                commit_message=f"{'Update' if mark in there else 'Add'} the {what}",
            )
        except (HTTPError, OSError, RuntimeError, ValueError, LookupError) as error:
            raise _explained(error, api, repo_id, token) from None
    if commit.oid == before.sha:
        console.print("The repository was up to date already.")
    return str(url)


@contextmanager
def _answers_in_time(console: SafeConsole) -> Iterator[None]:
    """Give huggingface_hub's client a time limit if it has none, and print the Hub's warnings about the card."""
    from huggingface_hub.utils import get_session

    client = get_session()
    before = client.timeout
    if before.read is None:
        client.timeout = ANSWER_SECONDS
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield
    finally:
        client.timeout = before
    for warning in found:
        if "README.md" in str(warning.message):
            console.print(str(warning.message), markup=False)


_AGAIN = "Push again: what has arrived is not sent twice."
_BY_STATUS = {
    401: (
        "token-refused",
        "the Hub does not accept your token (401): it is wrong or has expired. Log in again: hf auth login; "
        "HF_TOKEN in the environment, if set, takes precedence over that login.",
    ),
    403: (
        "no-write-access",
        "your token may not write to {repo} (403){whose}. Push under your own name or an organisation of yours, with a "
        "token that may write (https://huggingface.co/settings/tokens).",
    ),
    404: (
        "unknown-owner",
        "the user or organisation {owner} does not exist, or is hidden from your token (404){whose}.",
    ),
    409: ("conflict", f"{{repo}} was changed by somebody else at the same time ({{status}}). {_AGAIN}"),
    429: ("rate-limit", f"you have sent the Hub too many requests (429). Wait some minutes. {_AGAIN}"),
    500: ("hub-failed", f"the Hub itself failed ({{status}}); try later. {_AGAIN}"),
}
"""By HTTP status (500 and above as 500): the error's code, what it means and what to do."""


def _explained(error: BaseException, api: HfApi, repo_id: str, token: str) -> HubError:
    """Return what went wrong and what to do; the token is removed from whatever the Hub answered."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    response = next((found for one in chain if (found := getattr(one, "response", None)) is not None), None)
    status = None if response is None else int(response.status_code)
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    first, last = (" ".join(str(one).split()).rstrip(".") or type(one).__name__ for one in (error, chain[-1]))
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        code, text = "bad-card", f"the Hub cannot read the head of README.md: {' '.join(str(error).split()[4:])}"
    elif status is not None:
        unknown = "push-refused", "the Hub refused the push to {repo} ({status})."
        code, text = _BY_STATUS.get({412: 409}.get(status, min(status, 500)), unknown)
        whose = _whose(api) if "{whose}" in text else ""
        text = text.format(repo=repo_id, owner=repo_id.partition("/")[0], whose=whose, status=status)
        if answer := next((words for one in chain if (words := getattr(one, "server_message", None))), ""):
            text += f" The Hub says: {' '.join(answer.split())}"
    elif "TimeoutException" in kinds:
        code, text = "no-answer", f"{api.endpoint} did not answer within {ANSWER_SECONDS:g} seconds. {_AGAIN}"
    elif kinds & {"TransportError", "ConnectionError"}:
        code, text = "no-connection", f"the connection to {api.endpoint} failed ({last}). {_AGAIN}"
    else:
        code, text = "push-failed", f"the push failed: {first}. {_AGAIN}"
    return HubError(text.replace(token, "…"), code=code, repo=repo_id, status=status)


def _whose(api: HfApi) -> str:
    """Name the owner of the token, if the Hub does."""
    from huggingface_hub.errors import HTTPError

    try:
        who = api.whoami()
        names = [who["name"], *(group["name"] for group in who.get("orgs", ()))]
    except (HTTPError, OSError, ValueError, LookupError):
        return ""
    return f"; you are {names[0]}" + (f" and may act for {', '.join(names[1:])}" if names[1:] else "")
