"""Backbone, head and adapter: what is loaded, what is trained, what is saved."""
