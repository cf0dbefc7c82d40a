"""Which files are pushed to the Hub, and what must not be in them."""

from __future__ import annotations

import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

from tokmask_peft.errors import HubError
from tokmask_peft.hub.card_snippets import PLACEHOLDER

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
    from tokmask_peft.hub.card_metadata import hub_id

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
