"""The way to the Hub: the repository, one commit with all files, and no waiting for ever.

huggingface_hub does the transport, with its own retries. One commit holds all files, so a push that breaks leaves the
repository as it was; what was uploaded by then is not sent twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from tokmask_peft import __version__
from tokmask_peft.errors import HubError
from tokmask_peft.hub.push_errors import explain
from tokmask_peft.hub.push_files import BELONG, WEIGHTS, PushFile

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
