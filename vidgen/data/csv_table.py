"""Read CSV files that list videos and their classes."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path

from ..common.errors import UserError
from ..common.options import expand_home
from .summary import format_note, list_names

TABLE_SUFFIXES = (".csv", ".tsv")
DELIMITERS = ",;\t"
PATH_COLUMN = "path"
LABEL_COLUMNS = ("label", "class")
CAPTION_COLUMN = "caption"
LINE_BREAKS = re.compile(r"[\r\n]\s*")


def read_table(table: Path) -> tuple[list[Path], list[str | None], list[str]]:
    """Read a CSV of videos: their paths, the names of their classes (None for an empty field), and notes.

    The header names the column `path` and, where there are classes, `label` or `class`, in any case; a column
    `caption` is read by `read_caption_column`. Fields are separated by commas, semicolons or tabs; blanks around them
    are removed. Paths are relative to the CSV. Quoted fields may have line breaks, but not paths and classes.

    Raises:
        UserError: if the file is not UTF-8, has no column `path`, has other columns but none of classes, a quote is
            not closed, or a row has more fields than the header.
    """
    rows = _read_table_rows(table)
    if not rows:
        return [], [], []
    columns = [name.lower() for name in rows[0][1]]
    path_at, label_at = _find_column(table, columns, PATH_COLUMN), _find_label_column(table, columns, rows)

    paths, names, num_without_path = [], [], 0
    for number, row in rows[1:]:
        if any(row[len(columns) :]):
            raise UserError(
                f"{table}, line {number} has {len(row)} fields and the header {len(columns)}: name every column in "
                "the first line (path,label), and quote fields that contain the separator"
            )
        row += [""] * (len(columns) - len(row))
        if not row[path_at]:
            num_without_path += 1
            continue
        paths.append(_resolve(table.parent, row[path_at]))
        names.append((row[label_at] or None) if label_at is not None else None)

    used = [at for at, name in enumerate(columns) if at in (path_at, label_at) or name == CAPTION_COLUMN]
    unused = [name for at, name in enumerate(rows[0][1]) if at not in used and name]
    notes = format_note("unused columns", unused)
    return paths, names, notes + format_note("ignored rows without a path", (), count=num_without_path)


def read_caption_column(table: Path) -> dict[Path, list[str]]:
    """The fields of the column `caption` by the paths of the videos, as `read_table` returns them.

    A path of several rows has several captions. Empty without such a column.

    Raises:
        UserError: the errors of `read_table`; if there are several such columns.
    """
    rows = _read_table_rows(table)
    columns = [name.lower() for name in rows[0][1]] if rows else []
    captions: dict[Path, list[str]] = {}
    if CAPTION_COLUMN in columns:
        path_at, caption_at = (_find_column(table, columns, name) for name in (PATH_COLUMN, CAPTION_COLUMN))
        for _, row in rows[1:]:
            row += [""] * (len(columns) - len(row))
            if row[path_at]:
                captions.setdefault(_resolve(table.parent, row[path_at]), []).append(row[caption_at])
    return captions


def _read_table_rows(table: Path) -> list[tuple[int, list[str]]]:
    """The rows of a table, the header first; none of an empty file."""
    text = _read_text(table)
    header = next((line for line in text.splitlines() if line.strip()), None)
    if header is None:
        return []
    delimiter = next((each for each in DELIMITERS if PATH_COLUMN in _split_header(header, each)), None)
    if delimiter is None:
        raise UserError(f"{table} has no column 'path': its first line should read path,label")
    return _read_rows(table, text, delimiter)


def _read_text(table: Path) -> str:
    try:
        return table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not a CSV file in UTF-8 ({error}); save it in that encoding") from error
    except OSError as error:
        raise UserError(f"{table} cannot be read ({error.strerror or error})") from error


def _split_header(header: str, delimiter: str) -> list[str]:
    fields = next(csv.reader([header], delimiter=delimiter, skipinitialspace=True))
    return [name.strip().lower() for name in fields]


def _read_rows(table: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its (last) line; line breaks in fields become blanks."""
    lines = list(io.StringIO(text, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    rows: list[tuple[int, list[str]]] = []
    start = 0  # line at which the row begins
    try:
        for fields in reader:
            row = [value.strip() for value in fields]
            broken = [at for at, value in enumerate(row) if LINE_BREAKS.search(value)]
            if broken and not _may_break(broken, lines[start : reader.line_num], delimiter, rows):
                raise UserError(f"{table}: a quote is not closed in the lines up to {reader.line_num}")
            if any(row):
                rows.append((reader.line_num, [LINE_BREAKS.sub(" ", value) for value in row]))
            start = reader.line_num
    except csv.Error as error:
        raise UserError(f"{table} is not a CSV file: line {reader.line_num}: {error}") from error
    return rows


def _may_break(broken: list[int], lines: list[str], delimiter: str, rows: list[tuple[int, list[str]]]) -> bool:
    """Whether the line breaks in some fields of a row are those of correctly quoted texts.

    A quote that is not closed ends at the next one, which a strict reader refuses within a field, or with the file.

    Args:
        broken: the indices of these fields.
        lines: of the row.
        delimiter: of the fields.
        rows: those before it, the header first; none for the header.
    """
    names = [name.lower() for name in rows[0][1]] if rows else []
    if any(at >= len(names) or names[at] in (PATH_COLUMN, *LABEL_COLUMNS) for at in broken):
        return False
    try:
        return len(list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))) == 1
    except csv.Error:
        return False


def _find_column(table: Path, columns: list[str], name: str) -> int:
    if columns.count(name) > 1:
        raise UserError(f"{table} has {columns.count(name)} columns '{name}'; keep one")
    return columns.index(name)


def _find_label_column(table: Path, columns: list[str], rows: list[tuple[int, list[str]]]) -> int | None:
    """The index of the column of classes; None where `path` is the only column with content."""
    present = [name for name in LABEL_COLUMNS if name in columns]
    if len(present) > 1:
        raise UserError(f"{table} has both a column 'label' and a column 'class'; keep the one that names the classes")
    if present:
        return _find_column(table, columns, present[0])
    others = [
        name or "one without a name"
        for at, name in enumerate(columns)
        if name not in (PATH_COLUMN, CAPTION_COLUMN)
        and (name or any(len(row) > at and row[at] for _, row in rows[1:]))
    ]
    if others:
        raise UserError(
            f"{table} has no column 'label' or 'class' beside 'path', only {list_names(others)}: rename the one that "
            "names the classes, or remove them all for a data set without classes"
        )
    return None


def _resolve(folder: Path, text: str) -> Path:
    path = folder / expand_home(text)
    if "\\" in text and not os.path.exists(path):  # written on Windows
        return folder / text.replace("\\", "/")
    return path
