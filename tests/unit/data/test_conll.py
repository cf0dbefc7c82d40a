"""Column files: what is a word, what is a comment, and that nothing is dropped in silence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmask_peft.data.conll import Columns, ConllReader, readable
from tokmask_peft.data.opening import DataFile
from tokmask_peft.data.readers import TextFile, read_split, reader_of
from tokmask_peft.errors import DataError
from tokmask_peft.recipe.data import SourceConfig
from tokmask_peft.tasks import get_task


def read(content, task="token", **columns):
    return list(readable(ConllReader(content.split("\n"), "posts.conll", Columns(get_task(task), **columns))))


def refused(content, **columns):
    """Return code and place of the error."""
    with pytest.raises(DataError) as caught:
        read(content, **columns)
    return caught.value.code, caught.value.fields.get("where")


def test_words_tags_and_places():
    first, second = read("# sent_enum = 1\nme\tlang2\ngusta\tlang2\n\n# sent_enum = 2\nok\tother\n")
    assert (first.text, first.label, first.where) == (("me", "gusta"), ("lang2", "lang2"), "posts.conll:2")
    assert (second.text, second.where) == (("ok",), "posts.conll:6")


@pytest.mark.parametrize("line", ["#Monday\tlang1", "#\tother", "# \tother", "#a=b\tother", "#sent_enum\tother"])
def test_a_hashtag_is_a_word_wherever_it_stands(line):
    word = line.split("\t")[0].strip()
    files = (f"{line}\n", f"# sent_enum = 1\n{line}\nyes\tlang1\n", f"yes\tlang1\n{line}\n")
    assert [read(file)[0].text for file in files] == [(word,), (word, "yes"), ("yes", word)]


COMMENTS = ["# sent_enum = 7 x", "# text = a b", "# newdoc", "# source: web", "#just a remark", "# newdoc id = 4"]


@pytest.mark.parametrize(
    "line",
    [
        *COMMENTS,
        "#sent_enum=7",
        "# tweet id 7 \tpositive",
        "# tweet 9\t",
        "# tweet-id 7\tgood",
        "# doc 7\tgood",
        "# id: 7\tpositive",
    ],
)
def test_a_comment_is_not_a_word(line):
    (example,) = read(f"{line}\nyes\tlang1\n")
    assert example.text == ("yes",)


@pytest.mark.parametrize("start", ["", "no\tlang2\n"])
def test_a_hash_and_words_before_a_tab_are_a_word(start):
    (example,) = read(f"{start}# of course\tlang1\nyes\tlang1\n")
    assert example.text[-2:] == ("# of course", "yes")
    assert read(f"yes\tlang1\n\n# a{' ' * 100_000}x\nno\tlang1\n")  # in no time


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ("# sent_enum = 7 positive", "positive"),
        ("# sent_enum = 7\tpositive", "positive"),
        ("# label = not sure", "not sure"),
        ("# sentiment: negative", "negative"),
        ("meta\t7\tneutral", "neutral"),
        ("# id 7\tpositive", "positive"),
        ("# tweet: n7\t", None),
        ("# sent_enum = 7", None),
    ],
)
def test_the_label_of_a_text_stands_in_its_comment(line, label):
    (example,) = read(f"{line}\nque\tlang2\ngood\tlang1\n", task="sequence")
    assert (example.text, example.label) == ("que good", label)


def test_a_label_does_not_leak_into_the_next_text():
    first, second = read("# sent_enum = 1 positive\nyes\tlang1\n\n# sent_enum = 2\nno\tlang1\n", task="sequence")
    assert (first.label, second.label) == ("positive", None)


def test_a_comment_inside_a_text_is_refused_because_a_blank_line_is_missing():
    text = "# sent_enum = 1\nyes\tlang1\n# sent_enum = 2\nno\tlang1\n"
    assert refused(text) == ("comment-inside", "posts.conll:3")


@pytest.mark.parametrize("line", ["nude    lang1", "#OneDay  lang1"])
def test_spaces_in_place_of_the_tab(line):
    (example,) = read(f"{line}\nyes\tlang1\nsí\tlang2\n")
    assert example.text[0] == line.split()[0]
    assert example.label == ("lang1", "lang1", "lang2")


def test_columns_separated_by_spaces():
    (example,) = read("# sent_enum = 1\n#Uno lang2\n# other\ndos   lang2\n")
    assert example.text == ("#Uno", "#", "dos")
    assert example.label == ("lang2", "other", "lang2")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\tx\nb\nc\ty\n", 2), ("a x\nb x y\nc y\n", 2), ("a\tb\tx\nc\tx\nd\te\tx\n", 2)],
)
def test_a_line_with_other_columns_names_its_place(text, line):
    assert refused(text) == ("column-count", f"posts.conll:{line}")


def test_label_column_by_number_from_either_end():
    text = "ich\tDE\tPRON\nben\tTR\tPRON\n"
    assert read(text)[0].label == ("PRON", "PRON")
    assert all(read(text, label=label)[0].label == ("DE", "TR") for label in (1, -2, "1"))
    assert read(text, text=1, label=2)[0].text == ("DE", "TR")
    assert refused(text, label="upos")[0] == "column"


def test_conllu_skips_ranges_and_empty_nodes():
    rows = [("1-2", "vámonos", "_"), (1, "vamos", "VERB"), (2, "nos", "PRON"), ("2.1", "x", "_"), (3, "ya", "ADV")]
    lines = ["# sent_id = 1", "# text = vámonos ya"]
    lines += [f"{number}\t{form}\t_\t{upos}\t_\t_\t_\t_\t_\tLang=x" for number, form, upos in rows]
    (example,) = read("\n".join(lines), label="upos")
    assert (example.text, example.label) == (("vamos", "nos", "ya"), ("VERB", "PRON", "ADV"))
    assert read("1-2\tother\n3.1\tother\n")[0].text == ("1-2", "3.1")  # words in other files
    with pytest.raises(DataError, match=r"label_column is 'upo'.*Did you mean 'upos'"):
        read("\n".join(lines), label="upo")


@pytest.mark.parametrize("word", ["\u200b", "\ufe0f", "\u200d", "\u00a0", "\x1c", "\u2028", "\x85", "a\u2028b"])
def test_invisible_words_are_words(tmp_path, word):
    path = tmp_path / "train.conll"
    path.write_bytes(f"{word}\tother\nyes\tlang1\n".encode())
    (example,) = read_split(SourceConfig(path=str(path)), "train", "token")
    assert example.text == (word, "yes")
    assert example.label == ("other", "lang1")
    path.write_bytes(f"yes\n{word}\nno\n".encode())
    (example,) = TextFile(path, "token")
    assert example.text == ("yes", word, "no")


def test_without_labels_one_column_is_enough():
    first, second = read("#hola\nmy\n\nfriend\n", labelled=False)
    assert (first.text, first.label) == (("#hola", "my"), None)
    assert second.text == ("friend",)
    assert refused("hola\nNew York\nfriend\n", labelled=False) == ("column-count", "posts.conll:2")


def test_names_above_the_columns_are_not_words():
    text = "# id = 1\nWord\tLang\tPOS\nhola\tes\tX\nword\tlang\tpos\n\nok\ten\tX\n"
    for more in ({}, {"labelled": False}):
        assert [example.text for example in read(text, **more)] == [("hola", "word"), ("ok",)]
    assert read(text, header=False)[0].text == ("Word", "hola", "word")
    assert read("token\ttag\nhola\ttag\n")[0].text == ("token", "hola")


def test_unlabelled_texts_are_an_error(tmp_path):
    path = tmp_path / "train.conll"
    for task, content, remedy in (
        ("sequence", "# sent_enum = 1\nyes\tlang1\n", "comment"),
        ("token", "yes\nno\n", "data.test"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=remedy) as caught:
            read_split(SourceConfig(path=str(path)), "train", task)
        assert caught.value.code == "no-labels"


visible = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp"), codec="utf-8"), min_size=1, max_size=6
)
word = visible | visible.map("#{}".format) | st.just("#") | st.sampled_from(["meta", "1-2", "\u200b", "# x"])
tag = st.sampled_from(["lang1", "lang2", "other", "B-PER", "_"])
post = st.lists(st.tuples(word, tag), min_size=1, max_size=5)


@given(
    posts=st.lists(post, min_size=1, max_size=4),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    last=st.booleans(),
    comments=st.booleans(),
    blanks=st.integers(1, 3),
)
def test_what_is_written_is_read(tmp_path_factory, posts, end, bom, last, comments, blanks):
    blocks = []
    for number, words in enumerate(posts):
        head = [f"# sent_enum = {number} positive"] if comments else []
        blocks.append(end.join([*head, *("\t".join(pair) for pair in words)]))
    text = (end * (blanks + 1)).join(blocks) + (end if last else "")
    path = tmp_path_factory.mktemp("conll") / "train.conll"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    found = readable(reader_of(path)(DataFile(path), Columns(get_task("token"))))
    assert [list(zip(e.text, e.label, strict=True)) for e in found] == posts


def test_a_tab_at_the_end_of_every_line_is_named_with_the_column_to_set():
    content = "me\tlang2\t\nok\tother\t\n\nque\tlang2\t\n"
    assert refused(content)[0] == "empty-column"
    with pytest.raises(DataError, match=r"data.label_column=1"):
        read(content)
    assert [example.label for example in read(content, label=1)] == [("lang2", "other"), ("lang2",)]
    assert [example.text for example in read(content, labelled=False)] == [("me", "ok"), ("que",)]
    assert read("me\t\nok\t\n")[0].label == ("", "")  # withheld labels


def conllu(*words):
    """Return a text whose words have these FEATS and MISC."""
    rows = (f"{n}\tword{n}\t_\tNOUN\t_\t{feats}\t0\troot\t_\t{misc}\n" for n, (feats, misc) in enumerate(words, 1))
    return "".join(rows) + "\n"


CASES = conllu(("Case=Nom|Number=Sing", "AdpType=Prep|Lang=spa"), ("_", "Lang=eng|SpaceAfter=No"), ("Case=Acc", "_"))


@pytest.mark.parametrize(
    ("column", "tags"),
    [
        ("misc.Lang", ("spa", "eng", "_")),
        ("feats.Case", ("Nom", "_", "Acc")),
        ("MISC.AdpType", ("Prep", "_", "_")),
        ("upos", ("NOUN",) * 3),
        ("misc", ("AdpType=Prep|Lang=spa", "Lang=eng|SpaceAfter=No", "_")),
    ],
)
def test_labels_from_a_key_of_conllu(column, tags):
    assert [example.label for example in read(CASES, label=column)] == [tags]


def test_the_default_of_conllu_is_the_only_key_of_misc_and_never_all_of_it():
    (example,) = read(conllu(("Case=Nom", "Lang=spa"), ("_", "Lang=eng|SpaceAfter=No")))
    assert example.label == ("spa", "eng")
    (example,) = read(conllu(("_", "lang1"), ("_", "lang2")))
    assert example.label == ("lang1", "lang2")
    for content, options in ((CASES, {}), (conllu(("Case=Nom", "_")), {}), (CASES, {"label": "misc.lang"})):
        with pytest.raises(DataError, match=r"data.label_column to upos, feats.Case") as caught:
            read(content, **options)
        assert (caught.value.code, caught.value.fields["field"]) == ("column", "label_column")
