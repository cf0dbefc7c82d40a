"""What went wrong between huggingface_hub and the Hub, in a sentence with its remedy, and never with the token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
