"""How much memory a training step takes, found out without weights and without taking it."""
