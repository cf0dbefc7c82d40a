"""See a run: one self-contained page of its scores, errors and data, and a small app to try it in."""
