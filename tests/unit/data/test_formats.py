"""The seventeen kinds of file in which corpora come: read as they are, or refused with the one key that reads them."""

import ast
import contextlib
import csv
import functools
import gzip
import io
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_readers import predicted, read, refused, write  # noqa: F401

from tokmask_peft.data import opening
from tokmask_peft.data.readers import TextFile
from tokmask_peft.errors import TokmaskError
from tokmask_peft.recipe.data import SourceConfig


def workbook(rows, *, sheets=("Sheet1",)):
    """Return the bytes of a workbook, its rows in the first sheet."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for number, name in enumerate(sheets):
        sheet = book.active if number == 0 else book.create_sheet(name)
        for row in rows if number == 0 else [["a", "b"]]:
            sheet.append(row)
    book.save(sink := io.BytesIO())
    return sink.getvalue()


def zipped(**files):
    with zipfile.ZipFile(sink := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return sink.getvalue()


# -- the seventeen kinds --
# ruff: noqa: E501, F811

POSTS = [("padam mass", "Positive"), ("mokka, da", "Negative")]
WORDS = [(("aku", "suka", "coffee"), ("ID", "ID", "EN")), (("ok",), ("EN",))]
CONLL = "aku\tID\nsuka\tID\ncoffee\tEN\n\nok\tEN\n\n"
META = "meta\t42\tpositive\n@\tO\nyaar\tHin\n\nmeta\t43\tnegative\nno\tEng\n"
UD = """# sent_id = a
# text = hy rint
1-2\thyrint\t_\t_\t_\t_\t_\t_\t_\t_
1\thy\t_\tPRON\t_\t_\t2\tnsubj\t_\tAdpType=Prep|Lang=fy
2\trint\t_\tVERB\t_\t_\t0\troot\t_\tLang=nl|SpaceAfter=No
2.1\tx\t_\tVERB\t_\t_\t_\t_\t_\t_
"""
TREES = [(("hy", "rint"), ("fy", "nl"))]
META_TEXTS = [("@ yaar", "positive"), ("no", "negative")]
BY_NUMBER = {"text_column": 3, "label_column": 1}
IDS = '{"id": 0, "word": "%s", "tag": "%s"}\n'

AS_IT_IS = {
    "1 usual names": ("a.tsv", "text\tlabel\npadam mass\tPositive\nmokka, da\tNegative\n", "sequence", {}, POSTS),
    "2 own names, trailing blanks": ("a.tsv", "id\tTweet\tVerdict\n7\tpadam mass\tPositive \n8\tmokka, da\tNegative\n", "sequence", {"label_column": "Verdict"}, POSTS),
    "3 semicolons": ("a.csv", "tweet;n;sentiment\npadam mass;3,5;Positive\nmokka, da;1;Negative\n", "sequence", {}, POSTS),
    "3 bars, an uneven row": ("a.csv", "tweet|sentiment\npadam mass|Positive\nmokka, da|Negative\n", "sequence", {}, POSTS),
    "3 tabs": ("a.csv", "tweet\tsentiment\npadam mass\tPositive\nmokka, da\tNegative\n", "sequence", {}, POSTS),
    "4 no header": ("a.tsv", "s\tPositive\t\tpadam mass\ns\tNegative\t*\tmokka, da\n", "sequence", BY_NUMBER, POSTS),
    "4 no header, asked": ("a.csv", "text,label\n", "sequence", {"header": False, "text_column": 0, "label_column": -1}, [("text", "label")]),
    "5 label first": ("a.txt", "Positive padam mass\nNegative mokka, da\n", "sequence", {"format": "labelled"}, POSTS),
    "5 label first, a tab": ("a.txt", "Positive\tpadam mass\nNegative\tmokka, da\n", "sequence", {"format": "labelled"}, POSTS),
    **{f"6 CoNLL as {name}": (name, CONLL, "token", {}, WORDS) for name in ("a.txt", "a.tsv", "a.csv", "a", "a.iob2")},
    **{f"6 CoNLL with blanks as {name}": (name, CONLL.replace("\t", " "), "token", {}, WORDS) for name in ("a.txt", "a.tsv", "a.csv", "a")},
    **{f"6 CoNLL with comments as {name}": (name, f"# sent_id = 1\n{CONLL}", "token", {}, WORDS) for name in ("a.txt", "a.tsv", "a.csv", "a")},
    **{f"7 meta lines as {name}": (name, META, "sequence", {}, META_TEXTS) for name in ("a.txt", "a.tsv", "a.csv", "a")},
    "7 meta lines, words": ("a.txt", META, "token", {}, [(("@", "yaar"), ("O", "Hin")), (("no",), ("Eng",))]),
    "7 meta lines over three columns": ("a.conll", "meta\t42\tpositive\nyaar\tHin\tN\nok\tEng\tN\n", "sequence", {}, [("yaar ok", "positive")]),
    "8 several columns, one row short": ("a.txt", "nenu\tte\tPRP\nok\ten\n\n" + "vachanu\tte\tVB\n" * 9, "token", {"label_column": 1}, [(("nenu", "ok"), ("te", "en")), (("vachanu",) * 9, ("te",) * 9)]),
    "9 word/tag": ("a.txt", "ami/bn 1/2/num ./univ\nhttp://x.y/univ\n", "token", {"format": "tagged"}, [(("ami", "1/2", "."), ("bn", "num", "univ")), (("http://x.y",), ("univ",))]),
    "9 word_tag": ("a.txt", "ami_bn a/b_en :__univ\n", "token", {"format": "tagged"}, [(("ami", "a/b", ":_"), ("bn", "en", "univ"))]),
    "10 a row a word": ("a.csv", "sent,word,tag\n1,aku,ID\n1,suka,ID\n1,coffee,EN\n2,ok,EN\n", "token", {}, WORDS),
    "10 a row a word in JSON lines": ("a.jsonl", IDS % ("aku", "ID") + IDS % ("suka", "ID") + IDS % ("coffee", "EN") + (IDS % ("ok", "EN")).replace("0", "1"), "token", {}, WORDS),
    "11 <EOS>": ("a.csv", "aku,ID\nsuka,ID\ncoffee,EN\n<EOS>,<EOS>\nok,EN\n<EOS>,<EOS>\n", "token", {}, WORDS),
    "11 an empty row": ("a.csv", "word,tag\naku,ID\nsuka,ID\ncoffee,EN\n,\nok,EN\n", "token", {}, WORDS),
    "11 a blank line": ("a.tsv", "word\ttag\naku\tID\nsuka\tID\ncoffee\tEN\n\nok\tEN\n", "token", {}, WORDS),
    "12 the start at the first word": ("a.csv", '"T: 12",aku,ID\n,suka,ID\n,coffee,EN\n"T: 13",ok,EN\n"T: 14",mau,ID\n', "token", {"text_column": 1, "label_column": 2, "header": False}, [*WORDS, (("mau",), ("ID",))]),
    **{f"13 CoNLL-U as {name}": (name, UD, "token", {"label_column": "MISC.Lang"}, TREES) for name in ("a.conllu", "a.tsv", "a")},
    "16 JSON in cells": ("a.csv", 'words,tags\n"[""aku""]","[""ID""]"\n', "token", {}, [(("aku",), ("ID",))]),
    "16 Python in cells": ("a.csv", "words,tags\n\"['aku', 'ok']\",\"['ID', 'EN']\"\n", "token", {}, [(("aku", "ok"), ("ID", "EN"))]),
    "16 numpy in cells": ("a.csv", "words,tags\n['aku' 'ok'],[0 0]\n", "token", {}, [(("aku", "ok"), ("0", "0"))]),
    "16 words in cells": ("a.csv", "words,tags\naku ok,ID EN\n", "token", {}, [(("aku", "ok"), ("ID", "EN"))]),
    "17 labels like missing": ("a.tsv", "id\ttext\tlabel\n00017\ta\t1.0\n00018\tb\tNA\n00019\tc\tNone\n00020\td\ttrue\n00021\te\tnull\n", "sequence", {}, [("a", "1.0"), ("b", "NA"), ("c", "None"), ("d", "true"), ("e", "null")]),
}  # fmt: skip
ENCODED = [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r"), ("utf-16-le", "\n"), ("utf-16-be", "\r\n"), ("utf-32", "\n")]  # fmt: skip


@pytest.mark.parametrize("kind", AS_IT_IS)
def test_a_kind_has_the_same_rows_in_every_encoding_and_in_predictions(write, kind):
    name, content, task, options, expected = AS_IT_IS[kind]
    odd = {"mass": "नम\u200dस्ते", "coffee": "ka\u200bva👩\u200d💻", "ok": "שלום", "busy": "l’été"}
    for plain, word in odd.items():
        content = content.replace(plain, word)
        expected = ast.literal_eval(repr(expected).replace(plain, word))
    unlabelled = {key: value for key, value in options.items() if key != "label_column"}
    if "with blanks" in kind:  # which, without labels, may be prose
        unlabelled["format"] = "conll"
    for encoding, end in ENCODED:
        path = write(name, content.replace("\n", end), encoding)
        assert read(path, task, **options)[0] == expected
        assert [text for _, text in predicted(path, task, **unlabelled)] == [text for text, _ in expected]


TABLE = 'text,label\npadam mass,Positive\n"mokka, da",Negative\n'


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("train.csv.gz", lambda: gzip.compress(TABLE.encode())),
        ("train.csv", lambda: gzip.compress(TABLE.encode())),
        ("train.zip", lambda: zipped(posts__csv=TABLE)),
        ("train.csv.zip", lambda: zipped(README__txt="read me", posts__csv=TABLE, **{"__MACOSX/._posts__csv": "x"})),
        ("train.xlsx", lambda: workbook([["text", "label"], *map(list, POSTS)])),
        ("train.xlsx", lambda: workbook([["A corpus"], ["text", "label"], *map(list, POSTS)])),
        ("train.csv", lambda: workbook([["text", "label"], *map(list, POSTS)])),
        ("train.zip", lambda: zipped(posts__xlsx=workbook([["text", "label"], *map(list, POSTS)]))),
    ],
)
def test_kinds_14_and_15_workbooks_and_archives(write, name, pack):
    path = write(name, pack())
    for place in (path, path.parent):
        assert read(place)[0] == POSTS
    assert [text for _, text in predicted(path)] == [text for text, _ in POSTS]


@pytest.mark.parametrize(
    ("name", "content", "task", "code", "key"),
    [
        ("a.csv", "Tweet,Verdict\npadam,Positive\n", "sequence", "column", {"field": "label_column"}),
        ("a.csv", "Beitrag~label\npadam~Positive\n", "sequence", "column", {"field": "separator"}),
        ("a.tsv", "text,label\npadam,Positive\n", "sequence", "column", {"field": "separator"}),
        ("a.csv", "1 a moving film\n0 nothing\n", "sequence", "column", {"field": "separator"}),
        ("a.tsv", "s\t1\t\tone two\ns\t0\t*\ttwo one\n", "sequence", "column", {"field": "text_column"}),
        ("a.txt", "1 a moving film\n0 nothing here\n1 it moves me\n", "sequence", "format", {"format": "labelled"}),
        ("a", "pos\tso good\nneg\tso bad\npos\tfine\n", "sequence", "format", {"format": "labelled"}),
        ("a.txt", "ami/bn khub/bn busy/en ./univ\nok/en\n", "token", "format", {"format": "tagged"}),
        ("a", "ami_bn khub_bn a/b_en\n", "token", "format", {"format": "tagged"}),
        ("a.txt", "text\tlabel\nso good\tpos\n", "sequence", "format", {"format": "tsv"}),
        ("a.dat", "text;label\nso good;pos\n", "sequence", "format", {"format": "csv"}),
        ("a.txt", "meta\t4\tneg\n\tO\nyaar\tHin\n", "token", "empty-word", {}),
        ("a.conllu", UD, "token", "column", {"field": "label_column"}),
        ("a.csv", "words,tags\nhola,x\nok,y\n", "token", "word-per-row", {"columns": ()}),
        ("a.csv", "text,label\nœufs ýok,x\n".encode("cp1252"), "sequence", "not-utf8", {"field": "encoding"}),
    ],
)  # fmt: skip
def test_what_is_not_read_names_the_key_that_reads_it(write, name, content, task, code, key):
    error = refused(write(name, content), task)
    assert error.code == code
    assert {field: error.fields[field] for field in key} == key


def test_an_empty_word_is_left_out_with_its_text_if_asked(write):
    path = write("a.txt", "meta\t4\tneg\n\tO\nyaar\tHin\n\nmeta\t5\tpos\nok\tEng\n")
    assert read(path, "token", missing=[""])[0] == [("", None), (("ok",), ("Eng",))]
    assert predicted(path, "token", format="conll") == [(2, "empty-word"), (6, ("ok",))]
    rows = '{"words": ["", "a"], "tags": ["x", "y"]}\n{"words": ["ok"], "tags": ["Eng"]}\n'
    for name, content, options in (("b.txt", "/x a/y\nok/Eng\n", {"format": "tagged"}), ("c.jsonl", rows, {})):
        path = write(name, content)
        assert refused(path, "token", **options).code == "empty-word"
        assert [label for _, label in read(path, "token", missing=[""], **options)[0]] == [None, ("Eng",)]
    for name, content, options in (
        ("d.csv", 'text,label\n"  ",x\nok,y\n', {}),
        ("e.txt", "x\ny ok\n", {"format": "labelled"}),
    ):
        path = write(name, content)
        assert refused(path, **options).code == "empty-text"
        assert [label for _, label in read(path, missing=[""], **options)[0]] == [None, "y"]


def test_a_folder_of_packed_files_has_its_splits(tmp_path):
    pq.write_table(pa.table({"text": ["c"], "label": ["x"]}), sink := io.BytesIO())
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "label": "x"}\n'))
    (tmp_path / "dev.zip").write_bytes(zipped(posts__csv="text,label\nb,x\n"))
    (tmp_path / "test.parquet.gz").write_bytes(gzip.compress(sink.getvalue()))
    (tmp_path / "more").write_bytes(b"c\tx\n")
    assert [read(tmp_path, split=split)[0][0][0] for split in ("train", "validation", "test")] == ["a", "b", "c"]
    (tmp_path / "sub").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "sub" / split).write_text(CONLL)
    assert read(tmp_path / "sub", "token", split="validation")[0] == WORDS


# -- formats of lines --


def test_lines_without_a_tag_or_a_text_keep_their_row(write):
    path = write("a.txt", "ami/bn ok\n\n/bn a/en\na/en\n")
    assert predicted(path, "token", format="tagged") == [
        (1, ("ami", "ok")), (2, "blank-row"), (3, "unreadable"), (4, ("a",)),
    ]  # fmt: skip
    error = refused(path, "token", format="tagged")
    assert (error.code, error.fields["where"]) == ("no-tag", f"{path}:1")
    path = write("b.txt", "1 a film\n\n0\n1 \tan other\n")
    assert predicted(path, format="labelled") == [(1, "a film"), (2, "blank-row"), (3, "empty-text"), (4, "an other")]
    assert refused(path, format="labelled").code == "empty-text"


def test_the_separator_of_lines_may_be_given(write):
    path = write("a.txt", "a_b/x c_d/y\n")
    assert read(path, "token", format="tagged")[0] == [(("a_b", "c_d"), ("x", "y"))]
    assert read(path, "token", format="tagged", separator="_")[0] == [(("a", "c"), ("b/x", "d/y"))]
    path = write("b.txt", "so so;a film; good\nno;bad\n")
    assert read(path, format="labelled", separator=";")[0] == [("a film; good", "so so"), ("bad", "no")]


@pytest.mark.parametrize(("format", "task"), [("tagged", "sequence"), ("labelled", "token")])
def test_a_format_of_the_other_task_is_refused(write, format, task):
    error = refused(write("a.txt", "a/b c/d\n"), task, format=format)
    assert (error.code, error.fields["field"]) == ("format", "format")


def test_lists_of_posts_stay_lists_of_posts(write):
    for content in ("1 hola amigo\n2 que tal\n\n3 bien gracias\n", "hola amigo\nque tal\n\nbien gracias\n"):
        path = write("a.txt", content)
        assert [text for _, text in predicted(path)] == [line or "unreadable" for line in content.splitlines()]
    assert [text for _, text in predicted(write("a.txt", CONLL))] == ["aku suka coffee", "ok"]
    assert [text for _, text in predicted(write("a.txt", META), "token")] == [("@", "yaar"), ("no",)]
    assert read(write("b.tsv", "hola\tx\nadios\ty\n\nok\tx\n"), text_column=0, label_column=1)[0][1] == ("adios", "y")


def test_conll_by_its_content_is_a_decision_that_a_format_overrides(write):
    path = write("a.tsv", f"# sent_id = 1\n{CONLL}")
    assert read(path, "token")[1]["format"] == "conll"
    assert refused(path, "token", format="tsv").code in {"column-count", "column"}
    quotes = '"\tO\nyes\tO\n"\tO\n\nno\tO\n'
    assert read(write("b.tsv", quotes), "token")[0][0][0] == ('"', "yes", '"')


# -- separator --


@pytest.mark.parametrize(
    ("name", "options", "separator"),
    [("a.csv", {}, ","), ("a.csv", {"separator": "~"}, "~"), ("a.tsv", {"separator": "|"}, "|"), ("a.csv", {"separator": "tab"}, "\t")],
)  # fmt: skip
def test_a_separator_that_is_given_is_used(write, name, options, separator):
    rows = [
        ["text", "label"],
        ["a; b; c|d" if separator != "|" else "a; b", "x"],
        ["e\tf"[: 1 if separator == "\t" else 3], "y"],
    ]
    path = write(name, "\n".join(separator.join(row) for row in rows))
    found, decided = read(path, **options)
    assert found == [tuple(row) for row in rows[1:]]
    assert decided == {}


def test_a_column_file_may_have_another_separator(write):
    path = write("a.csv", "# id = 1\naku,ID\n#suka,ID\ncoffee,EN\n\n# id = 2\nok,EN\n")
    expected = [(tuple(word.replace("suka", "#suka") for word in words), tags) for words, tags in WORDS]
    assert read(path, "token", format="conll", separator=",")[0] == expected


def test_the_separator_of_the_header_wins_over_a_damaged_row(write):
    path = write("a.csv", "text;label\nuno, dos;x\nuno, dos; tres;y\ncuatro;x\n")
    error = refused(path)
    assert (error.code, error.fields["where"]) == ("column-count", f"{path}:3")
    assert predicted(path) == [(2, "uno, dos"), (3, "column-count"), (4, "cuatro")]


def test_separators_of_a_recipe():
    values = {"auto": "auto", "\t": "tab", "tab": "tab", "\\t": "tab", ";": ";"}
    assert {value: SourceConfig(path="x", separator=value).separator for value in values} == values


@pytest.mark.parametrize(("key", "value"), [("separator", ""), ("separator", ";;"), ("separator", '"'), ("separator", "\n"), ("encoding", "utf-9"), ("encoding", "hex"), ("encoding", "a\0")])  # fmt: skip
def test_odd_values_are_refused_in_the_recipe(key, value):
    with pytest.raises(ValueError, match=key):
        SourceConfig(path="x", **{key: value})


# -- encoding --

WESTERN = "qué “bien”, naïve… 3 € l’été – ¿sí? ¡NO! Ça va, CAFÉ 5º m²"


def test_windows_1252_is_read_if_nothing_else_fits(write):
    path = write("a.tsv", f"text\tlabel\n{WESTERN}\tx\nplain\ty\n", "cp1252")
    assert read(path) == ([(WESTERN, "x"), ("plain", "y")], {"encoding": "cp1252"})
    assert predicted(path)[0][1] == WESTERN


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("привет мир", "cp1251"), ("γειά σου", "cp1253"), ("güneş çok ılık", "cp1254"), ("łąka jest żółta", "cp1250"),
        ("příliš žluťoučký kůň", "cp1250"), ("こんにちは", "cp932"), ("你好吗", "gbk"), ("mañana", "cp850"), ("שלום", "cp1255"),
    ],
)  # fmt: skip
def test_other_encodings_are_refused_with_the_key_and_read_with_it(write, text, encoding):
    path = write("a.tsv", f"text\tlabel\n{text}\tx\nplain\ty\n", encoding)
    error = refused(path)
    assert (error.code, error.fields["field"]) == ("not-utf8", "encoding")
    assert "data.encoding" in str(error)
    assert read(path, encoding=encoding) == ([(text, "x"), ("plain", "y")], {})
    assert predicted(path, encoding=encoding)[0] == (2, text)


def test_a_few_odd_words_do_not_make_another_encoding(write):
    rows = "".join(f"señor número {n}\tx\n" for n in range(60))
    assert read(write("a.tsv", f"text\tlabel\n{rows}Škoda\ty\n", "cp1252"))[1]["encoding"] == "cp1252"
    assert refused(write("b.tsv", f"text\tlabel\n{rows}{'Škoda ' * 9}\ty\n", "cp1252")).code == "not-utf8"


def test_one_foreign_line_in_utf8_is_that_line_only(write):
    path = write("a.tsv", "text\tlabel\nmañana\tx\n".encode() + "qué\ty\n".encode("cp1252"))
    assert refused(path).fields["where"] == f"{path}:3"
    assert predicted(path) == [(2, "mañana"), (3, "not-unicode")]


def test_bytes_that_the_given_encoding_lacks_are_one_row(write):
    path = write("a.tsv", b"text\tlabel\nqu\xe9\tx\na\x81b\ty\n")
    assert predicted(path, encoding="cp1252") == [(2, "qué"), (3, "not-unicode")]
    error = refused(path, encoding="cp1252")
    assert (error.code, error.fields["where"]) == ("not-utf8", f"{path}:3")
    assert refused(write("b.tsv", "text\tlabel\na\tx\n" * 3), encoding="utf-16").code == "not-utf8"


# -- archives and workbooks --


@pytest.mark.parametrize(
    ("name", "pack", "code"),
    [
        ("a.zip", lambda: zipped(a__csv=TABLE, b__csv=TABLE), "archive"),
        ("a.zip", lambda: zipped(README__md="read me"), "archive"),
        ("a.zip", lambda: zipped(a__zip=zipped(a__csv=TABLE)), "not-text"),
        ("a.zip", lambda: zipped(a__csv=TABLE)[:-30], "archive"),
        ("a.zip", lambda: zipped(a__csv=TABLE)[:45] + bytes(9) + zipped(a__csv=TABLE)[54:], "archive"),
        ("a.csv.gz", lambda: gzip.compress(TABLE.encode())[:-9], "archive"),
        ("a.csv.gz", lambda: gzip.compress(TABLE.encode())[:20] + b"xxxx", "archive"),
        ("a.csv.gz", lambda: gzip.compress(gzip.compress(TABLE.encode())), "not-text"),
        ("a.gz", lambda: gzip.compress(b"one two three\nfour"), "unknown-format"),
        ("a.csv.bz2", lambda: b"BZh91AY&SY" + bytes(40), "not-text"),
        ("a.xlsx", lambda: workbook([["text", "label"], ["a", "x"]], sheets=("one", "two")), "workbook"),
        ("a.xlsx", lambda: workbook([]), "no-texts"),
        ("a.xlsx", lambda: workbook([["text", "label"], ["a", "x"]])[:-300], "archive"),
        ("a.xlsx", lambda: TABLE.encode(), "workbook"),
        ("a.ods", lambda: zipped(mimetype="application/vnd.oasis.opendocument", content__xml=""), "not-text"),
        ("a.xls", lambda: b"\xd0\xcf\x11\xe0" + bytes(60), "not-text"),
        ("a.docx", lambda: zipped(**{"[Content_Types]__xml": "", "word/document__xml": ""}), "not-text"),
    ],
)
def test_damaged_and_ambiguous_archives_are_one_error(write, name, pack, code):
    path = write(name, pack())
    error = refused(path)
    assert error.code == code
    assert str(path) in str(error)


@pytest.mark.parametrize("name", ["", "none"])
def test_a_file_that_cannot_be_opened_is_one_error(tmp_path, name):
    with pytest.raises(TokmaskError) as caught:
        opening.DataFile(tmp_path / name)
    assert caught.value.fields["file"] == str(tmp_path / name)


def test_an_encoding_that_does_not_exist_is_one_error(write):
    with pytest.raises(TokmaskError, match="Did you mean 'latin_1'") as caught:
        opening.DataFile(write("a.txt", "x"), encoding="latin_11")
    assert (caught.value.code, caught.value.fields["field"]) == ("encoding", "encoding")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.zip", "a.xlsx"])
def test_archives_that_grow_too_much_are_refused_before_they_are_read(write, monkeypatch, name):
    monkeypatch.setattr(opening, "FREE", 1000)
    monkeypatch.setattr(opening, "MOST_GROWTH", 2)
    content = "text,label\n" + "0" * 10**6
    if name == "a.xlsx":
        packed = workbook([["text", "label"], *[["hola", "x"]] * 300])
    else:
        packed = gzip.compress(content.encode()) if name.endswith("gz") else zipped(a__csv=content)
    assert refused(write(name, packed)).code == "archive"


def test_cells_of_a_workbook_become_what_the_sheet_shows(write):
    rows = [["id", "text", "label"], [7, "00017", 1], [None, None, None], [8, 3.5, True], ["x", "a\nb", None]]
    path = write("train.xlsx", workbook(rows))
    assert predicted(path) == [(2, "00017"), (3, "blank-row"), (4, "3.5"), (5, "a\nb")]
    assert refused(path).fields["places"] == (f"{path}:5",)
    assert read(path, missing=[""])[0] == [("00017", "1"), ("3.5", "TRUE"), ("a\nb", None)]
    numbers = write("b.xlsx", workbook([["so good", 1], ["so bad", 0]]))
    assert read(numbers, text_column=0, label_column=1, header=False)[0] == [("so good", "1"), ("so bad", "0")]


def test_a_title_above_the_header_is_left_out_and_nothing_else(write):
    assert read(write("a.csv", "A corpus,\ntext,label\na,x\n")) == ([("a", "x")], {"title": "left out"})
    assert read(write("b.csv", "Ein Korpus\nBeitrag,label\na,x\n"), text_column="Beitrag")[0] == [("a", "x")]
    flags = write("e.csv", "Ein Korpus,,\nBeitrag,joy,anger\na,1,0\n")
    assert read(flags, "multilabel", text_column=0, label_column=["joy", "anger"])[0] == [("a", ("joy",))]
    tags = TextFile(write("c.csv", "one,\naku,ID\nsuka,ID\n"), "token", text_column=0)
    assert [decision.what for decision in tags.decisions if "title" in decision.what] == []
    given = {"header": False, "text_column": 0, "label_column": 0}
    assert read(write("d.csv", "text,\nid,label\n"), **given)[0][0] == ("text", "text")


def test_without_openpyxl_the_error_names_the_extra(write, monkeypatch):
    path = write("a.xlsx", workbook([["text", "label"], ["a", "x"]]))
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    error = refused(path)
    assert (error.code, error.fields["extra"]) == ("missing-extra", "excel")


# -- what is written is read --

cell = st.text(st.characters(exclude_categories=("Cs", "Cc"), codec="utf-8"), min_size=1, max_size=12)
cell |= st.sampled_from(['"', '""', ",", ";", "a\nb", "#x", "é", "/"])
SEPARATORS = [",", ";", "\t", "|", "~", ":", "§", "^", "="]


@given(
    rows=st.lists(st.tuples(cell, cell), min_size=1, max_size=6),
    separator=st.sampled_from(SEPARATORS),
    ending=st.sampled_from([".csv", ".csv.gz", ".csv.zip"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "cp1251", "latin-1", "gb18030"]),
    end=st.sampled_from(["\n", "\r\n"]),
)  # fmt: skip
def test_tables_with_separator_and_encoding_given(tmp_path_factory, rows, separator, ending, encoding, end):
    with io.StringIO(newline="") as sink:
        writer = csv.writer(sink, delimiter=separator, lineterminator=end)
        writer.writerows([("text", "label"), *rows])
        text = sink.getvalue()
    try:
        content = text.encode(encoding)
    except UnicodeEncodeError:
        assume(False)
    assume(all(label.strip() and word.strip() and "﻿" not in word for word, label in rows))
    path = tmp_path_factory.mktemp("table") / f"train{ending}"
    packed = {".csv": bytes, ".csv.gz": gzip.compress, ".csv.zip": lambda content: zipped(train__csv=content)}
    path.write_bytes(packed[ending](content))
    found = predicted(path, separator=separator, encoding=encoding, text_column="text")
    assert [text for _, text in found] == [text for text, _ in rows]


token = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp"), codec="utf-8"), min_size=1, max_size=6)
token = token.filter(lambda text: "﻿" not in text)
tag = st.sampled_from(["bn", "en", "univ", "B-PER"])


@given(
    posts=st.lists(st.lists(st.tuples(token, tag), min_size=1, max_size=5), min_size=1, max_size=4),
    separator=st.sampled_from("/_"),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_tagged_lines_round_trip(tmp_path_factory, posts, separator, end, encoding):
    path = tmp_path_factory.mktemp("tagged") / "train.txt"
    lines = [" ".join(separator.join(pair) for pair in post) for post in posts]
    path.write_bytes((end.join(lines) + end).encode(encoding))
    expected = [tuple(zip(*post, strict=True)) for post in posts]
    assert read(path, "token", format="tagged", separator=separator)[0] == expected


@given(
    posts=st.lists(st.lists(st.tuples(token, tag, tag), min_size=2, max_size=5), min_size=2, max_size=4),
    name=st.sampled_from(["train", "train.txt", "train.tsv", "train.csv", "train.iob", "train.txt.gz"]),
    separator=st.sampled_from("\t "),
    comments=st.booleans(),
)
def test_conll_round_trips_under_any_name(tmp_path_factory, posts, name, separator, comments):
    assume(not posts[0][0][0].startswith("-DOCSTART-"))
    path = tmp_path_factory.mktemp("conll") / name
    head = "# sent_id = 1\n" if comments else ""
    text = "\n".join(head + "".join(f"{separator.join(row)}\n" for row in post) for post in posts)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found, _ = read(path, "token", label_column=-1)
    assert found == [(tuple(row[0] for row in post), tuple(row[2] for row in post)) for post in posts]
    assert [text for _, text in predicted(path, "token", format="conll")] == [text for text, _ in found]


PACKS = {
    "a.csv.gz": lambda: gzip.compress(TABLE.encode()),
    "a.zip": lambda: zipped(a__csv=TABLE),
    "a.xlsx": functools.cache(lambda: workbook([["text", "label"], *map(list, POSTS)])),
}


@pytest.mark.parametrize("name", PACKS)
@settings(deadline=None)
@given(place=st.integers(0, 10**4), odd=st.binary(max_size=6), cut=st.booleans())
def test_a_damaged_archive_is_read_whole_or_refused(tmp_path_factory, name, place, odd, cut):
    content = PACKS[name]()
    place %= len(content)
    content = content[:place] + odd + (b"" if cut else content[place + len(odd) :])
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    with contextlib.suppress(TokmaskError):
        found = read(path)[0]
        assert name == "a.xlsx" or found == POSTS  # XML that is damaged may be another workbook


@given(content=st.binary(max_size=120), name=st.sampled_from(["a.csv.gz", "a.zip", "a.xlsx", "a", "a.txt"]), magic=st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08"]), format=st.sampled_from(["auto", "tagged", "labelled", "xlsx"]))  # fmt: skip
def test_odd_bytes_in_archives_are_one_error(tmp_path_factory, content, name, magic, format):
    path = tmp_path_factory.mktemp("odd") / name
    path.write_bytes(magic + content)
    for task in ("sequence", "token"):
        for attempt in (read, lambda path, task, format: list(TextFile(path, task, format))):
            with contextlib.suppress(TokmaskError):
                attempt(path, task, format=format)
