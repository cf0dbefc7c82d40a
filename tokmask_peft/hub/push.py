"""Push the adapter of a run, or the merged model, to the Hugging Face Hub, with huggingface_hub's own login."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console

from tokmask_peft.errors import HubError, RunError
from tokmask_peft.hub.push_files import PushFile, base_model, check_no_token, files_to_push
from tokmask_peft.hub.transfer import send
from tokmask_peft.training.run_folder import open_finished


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
            from tokmask_peft.hub.merged import write_merged

            notes = write_merged(folder, repo_id, Path(place) / "merged")
            files = [PushFile(path.name, path) for path in sorted((Path(place) / "merged").iterdir())]
            check_no_token(files, token)
            _list(console, f"To {repo_id}, the merged model of {folder.root.name}:", files)
            for note in notes:
                console.print(f"Note: {note}.", markup=False)
            url = send(files, repo_id, private, token, console, merged)
    else:
        files, stay = files_to_push(folder.adapter, repo_id)
        base = base_model(folder.adapter / "adapter_config.json")
        token = _login()
        check_no_token(files, token)
        _list(console, f"To {repo_id}, an adapter for {base}:", files)
        if stay:
            console.print(f"Not pushed: {', '.join(stay)}", markup=False)
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
