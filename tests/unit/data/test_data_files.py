"""Which file a split means."""

import pytest

from tokmask_peft.data.files import file_format, find_files
from tokmask_peft.errors import DataError


@pytest.fixture
def folder(tmp_path):
    def fill(*names):
        for name in names:
            (tmp_path / name).write_text("")
        return str(tmp_path)

    return fill


def found(*arguments):
    return [file.name for file in find_files(*arguments)]


@pytest.mark.parametrize("name", ["validation.tsv", "dev.conll", "valid.csv", "val.jsonl", "Dev.parquet"])
def test_names_of_validation_are_one(folder, name):
    assert found(folder("train.tsv", "test.tsv", name), "validation") == [name]


def test_a_literal_name_wins(folder):
    path = folder("train.tsv", "train.lid.conll", "dev.tsv")
    assert found(path, "train.lid.conll") == ["train.lid.conll"]
    assert found(path, "train") == ["train.tsv"]


def test_what_fits_twice_is_asked_for(folder):
    path = folder("train.tsv", "train.conll", "dev.tsv", "valid.tsv")
    with pytest.raises(DataError, match=r"several files fit the split 'train': train.conll, train.tsv"):
        find_files(path, "train")
    assert found(path, "train", "tsv") == ["train.tsv"]
    with pytest.raises(DataError, match="several files fit the split 'validation'"):
        find_files(path, "validation", "tsv")


def test_what_is_missing_lists_the_folder(folder):
    path = folder("train.tsv", "dev.tsv", "notes.md")
    with pytest.raises(
        DataError, match=r"no file for the split 'test'. The folder holds dev.tsv, train.tsv\."
    ) as caught:
        find_files(path, "test")
    assert "data.test may be null" in str(caught.value)
    with pytest.raises(DataError, match=r"Did you mean 'train.tsv'"):
        find_files(path, "train.tvs")
    with pytest.raises(DataError, match="does not exist"):
        find_files(path + "/nowhere", "train")


def test_parquet_shards_are_one_split(folder):
    shards = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    path = folder(*shards, "test-00000-of-00001.parquet")
    assert found(path, "train") == shards
    assert found(path, "test") == ["test-00000-of-00001.parquet"]


def test_one_file_is_train_and_others_lie_beside_it(folder):
    path = folder("posts.csv", "more.csv", "dev.csv")
    assert found(f"{path}/posts.csv", "train") == ["posts.csv"]
    assert found(f"{path}/posts.csv", "validation") == ["dev.csv"]
    assert found(f"{path}/posts.csv", "more.csv") == ["more.csv"]
    assert found(f"{path}/posts.csv", "posts.csv") == ["posts.csv"]
    with pytest.raises(DataError, match=r"dev.csv, more.csv, posts.csv"):
        find_files(f"{path}/posts.csv", "test")


def test_format_by_ending_or_as_asked(tmp_path):
    assert file_format(tmp_path / "a.CONLLU") == "conll"
    assert file_format(tmp_path / "a.data", "csv") == "csv"
    with pytest.raises(DataError, match=r"'.xlsx' is not one of"):
        file_format(tmp_path / "a.xlsx")
