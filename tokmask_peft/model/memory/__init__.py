"""How much memory a run takes, found out without its weights and without taking it, and what saves memory."""
