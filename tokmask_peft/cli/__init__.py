"""The command line. Thin: each command imports what it needs, so that `tokmask --help` answers at once."""

# in the order of the help text
from tokmask_peft.cli import diagnostics, recipes, results, training, use
from tokmask_peft.cli.app import app

__all__ = ["app", "diagnostics", "main", "recipes", "results", "training", "use"]


def main() -> None:
    """Run the command line."""
    app()
