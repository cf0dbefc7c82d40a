"""Texts and labels: read, merge, clean, split, encode."""

from tokmask_peft.data.batches import PackedCollator
from tokmask_peft.data.corpus import Corpus, DataReport, load_corpus
from tokmask_peft.data.encoding import Encoded, Encoder
from tokmask_peft.examples import Example

__all__ = ["Corpus", "DataReport", "Encoded", "Encoder", "Example", "PackedCollator", "load_corpus"]
