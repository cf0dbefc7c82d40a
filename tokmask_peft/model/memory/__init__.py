"""How much memory a run takes, counted without its weights and without using it, and what saves memory."""
