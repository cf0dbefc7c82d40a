"""Which file a split means."""

import os
from pathlib import Path

import pytest

from tokmask_peft.data.columns import Findings
from tokmask_peft.data.detect import find_splits
from tokmask_peft.data.readers import READERS, find_files, reader_of
from tokmask_peft.errors import DataError


@pytest.fixture
def folder(tmp_path):
    def fill(*names):
        for name in names:
            (tmp_path / name).write_text("")
        return tmp_path

    return fill


def found(folder, *more):
    return [file.name for file in find_files(str(folder), *more)]


def refused(folder, *more):
    """Return code and fields of the error."""
    with pytest.raises(DataError) as caught:
        find_files(str(folder), *more)
    return caught.value.code, caught.value.fields


@pytest.mark.parametrize("name", ["validation.tsv", "dev.conll", "valid.csv", "val.jsonl", "Dev.parquet"])
def test_names_of_validation_are_one(folder, name):
    assert found(folder("train.tsv", "test.tsv", name), "validation") == [name]


def test_a_literal_name_wins(folder):
    path = folder("train.tsv", "train.lid.conll", "dev.tsv")
    assert found(path, "train.lid.conll") == ["train.lid.conll"]
    assert found(path, "train") == ["train.tsv"]


def test_what_fits_twice_is_asked_for(folder):
    path = folder("train.tsv", "train.conll", "dev.tsv", "valid.tsv")
    assert refused(path, "train") == ("several-files", {"split": "train", "files": ("train.conll", "train.tsv")})
    assert found(path, "train", "tsv") == ["train.tsv"]
    assert refused(path, "validation", "tsv")[0] == "several-files"
    assert found(folder("test.txt", "test.csv"), "test", "conll") == ["test.txt"]


def test_what_is_missing_lists_the_folder(folder):
    path = folder("train.tsv", "dev.tsv", "notes.md")
    assert refused(path, "test") == ("no-split", {"split": "test", "files": ("dev.tsv", "train.tsv")})
    with pytest.raises(DataError, match=r"Did you mean 'train.tsv'.*data.test may be null"):
        find_files(str(path), "train.tvs")
    for place in (path / "nowhere", os.devnull):
        assert refused(place, "train") == ("no-path", {"path": str(place)})
        with pytest.raises(DataError) as caught:
            find_splits([Path(place)], Findings({}))
        assert caught.value.code == "no-path"


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz"])
def test_shards_are_one_split(folder, ending):
    shards = [f"train-00000-of-00002.{ending}", f"train-00001-of-00002.{ending}"]
    path = folder(*shards, f"test-00000-of-00001.{ending}")
    assert found(path, "train") == shards
    assert found(path, "test") == [f"test-00000-of-00001.{ending}"]
    (path / shards[0]).unlink()
    assert refused(path, "train")[0] == "missing-shards"


def test_missing_shards_are_named(folder):
    path = folder("train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "test-00001-of-00002.parquet")
    assert refused(path, "train") == ("missing-shards", {"missing": ("00001-of-00003",), "totals": (3,)})
    assert refused(path, "test") == ("missing-shards", {"missing": ("00000-of-00002",), "totals": (2,)})
    folder("train-00001-of-00003.parquet", "train-00000-of-00001.parquet")
    assert refused(path, "train") == ("missing-shards", {"missing": (), "totals": (1, 3)})


def test_one_file_is_train_and_others_lie_beside_it(folder):
    path = folder("posts.csv", "more.csv", "dev.csv")
    assert found(path / "posts.csv", "train") == ["posts.csv"]
    assert found(path / "posts.csv", "validation") == ["dev.csv"]
    assert found(path / "posts.csv", "more.csv") == ["more.csv"]
    assert found(path / "posts.csv", "posts.csv") == ["posts.csv"]
    assert refused(path / "posts.csv", "test")[1]["files"] == ("dev.csv", "more.csv", "posts.csv")


def test_format_by_ending_or_as_asked(tmp_path):
    assert reader_of(tmp_path / "a.CONLLU") is READERS[".conll"]
    assert reader_of(tmp_path / "a.data", "csv") is READERS[".csv"]
    assert reader_of(tmp_path / "a.json") is READERS[".jsonl"]
    for ending, asked in [("doc", "auto"), ("csv", "jsnl")]:
        with pytest.raises(DataError, match=r"Set data.format to one of auto, conll") as caught:
            reader_of(tmp_path / f"a.{ending}", asked)
        assert caught.value.code == "unknown-format"
    assert "Did you mean 'jsonl'" in str(caught.value)
