"""Whether what is asked for may be written, said before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from tokmask_peft.errors import DataError, ModelError


def check_output(out: str | Path, source: str | Path | None, force: bool = False) -> Path:
    """Return the path to write to, before anything is loaded.

    Raises:
        DataError: it exists (unless `force`), is the input itself, or cannot be made.
    """
    path = Path(out)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{out} cannot be written: " + ("it is a folder" if path.is_dir() else "its folder is missing"))
    if path.exists() and source is not None and Path(source).exists() and path.samefile(source):
        raise DataError(f"{out} is the input itself; give another file")
    if path.exists() and not force:
        raise DataError(f"{out} exists; give another file, or --force to replace it")
    return path


def check_folder(folder: str | Path) -> Path:
    """Return the folder to make.

    Raises:
        ModelError: it is taken, or its parent is missing.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; give another folder")
    if not path.absolute().parent.is_dir():
        raise ModelError(f"{folder} cannot be made: {path.parent} is not a folder")
    return path
