"""Sweeps over recipes, and what may be concluded from them."""
