"""The command line. Thin: each command imports what it needs, so that `tokmask --help` answers at once."""

from tokmask_peft.cli import adapters, results
from tokmask_peft.cli.app import app

__all__ = ["adapters", "app", "main", "results"]


def main() -> None:
    """Run the command line."""
    app()
