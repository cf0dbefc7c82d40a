"""Published corpora, as they are: row counts against the files, hygiene against what their authors' splits hold.

Set TOKMASK_DATA to the folder of corpora; nothing of them is in this repository.
"""

import os
import re
from pathlib import Path

import pytest

from tokmask_peft.data.corpus import load_corpus
from tokmask_peft.data.readers import read_split
from tokmask_peft.recipe.data import DataConfig, SourceConfig

LID = {"lang1": "lang1", "lang2": "lang2", "*": "other"}


@pytest.fixture(scope="module")
def data():
    folder = os.environ.get("TOKMASK_DATA")
    if not folder:
        pytest.skip("TOKMASK_DATA does not name a folder of corpora")
    return Path(folder)


def corpus(path, **options):
    if not path.is_dir():
        pytest.skip(f"{path.name} is not in TOKMASK_DATA")
    return load_corpus(DataConfig(**{"path": str(path), "task": "sequence", **options}), seed=1)


def rows(path, **options):
    return read_split(SourceConfig(path=str(path)), path.name, options.get("task", "sequence"))


def test_every_line_of_every_tsv_is_a_row(data):
    files = sorted(data.rglob("*.tsv"))
    assert files
    for path in files:
        lines = path.read_bytes().split(b"\n")
        found = rows(path)
        assert len(found) == len([line for line in lines[1:] if line]), path
        texts = [line.decode().split("\t")[0] for line in lines[1:] if line]
        marked = [text for text in texts if '"' in text]
        if all(re.fullmatch('"([^"]|"")*"', text) for text in marked):  # a writer's quotes
            texts = [text[1:-1].replace('""', '"') if text in marked else text for text in texts]
        assert [e.text for e in found] == texts, path


def test_every_word_line_of_every_conll_is_a_word(data):
    files = sorted(data.rglob("*.conll"))
    assert files
    for path in files:
        lines = path.read_bytes().decode().split("\n")
        words = [line.split("\t")[0] for line in lines if "\t" in line]
        found = rows(path, task="token")
        assert [word for e in found for word in e.text] == words, path
        assert all(len(e.text) == len(e.label) for e in found)


def test_lince_language_tags(data):
    found = corpus(data / "lince_lid_spaeng", task="token", validation=0.1, test="dev", label_map=LID)
    report = found.report
    assert found.labels == ("lang1", "lang2", "other")
    assert (report.splits["train"].read, report.splits["test"].read) == (21030, 3332)
    assert (report.splits["test"].words, report.splits["test"].labels["other"]) == (40391, 8724)
    assert sum(e.text[0].startswith("#") for e in found.test) > 0
    assert report.hygiene.test_shared >= 32
    assert report.hygiene.duplicates >= 54
    assert not {e.string.lower() for e in found.train} & {e.string.lower() for e in found.test}
    aside = len(found.validation) + report.hygiene.removed_from_validation
    assert aside == round(0.1 * (len(found.train) + aside))


@pytest.mark.parametrize(
    ("language", "figures"),
    [
        ("twi", {"train_in_test": 195, "test_shared": 195, "train_near_test": 3, "conflicting": 87}),
        ("kin", {"train_in_test": 28, "train_near_test": 2}),
        ("tso", {"train_in_test": 0, "train_in_validation": 0, "duplicates": 0}),
        ("swa", {"train_in_test": 1, "test_shared": 1}),
    ],
)
def test_afrisenti_leaks(data, language, figures):
    found = corpus(data / "afrisenti" / language)
    hygiene = found.report.hygiene
    assert {name: getattr(hygiene, name) for name in figures} == figures
    assert found.labels == ("negative", "neutral", "positive")
    if figures["train_in_test"]:
        assert any("also in test" in line for line in found.report.lines())


def test_sentimix_conflicts(data):
    found = corpus(data / "sentimix_spanglish", validation=0.1, test="dev")
    hygiene = found.report.hygiene
    assert (hygiene.duplicates, hygiene.conflicting, hygiene.test_shared) == (74, 26, 5)
    assert (found.report.splits["train"].read, found.report.splits["test"].read) == (12002, 2998)


def test_sentimix_words_are_the_texts(data):
    words = corpus(
        data / "sentimix_spanglish", task="token", train="train.lid.conll", validation=0.1, test="dev.lid.conll"
    )
    texts = corpus(data / "sentimix_spanglish", validation=0.1, test="dev")
    assert words.report.splits["test"].words == texts.report.splits["test"].words == 46164


def test_mixed_marathi(data):
    tags = corpus(data / "melid_mar_eng", task="token").report
    assert (tags.labels, tags.hygiene.test_shared) == (("ENG", "MAR", "OTH"), 6)
    moods = corpus(data / "mesent_mar_eng_sentiment").report
    assert (moods.splits["train"].read, moods.hygiene.test_shared) == (9500, 34)
    assert set(moods.splits["validation"].labels.values()) <= {414, 416, 417}


def test_questions(data):
    found = corpus(data / "trec6", validation=0.1)
    assert found.labels == ("0", "1", "2", "3", "4", "5")
    assert found.report.hygiene.train_in_test == 11
    removed = found.report.hygiene.removed_from_train + found.report.hygiene.removed_from_validation
    assert len(found.train) + len(found.validation) == 5452 - removed


def test_three_columns_of_spoken_german_and_turkish(data):
    language = corpus(data / "ud_tur_deu_sagt", task="token", label_column=1).report
    tags = corpus(data / "ud_tur_deu_sagt", task="token")
    assert tags.all_labels == (*tags.labels, "SYM")
    assert any(re.search(r"'SYM': 3 times, first at .*dev.conll:6998", line) for line in tags.report.warnings)
    part_of_speech = corpus(data / "ud_tur_deu_sagt", task="token", label_map={"SYM": "X"}).report
    assert language.labels == ("DE", "LANG3", "MIXED", "OTHER", "TR")
    assert "NOUN" in part_of_speech.labels
    assert language.hygiene.validation_in_test == 1
    assert [language.splits[name].read for name in language.splits] == [578, 801, 805]
