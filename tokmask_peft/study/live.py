"""What a sweep shows while it runs: a table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokmask_peft.study.ledger import FINAL, CellState


def sweep_console(quiet: bool = False) -> Console:
    """Return the console of a sweep; away from a terminal its lines are not wrapped."""
    terminal = sys.stdout.isatty()
    return Console(quiet=quiet, width=None if terminal else 120, highlight=False, soft_wrap=not terminal)


def remaining_seconds(cells: Mapping[str, CellState], elapsed: Mapping[str, float], workers: int) -> float | None:
    """Estimate how long the rest takes: the mean time of a finished trial, over all that run at once.

    Args:
        cells: where each cell stands.
        elapsed: seconds so far of the trials of this process.
        workers: trials that this process runs at once.
    """
    known = [cell.seconds for cell in cells.values() if cell.seconds]
    if not known:
        return None
    mean = sum(known) / len(known)
    states = [cell.state for cell in cells.values()]
    open_cells = sum(state not in FINAL for state in states)
    at_once = max(workers, states.count("running"), 1)
    done_already = sum(min(seconds, mean) for seconds in elapsed.values())
    return max(0.0, (open_cells * mean - done_already) / min(at_once, max(open_cells, 1)))


def duration(seconds: float) -> str:
    """Write seconds as people do: `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def best_of(cells: Mapping[str, CellState]) -> tuple[str, float] | None:
    """Return the cell with the highest validation macro-F1."""
    scored = [(cell.score, name) for name, cell in cells.items() if cell.score is not None]
    return (max(scored)[1], max(scored)[0]) if scored else None


def summary_line(cells: Mapping[str, CellState], left: float | None) -> str:
    """Say in a line where the sweep stands."""
    states = [cell.state for cell in cells.values()]
    counts = [f"{states.count('done')}/{len(states)} done", f"{states.count('running')} running"]
    counts += [f"{states.count(state)} {state}" for state in ("failed", "pruned") if state in states]
    line = ", ".join(counts)
    if best := best_of(cells):
        line += f"; best {best[0]} (validation macro-F1 {best[1]:.4f})"
    if left is not None and any(state not in FINAL for state in states):
        line += f"; about {duration(left)} left"
    return line


class SweepDisplay:
    """Shows a sweep: drawn in place in a terminal, else a line when something happens.

    Args:
        console: where to.
        workers: trials at once.
    """

    def __init__(self, console: Console, workers: int) -> None:
        self.console, self.workers = console, workers
        self._live: Live | None = None

    def __enter__(self) -> SweepDisplay:
        """Open the table in a terminal."""
        if self.console.is_terminal and not self.console.quiet:
            self._live = Live(console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the table."""
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False)

    def update(self, cells: Mapping[str, CellState], elapsed: Mapping[str, float], progress: Sequence[str]) -> None:
        """Draw where the sweep stands; nothing away from a terminal."""
        if self._live is None:
            return
        left = remaining_seconds(cells, elapsed, self.workers)
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("running here", "for"):
            table.add_column(column, overflow="fold")
        for (name, seconds), shown in zip(elapsed.items(), progress, strict=True):
            table.add_row(Text(f"{name}  {shown}"), duration(seconds))
        elsewhere = sum(cell.state == "running" and name not in elapsed for name, cell in cells.items())
        if elsewhere:
            table.add_row(f"{elsewhere} more in other processes", "")
        for name, cell in cells.items():
            if cell.state == "failed":
                table.add_row(Text(f"failed: {name}: {cell.reason[:100]}", style="red"), "")
        self._live.update(Group(Text(summary_line(cells, left), style="bold"), table))
