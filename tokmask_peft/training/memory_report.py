"""What `estimate` prints: the bytes, whether they fit, and what would save some."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from tokmask_peft.console import make_console
from tokmask_peft.model.memory.estimate import USABLE, Estimate, Setting, shown
from tokmask_peft.model.memory.step import Shape
from tokmask_peft.model.memory.suggestions import Remedy
from tokmask_peft.training.memory import Forecast

ROWS = {
    "weights": "frozen backbone",
    "embedding": "its input embedding",
    "adapter": "adapter and head, fp32",
    "optimizer": "AdamW's states, fp32",
    "activations": "kept for the backward pass",
    "workspace": "gradients and results on their way, on top of that",
    "evaluation": "an evaluation takes more than a step",
    "overhead": "Python, libraries, CUDA context",
}


def print_report(cast: Forecast, setting: Setting, ways: list[Remedy]) -> None:
    """Print the bytes, whether they fit, and what would save some."""
    console = make_console()
    precision = "bf16" if str(setting.dtype) == "torch.bfloat16" else "fp32"
    known = "of your texts" if cast.shapes.known else "every text as long as data.max_length"
    console.print(
        f"{cast.recipe.model.backbone} on {setting.device_type}, {precision}, quantization {setting.quantization}, "
        f"embedding {cast.recipe.model.embedding}",
        markup=False,
    )
    if setting.assumed is not None:
        console.print(setting.assumed, markup=False)
    console.print(f"gradient checkpointing {cast.decision.choice}: {cast.decision.reason}", markup=False)
    console.print(f"largest batch: {_described(cast.shapes.largest)} ({known})\n", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("what")
    table.add_column("largest batch", justify="right")
    if cast.usual is not None:
        table.add_column("usual batch", justify="right")
    table.add_column("")
    for name, about in ROWS.items():
        columns = [cast.largest] if cast.usual is None else [cast.largest, cast.usual]
        cells = [_cell(column, name) for column in columns]
        if any(cells):
            table.add_row(name, *(cell or "-" for cell in cells), about)
    totals = [shown(column.total) for column in (cast.largest, cast.usual) if column is not None]
    table.add_row("[bold]total[/bold]", *(f"[bold]{total}[/bold]" for total in totals), "")
    console.print(table)
    if cast.largest.host:
        console.print(f"and {shown(cast.largest.host)} of the host's memory, for the embedding", markup=False)
    console.print()
    if cast.room is None:
        console.print(f"Nobody tells how much memory this {setting.device_type} has.", markup=False)
        return
    verdict = "It fits" if cast.fits else "It does NOT fit"
    have = f"{escape(cast.room.name)} has {shown(cast.room.bytes)}, of which {USABLE:.0%} are counted on"
    console.print(f"[bold]{verdict}[/bold]: {have}.")
    for number, remedy in enumerate(ways):
        if number == 0:
            console.print("What would take less, with its total:")
        console.print(f"  {remedy.told}", markup=False)
    if not cast.fits and not any(remedy.fits for remedy in ways):
        console.print("Nothing here makes it fit: take a smaller backbone.")


def to_dict(cast: Forecast, setting: Setting, ways: list[Remedy]) -> dict[str, Any]:
    """Return the report for JSON; all sizes in bytes."""
    return {
        "backbone": cast.recipe.model.backbone,
        "device": setting.device_type,
        "precision": str(setting.dtype).removeprefix("torch."),
        "quantization": setting.quantization,
        "assumed": setting.assumed,
        "gradient_checkpointing": cast.decision.choice == "on",
        "shapes": {"largest": _described(cast.shapes.largest), "from_texts": cast.shapes.known},
        "largest": cast.largest.to_dict(),
        "usual": None if cast.usual is None else cast.usual.to_dict(),
        "available": None if cast.room is None else cast.room.bytes,
        "fits": cast.fits,
        "remedies": [{"changes": dict(way.changes), "total": way.total, "fits": way.fits} for way in ways],
    }


def _cell(column: Estimate, name: str) -> str:
    """Leave out what does not count: the smaller of a step and an evaluation."""
    larger = column.evaluation > column.activations + column.workspace
    if (name == "evaluation" and not larger) or (name in ("activations", "workspace") and larger):
        return ""
    size: int = getattr(column, name)
    return shown(size) if size else ""


def _described(shape: Shape) -> str:
    if shape.packed:
        return f"{len(shape.lengths)} texts packed into {shape.tokens:,} sub-tokens"
    return f"{len(shape.lengths)} texts padded to {max(shape.lengths)} sub-tokens"
