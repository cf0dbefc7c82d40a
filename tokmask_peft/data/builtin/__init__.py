"""The built-in corpus: made-up Spanish-English posts, for trying things out without a download."""

from tokmask_peft.data.builtin.posts import builtin_examples

__all__ = ["builtin_examples"]
