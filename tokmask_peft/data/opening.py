"""A local file that is being read: the archive around it, its encoding, and its lines, or the cells of its sheet."""

from __future__ import annotations

import codecs
import copy
import gzip
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tokmask_peft.console import Decision
from tokmask_peft.data.conll import Cells, blank_row
from tokmask_peft.errors import DataError, TokmaskError, as_ours, first_line, require
from tokmask_peft.recipe.data import known_encoding

FREE, MOST_GROWTH = 64 * 2**20, 200
"""An archive may unpack to this many bytes, or to this many times its size: text shrinks to a third or a tenth."""
FIRST_ROWS = 1000  # rows of a sheet from which its width is decided
PACKED = (".gz", ".zip")
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"}
_BOMS |= {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_ZIP, _GZIP = (b"PK\x03\x04", b"PK\x05\x06"), b"\x1f\x8b"
_UNPACK = "Unpack it, and name the text file"
_MAGIC = {
    _ZIP[0]: ("a zip archive", _UNPACK),
    _ZIP[1]: ("an empty zip archive", _UNPACK),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook (xls)", "In Excel, save it as xlsx, or the sheet as 'CSV UTF-8'"),
    _GZIP: ("compressed by gzip", _UNPACK),
    b"BZh91AY&SY": ("compressed by bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed by xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"PAR1\x15": ("a parquet file", "Set the format to parquet"),
    b"%PDF-": ("a PDF document", "Export its table as CSV"),
}
_BESIDE_A_TABLE = re.compile(r"(?i)(?:readme|licen[cs]e|citation)\b.*|.*\.(?:md|pdf|html?|docx?|bib|py)")
_MARKS = "‘’“”–—…«»¡¿\xa0"  # may stand next to each other
_LETTER = "[A-Za-zÀ-ÖØ-öø-ÿŒœ]"
_NOT_WESTERN = re.compile(
    rf"[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfffŠšŽžÐðÞþÝý]|([^\0-\x7f{_MARKS}])(?!\1)[^\0-\x7f{_MARKS}]{{2}}"
    rf"|[¹²³](?={_LETTER})|(?<=[a-z])(?:[ŒŸƒ]|–(?=[a-z]))|(?<={_LETTER})[¤¦¬¯¸†‡ˆ‰˜¶¢¥±¡¿]"
    rf"|(?<={_LETTER})(?:[ªº]|[^\w\0-\x7f´’–—…\xa0\xad·])(?={_LETTER})"
)
"""Finds what Windows-1252 makes of words in another encoding, and what hardly occurs in Western European words."""
_MOST_ODD = 0.02
"""Of words that are not ASCII: at most 0.005 in Spanish, at least 0.15 in other encodings of Spanish and Turkish."""


class _Unpacked(io.RawIOBase):
    """The bytes of what is in an archive, counted as they are unpacked."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path, self._read = stream, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            found = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise _archive_error(self._path, f"cannot be unpacked: {first_line(error)}") from error
        self._read += len(found)
        check_growth(self._path, self._read)
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._stream.close()
        super().close()


def check_growth(path: Path, unpacked: int) -> None:
    """Refuse an archive that unpacks to more bytes than a text of its size can have."""
    if unpacked > max(FREE, MOST_GROWTH * path.stat().st_size):
        raise _archive_error(path, f"unpacks to more than {MOST_GROWTH} times its size, as no text does")


def _archive_error(path: Path, problem: str) -> DataError:
    return DataError(f"{path}: {problem}. {_UNPACK} in data.path.", code="archive", file=str(path))


@contextmanager
def damaged(file: DataFile, kind: str, code: str) -> Iterator[None]:
    """Turn what fails in a damaged file, in many places and ways, into one DataError with the file's name."""
    try:
        yield
    except (TokmaskError, MemoryError):
        raise
    except Exception as error:
        problem = f"{file.name}: cannot be read as {kind}: {type(error).__name__}: {first_line(error)}"
        raise DataError(problem, code=code, file=file.name) from error


class DataFile:
    """A file to read from, or the only table in an archive (.zip, .gz), which is unpacked while it is read.

    `name` is for places such as `name:line`; if `tolerant`, bytes that are not in the encoding stay as lone surrogates,
    for `unicode_problem` to find; `decisions` takes what was decided about the encoding. `inner` is the path, or what
    an archive holds, whose ending tells the format; `workbook` whether it is an Excel workbook, whatever its ending;
    `total` its size in bytes, unpacked, and `done` those read so far. DataError if it cannot be opened, or does not
    hold exactly one table.
    """

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        tolerant: bool = False,
        encoding: str = "auto",
        decisions: list[Decision] | None = None,
    ) -> None:
        self.path, self.name, self._tolerant, self._asked = path, name or str(path), tolerant, encoding
        self.inner, self.done, self.workbook = path, 0, False
        self._notes = [] if decisions is None else decisions
        self._member: zipfile.ZipInfo | None = None
        try:
            known_encoding(encoding)
        except ValueError as error:
            problem = f"data.encoding: {error} Found '{encoding}'."
            raise DataError(problem, code="encoding", field="encoding") from error
        try:
            self.total = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(8)
                file.seek(-min(4, self.total), io.SEEK_END)
                size = int.from_bytes(file.read(4), "little")  # unpacked, if it is compressed by gzip
        except OSError as error:
            raise as_ours(error, f"reading {path}", DataError, "unreadable-file", file=str(path)) from error
        self._gzipped = head.startswith(_GZIP)
        if self._gzipped:
            self.total = max(self.total, size)
        if head.startswith(_ZIP):
            self._look_into_zip()
        elif self._gzipped and path.suffix.lower() in PACKED:
            self.inner = path / path.stem

    def _look_into_zip(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [one for one in archive.infolist() if not one.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise _archive_error(self.path, f"is not a whole zip archive: {first_line(error)}") from error
        names = [one.filename for one in members]
        self.workbook = "xl/workbook.xml" in names
        if "[Content_Types].xml" in names or "mimetype" in names:  # of Office or OpenOffice
            return
        inside = [one for one in members if not one.filename.startswith("__MACOSX/")]
        inside = [one for one in inside if (name := PurePosixPath(one.filename).name) and name[0] != "."]
        tables = [one for one in inside if not _BESIDE_A_TABLE.fullmatch(PurePosixPath(one.filename).name)]
        if len(tables) != 1:
            found = ", ".join(one.filename for one in (tables or inside)[:10]) or "nothing"
            raise _archive_error(self.path, f"an archive is read if it holds one table, but this one holds {found}")
        self._member, self.total = tables[0], tables[0].file_size
        if self.path.suffix.lower() in PACKED:
            self.inner = self.path / PurePosixPath(self._member.filename).name

    def open(self) -> io.BufferedReader:
        """Return the bytes of the file, unpacked."""
        if self._member is None and not self._gzipped:
            return self.path.open("rb")
        try:
            archive = zipfile.ZipFile(self.path) if self._member else None
            packed: Any = archive.open(self._member) if archive and self._member else gzip.GzipFile(self.path)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError) as error:
            raise _archive_error(self.path, f"cannot be unpacked: {first_line(error)}") from error
        return io.BufferedReader(_Unpacked(packed, self.path), 2**16)

    def whole(self) -> IO[bytes]:
        """Return the bytes in a form that can be read in any order, for formats that need it."""
        with self.open() as file:
            return io.BytesIO(file.read()) if self._member or self._gzipped else self.path.open("rb")

    def again(self) -> DataFile:
        """Return the file from its beginning, to look ahead in it."""
        _ = self.form  # is looked for once
        other = copy.copy(self)
        other._tolerant, other.done = True, 0
        return other

    @cached_property
    def form(self) -> tuple[str, str]:
        """The encoding of a text file and what ends its lines; DataError for a workbook, an archive or the like."""
        with self.open() as file:
            head = file.read(65536)
        for magic, (what, remedy) in _MAGIC.items():
            if head.startswith(magic):
                if any(part in head for part in (b"[Content_Types].xml", b"xl/", b"opendocument")):
                    what, remedy = "an Excel workbook or another Office document", "Save the sheet as 'CSV UTF-8'"
                raise DataError(f"{self.path}: not a text file, but {what}. {remedy}.", code="not-text", kind=what)
        encoding = self._asked if self._asked == "auto" else codecs.lookup(self._asked).name.removesuffix("-sig")
        bom = next((name for bom, name in _BOMS.items() if head.startswith(bom)), None)
        if encoding == "auto":
            even, odd = head[::2].count(0) / (len(head) + 1), head[1::2].count(0) / (len(head) + 1)
            wide = "utf-16-le" if odd > max(0.2, 2 * even) else "utf-16-be" if even > max(0.2, 2 * odd) else None
            encoding = bom or wide or ("cp1252" if self._is_windows_1252() else "utf-8")
            if encoding == "cp1252":
                why = "it is not UTF-8, and reads like a Western European text; data.encoding changes it"
                self._notes.append(Decision(f"encoding of {self.path.name}", encoding, why))
        elif encoding in ("utf-16", "utf-32"):
            encoding = bom if bom and bom.startswith(encoding) else f"{encoding}-le"
        text = head.decode(encoding, "replace").rstrip("\r")
        return encoding, "\r" if "\r" in text and "\n" not in text else "\n"

    def _is_windows_1252(self) -> bool:
        """Return whether the file has bytes that are not UTF-8, none that are, and reads like text in Windows-1252."""
        with suppress(UnicodeDecodeError), io.TextIOWrapper(self.open(), "utf-8") as text:
            while text.read(2**20):
                pass
            return False
        words = odd = 0
        with self.open() as file:
            for word in (word for line in file if not line.isascii() for word in line.split()):
                if not word.isascii():
                    if _has_utf8(word):
                        return False
                    words += 1
                    odd += _NOT_WESTERN.search(word.decode("cp1252", "surrogateescape")) is not None
        return words > 0 and odd <= _MOST_ODD * words

    def lines(self, keep_ends: bool = False) -> Iterator[str]:
        """Read the lines of a text in the encoding of `form`.

        Only line feeds end a line (or carriage returns, if there are no line feeds): a post may contain other
        characters that Unicode counts as line ends. CSV needs them inside quotes (`keep_ends`). DataError if the file
        is not a text, or a line is not in the encoding (unless `tolerant`).
        """
        encoding, end = self.form
        wide = encoding.startswith(("utf-16", "utf-32"))
        errors = "surrogatepass" if wide else "surrogateescape"
        number = 0
        try:
            with io.TextIOWrapper(self.open(), encoding, errors, end) as file:
                for number, text in enumerate(file, start=1):
                    self.done += len(text.encode(encoding, errors))
                    line = text.removeprefix("\ufeff") if number == 1 else text
                    if not self._tolerant and (problem := unicode_problem(line)):
                        where = f"{self.name}:{number}"
                        raise DataError(f"{where}: {problem}", code="not-utf8", where=where, field="encoding")
                    bare = line.removesuffix(end).removesuffix("\r")
                    yield (line if end == "\n" or bare == line else bare + "\n") if keep_ends else bare
        except UnicodeError as error:
            where = f"{self.name}:{number + 1}"
            shown = f"{where}: not {encoding}" + (", as the file begins" if self._asked == "auto" else "")
            raise DataError(f"{shown}; set data.encoding", code="not-utf8", where=where, field="encoding") from error


def _has_utf8(word: bytes) -> bool:
    """Return whether a word has a character in UTF-8 that is not ASCII."""
    for found in re.finditer(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", word):
        with suppress(UnicodeDecodeError):
            return bool(found[0].decode())
    return False


def unicode_problem(text: str) -> str | None:
    """Return why a text is not valid Unicode, or none: no tokenizer takes it, and JSON lines may contain it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"character {error.start + 1} is not"
        with suppress(UnicodeError):  # not bytes, but half a character that JSON wrote as an escape
            shown = text[error.start : error.end].encode("ascii", "surrogateescape").decode("cp1252")
            problem = f"{place} UTF-8, or not what data.encoding says; as Windows-1252 it is '{shown}'"
            remedy = "If that is right, set data.encoding=cp1252, or convert the file"
            return f"{problem}. {remedy}: iconv -f cp1252 -t utf-8 FILE > NEW"
        return f"{place} valid Unicode, or the file is not UTF-8: data.encoding says which encoding it is in"
    return None


def sheet_cells(file: DataFile) -> Iterator[Cells]:
    """Yield the rows of a workbook's only sheet as texts; ExtraError without openpyxl, DataError if damaged."""
    require("openpyxl", "excel", f"reading {file.name}")
    import openpyxl

    with damaged(file, "an Excel workbook (xlsx)", "workbook"), file.whole() as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what openpyxl leaves out, such as styles
        with zipfile.ZipFile(stream) as archive:
            check_growth(file.path, sum(one.file_size for one in archive.infolist()))
        book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
        sheets = [sheet for sheet in book.worksheets if sheet.sheet_state == "visible" and _first_cell(sheet)]
        if len(sheets) > 1:
            names = tuple(sheet.title for sheet in sheets)
            remedy = "Remove or hide all but one, or save the right one as 'CSV UTF-8'."
            problem = f"{file.name}: several sheets have cells: {', '.join(names)}. {remedy}"
            raise DataError(problem, code="workbook", sheets=names)
        rows = ((number, row) for sheet in sheets for number, row in enumerate(sheet.values, start=1))
        yield from _sheet_rows(((number, [*map(_shown, row)]) for number, row in rows), file.name)
    file.done = file.total


def _first_cell(sheet: Any) -> bool:
    """Return whether something is in the first rows of a sheet; from now on it goes by its cells, not what it says."""
    sheet.reset_dimensions()
    return any(cell is not None for row in islice(sheet.values, FIRST_ROWS) for cell in row)


def _sheet_rows(rows: Iterator[tuple[int, list[str]]], name: str) -> Iterator[Cells]:
    """Yield rows of equal width, without the blank ones at the end."""
    head = list(islice(rows, FIRST_ROWS))
    width = max((at + 1 for _, cells in head for at, cell in enumerate(cells) if cell), default=0)
    blank: list[Cells] = []
    for number, cells in chain(head, rows):
        where = f"{name}:{number}"
        if not any(cells):
            blank.append(blank_row(where))
            continue
        yield from blank
        blank = []
        filled = len(cells) if any(cells[width:]) else width
        yield where, (cells + [""] * filled)[:filled]


def _shown(value: Any) -> str:
    """Return the value of a workbook's cell as text: a whole number without `.0`."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return str(value).upper()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def line_number(where: str) -> int | None:
    """Return n of `file:n`, or n + 1 of row n in `file[n]`: numbers count from 1."""
    match = re.search(r":(?P<line>\d+)$|\[(?P<row>\d+)\]$", where)
    if match is None:
        return None
    return int(match["line"]) if match["line"] else int(match["row"]) + 1
