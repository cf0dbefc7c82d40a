"""Texts and labels: read, merge, clean, split, encode."""

from tokmask_peft.data.corpus import Corpus, load_corpus
from tokmask_peft.data.encode import Encoded, encode
from tokmask_peft.data.example import Example
from tokmask_peft.data.packing import PackedCollator
from tokmask_peft.data.report import DataReport

__all__ = ["Corpus", "DataReport", "Encoded", "Example", "PackedCollator", "encode", "load_corpus"]
