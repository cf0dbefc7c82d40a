"""The built-in corpus: the same posts for both tasks, and always the same."""

import hashlib

import pytest

from tokmask_peft.data.hub import builtin_examples
from tokmask_peft.errors import DataError

SPLITS = {"train": 3000, "validation": 500, "test": 1000}


@pytest.fixture(scope="module")
def words():
    return {split: builtin_examples("token", split) for split in SPLITS}


def test_sizes_aliases_and_places(words):
    assert {split: len(found) for split, found in words.items()} == SPLITS
    assert builtin_examples("token", "dev") == words["validation"]
    assert words["test"][7].where == "built-in test[7]"
    with pytest.raises(DataError) as caught:
        builtin_examples("token", "tset")
    assert (caught.value.code, caught.value.fields["split"]) == ("no-split", "tset")


def test_the_posts_never_change(words):
    """Published scores are of exactly these posts; what the docstring of the reader says of them follows."""
    texts = {split: builtin_examples("sequence", split) for split in SPLITS}
    rows = [(e.text, e.label) for found in (texts, words) for split in SPLITS for e in found[split]]
    assert (
        hashlib.sha256(repr(rows).encode()).hexdigest()
        == "802e1f8df4807f6b9009658827a2019645f2d26bfff88e9e49227f69c01c37f8"
    )
