"""The command line. Thin: each command imports what it needs, so that `tokmask --help` answers at once."""

from tokmask_peft.cli import results, training, use  # in the order of the help text
from tokmask_peft.cli.app import app

__all__ = ["app", "main", "results", "training", "use"]


def main() -> None:
    """Run the command line."""
    app()
