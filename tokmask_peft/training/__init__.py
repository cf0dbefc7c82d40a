"""From a recipe to a run: losses, metrics, baseline, the Trainer, the run folder."""
