"""A CSV file as columns, and the columns in it that say where spans begin."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from circuitkit.errors import FormatError, TaskError
from circuitkit.tasks.spans import LENGTH

Columns = dict[str, list[str]]


def read_columns(path: str | Path) -> Columns:
    """The columns of a CSV file (UTF-8) by the names in its header. Raises FormatError for anything else."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header, *body = list(reader) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"cannot read {path} as a CSV file in UTF-8: {error}") from error
    for row, cells in enumerate(body):
        if len(cells) != len(header):
            raise FormatError(f"{path}, row {row}: got {len(cells)} cells, expected the header's {len(header)}")
    return {column: [cells[i] for cells in body] for i, column in enumerate(header)}


def column(columns: Columns, name: str, path: str | Path) -> list[str]:
    """One column. Raises TaskError if there is none of that name, with the nearest one that there is."""
    if name in columns:
        return columns[name]
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise TaskError(f"{path} has no column {name!r}{hint} Its columns: {', '.join(columns) or 'none'}")


def schema_columns(columns: Columns, others: Columns, spans: Sequence[str], path: str | Path) -> Columns:
    """Where spans begin, and the lengths if the file has them.

    Args:
        columns: of the file with the clean texts.
        others: of the file with the corrupt texts, which must not say otherwise.

    Raises:
        TaskError: if a column is missing, or the files differ; names the row.
    """
    schema = {name: column(columns, name, path) for name in spans}
    if LENGTH in columns:
        schema[LENGTH] = columns[LENGTH]
    for name, cells in schema.items():
        for row, (mine, other) in enumerate(zip(cells, others.get(name, cells), strict=False)):
            if mine != other:
                raise TaskError(
                    f"row {row}: {name!r} is {mine} in the clean file and {other} in the corrupt one; pairs need the "
                    "same spans"
                )
    return schema
