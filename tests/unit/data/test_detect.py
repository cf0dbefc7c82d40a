"""Files that nobody described: the keys that read each kind in which corpora of this field come."""

import json

import pytest

from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.detect import detect
from tokmask_peft.recipe.schema import DataConfig

WORDS = [
    "casa",
    "phone",
    "hoy",
    "really",
    "bueno",
    "work",
    "amigo",
    "very",
    "malo",
    "sad",
    "luz",
    "river",
    "papa",
    "green",
    "voy",
    "went",
]
TEXTS = [" ".join(WORDS[(at * step) % 16] for step in range(1, 4 + at % 5)) + f" n{at}" for at in range(40)]
MOODS = [("pos", "neg")[at % 2] for at in range(40)]
PAIRS = list(zip(TEXTS, MOODS, strict=True))
TAGS = [["es" if word in WORDS[::2] else "en" for word in text.split()] for text in TEXTS]
TAGGED = [(text.split(), tags) for text, tags in zip(TEXTS, TAGS, strict=True)]


def rows(separator, header="", quote=""):
    lines = [header] if header else []
    lines += [f"{quote}{text}{quote}{separator}{label}" for text, label in PAIRS]
    return "\n".join(lines) + "\n"


def blocks(line, before="", end="\n"):
    """Return a word a line; `line` and `before` are formats with {text}, {word} and {tag}."""
    texts = []
    for at, (words, tags) in enumerate(TAGGED):
        pairs = enumerate(zip(words, tags, strict=True), 1)
        body = "".join(line.format(at=at, word=word, tag=tag, n=n) + "\n" for n, (word, tag) in pairs)
        texts.append(before.format(at=at, mood=MOODS[at]) + body)
    return end.join(texts)


def listed(shape):
    pairs = [(shape(words), shape(tags)) for words, tags in TAGGED]
    return "words,lid\n" + "".join(f'"{words}","{tags}"\n' for words, tags in pairs)


SEQUENCE, TOKEN = {"task": "sequence"}, {"task": "token"}
NAMED = {"text_column": "text", "label_column": "label"}
KINDS = {
    "usual names": ("a.tsv", rows("\t", "text\tlabel"), SEQUENCE | NAMED),
    "own names": (
        "a.tsv",
        "id\tSentence\tcategory\n" + "".join(f"{at}\t{t}\t{m} \n" for at, (t, m) in enumerate(PAIRS)),
        SEQUENCE | {"text_column": "Sentence", "label_column": "category"},
    ),
    "semicolons": ("a.csv", rows(";", "tweet;sentiment").replace("hoy", "1,5"), SEQUENCE | {"text_column": "tweet"}),
    "bars without an ending": ("a", rows("|", "text|label"), SEQUENCE | NAMED | {"format": "csv"}),
    "tabs in a txt": ("a.txt", rows("\t", "text\tlabel"), SEQUENCE | NAMED | {"format": "tsv"}),
    "no header, more columns": (
        "a.tsv",
        "".join(f"src{at % 9:02}\t{at % 2}\t{'*' * (at % 2)}\t{t}.\n" for at, t in enumerate(TEXTS)),
        SEQUENCE | {"header": False, "text_column": 3, "label_column": 1},
    ),
    "conll as tsv": ("a.tsv", blocks("{word}\t{tag}"), TOKEN | {"format": "conll", "label_column": 1}),
    "conll with blanks in a txt": ("a.txt", blocks("{word} {tag}"), TOKEN | {"format": "conll", "label_column": 1}),
    "conll without an ending": ("a", blocks("{word}\t{tag}"), TOKEN | {"format": "conll", "label_column": 1}),
    "labels of texts in meta lines": ("a.conll", blocks("{word}\t{tag}", "meta\t{at}\t{mood}\n"), SEQUENCE),
    "several columns": ("a.conll", blocks("{word}\t{tag}\tX{n}"), TOKEN | {"label_column": 2}),
    "conllu": (
        "a.conllu",
        blocks("{n}\t{word}\t_\tNOUN\t_\t_\t0\troot\t_\tAdpType=Prep|Lang={tag}", "# sent_id = {at}\n"),
        TOKEN | {"label_column": "misc.Lang"},
    ),
    "a row a word with ids": (
        "a.csv",
        "sent,word,tag\n" + blocks("{at},{word},{tag}", end=""),
        TOKEN | {"text_column": "word", "label_column": "tag", "group_column": "sent"},
    ),
    "a row a word, EOS": ("a.csv", blocks("{word},{tag}", end="<EOS>,<EOS>\n"), TOKEN | {"header": False}),
    "a row a word, blank rows": ("a.csv", "word,tag\n" + blocks("{word},{tag}"), TOKEN | {"label_column": "tag"}),
    "the text's start at its first word": (
        "a.csv",
        "".join(
            ("" if n else f'"T: {at}"') + f",{word},{tag}\n"
            for at, (words, tags) in enumerate(TAGGED)
            for n, (word, tag) in enumerate(zip(words, tags, strict=True))
        ),
        TOKEN | {"text_column": 1, "label_column": 2, "group_column": 0},
    ),
    "json lists in cells": (
        "a.csv", listed(lambda row: json.dumps(row).replace('"', '""')), TOKEN | {"label_column": "lid"}
    ),
    "python lists in cells": ("a.csv", listed(repr), TOKEN | {"text_column": "words"}),
    "numpy lists in cells": ("a.csv", listed(lambda row: repr(row).replace(",", "")), TOKEN | {"label_column": "lid"}),
    "numbers as labels": ("a.tsv", rows("\t", "text\tlabel").replace("pos", "1.0").replace("neg", "0"), SEQUENCE),
    "json lines": (
        "a.jsonl",
        "".join(json.dumps({"id": at, "tweet": t, "class": m}) + "\n" for at, (t, m) in enumerate(PAIRS)),
        SEQUENCE | {"text_column": "tweet", "label_column": "class"},
    ),
    "words as strings": (
        "a.csv",
        "text,langs\n" + "".join(f"{' '.join(words)},{' '.join(tags)}\n" for words, tags in TAGGED),
        TOKEN | {"text_column": "text", "label_column": "langs"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_each_kind_is_read_with_the_keys_that_are_found(tmp_path, kind, encoding):
    name, content, expected = KINDS[kind]
    file = tmp_path / name
    file.write_text(content, encoding=encoding)
    found, corpus = detect([file], {})
    assert found.data.items() >= (expected | {"path": str(file), "test": None}).items()
    assert len(corpus.train) + len(corpus.validation) == 40
    assert len(corpus.labels) == (8 if kind == "several columns" else 2)
    assert {example.string for example in corpus.train} <= {*TEXTS, *(f"{text}." for text in TEXTS)} or "1,5" in content
    assert load_corpus(DataConfig(**found.data), 42).fingerprint() == corpus.fingerprint()
