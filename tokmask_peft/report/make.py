"""Make the report of a run: read it, look at its mistakes, write the page. Imports what is heavy when it gets there."""

from __future__ import annotations

from pathlib import Path

from tokmask_peft.errors import RunError, TokmaskError
from tokmask_peft.report.record import Record
from tokmask_peft.report.svg import require_matplotlib

MARK = "<!-- tokmask report -->"
"""Stands at the head of every page, so that one is replaced and no other file is."""


def prepare(run: str | Path, out: str | Path | None = None) -> tuple[Record, Path]:
    """Read a run and choose the file of its page, before anything heavy is loaded.

    Args:
        run: the run folder.
        out: the file to write; none means `report.html` in the run folder.

    Raises:
        RunError: the folder is no finished run, or the file cannot be written or is no report.
        ExtraError: matplotlib is not installed.
    """
    record = Record.open(run)
    path = Path(out) if out is not None else record.run.root / "report.html"
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RunError(f"{path} cannot be written: " + ("it is a folder" if path.is_dir() else "its folder is missing"))
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:200]:
        raise RunError(f"{path} exists and is no report of this tool; give another file with --out")
    require_matplotlib()
    return record, path


def report_run(
    run: str | Path, out: str | Path | None = None, *, examples: bool = True, backbone: str | None = None
) -> tuple[Path, str]:
    """Write the report of a run: one HTML file that loads nothing.

    Args:
        run: the run folder.
        out: the file to write; none writes `report.html` in the run folder.
        examples: predict the scored split again to show the most confident mistakes; needs the data and the backbone.
        backbone: where to load the backbone from for that, in place of what the recipe says.

    Returns:
        The file, and why it shows no mistakes though they were asked for; empty where it does.

    Raises:
        RunError, ExtraError: as `prepare`.
    """
    record, path = prepare(run, out)
    from tokmask_peft.report.page import render

    mistakes, why_not = None, ""
    if examples:
        from tokmask_peft.report.examples import find_mistakes

        try:
            mistakes = find_mistakes(record, backbone)
        except TokmaskError as error:
            why_not = str(error)
    page = render(record, mistakes, why_not or "the report was made with --no-examples")
    path.write_text(page, encoding="utf-8")
    return path, why_not
