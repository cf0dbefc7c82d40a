"""Make the report of a run: read it, look at its mistakes, write the page."""

from __future__ import annotations

from pathlib import Path

from tokmask_peft.errors import TokmaskError
from tokmask_peft.report.page import check_page, render
from tokmask_peft.report.record import Record
from tokmask_peft.report.svg import require_matplotlib


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
        The file, and why it shows no mistakes; empty where it does.

    Raises:
        RunError: the folder is no finished run, or the file cannot be written.
        ExtraError: matplotlib is not installed.
    """
    record = Record.open(run)
    path = check_page(Path(out) if out is not None else record.run.root / "report.html")
    require_matplotlib()
    mistakes, why_not = None, "the report was made with --no-examples."
    if examples:
        from tokmask_peft.report.examples import find_mistakes

        try:
            mistakes, why_not = find_mistakes(record, backbone), ""
        except TokmaskError as error:
            why_not = str(error)
    path.write_text(render(record, mistakes, why_not), encoding="utf-8")
    return path, why_not if examples else ""
