"""Reads the public Azure LLM inference traces, https://github.com/Azure/AzurePublicDataset.

Both releases are CSV files of three columns, ``TIMESTAMP,ContextTokens,GeneratedTokens``, one request a row.
Times of 2023 are as ``2023-11-16 18:15:46.6805900`` (steps of 100 ns, no zone), those of 2024 as
``2024-05-10 00:00:00.009930+00:00``. The traces say how long a text is, not what it says.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

from .requests import MAX_SEGMENT_TOKENS, Request, independent

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
FETCH = "download the file again from https://github.com/Azure/AzurePublicDataset"

_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d+))?(?: ?(Z|UTC|[+-]\d\d(?::?\d\d)?))?", re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TraceError(ValueError):
    """A trace file that cannot be read. The message names file, line, column, what was found and the remedy.

    ``line`` counts from 1, the header; ``column`` is None where the fault is not of one column.
    """

    def __init__(self, path: str | os.PathLike, line: int, column: str | None, found: str, remedy: str):
        self.path, self.line, self.column, self.found, self.remedy = Path(path), line, column, found, remedy
        where = f"{path}, line {line}" + (f", column {column}" if column else "")
        super().__init__(f"{where}: {found}; {remedy}")


def read_azure(
    path: str | os.PathLike, *, limit: int | None = None, window_s: float | None = None
) -> list[Request]:
    """The requests of a trace file by arrival, in seconds after the earliest; equal times keep their order.

    ``limit``: read only so many rows from the top, and nothing after them. ``window_s``: of the rows read,
    keep those that arrive less than so many seconds after the earliest; all are read, since they may stand
    in any order, but only those that may be kept are held. Times without a zone are taken as UTC. Columns
    may stand in any order and there may be others; a byte order mark, CRLF and blank lines are all right. No
    two requests share text. Raises TraceError for what the file holds, OSError if it cannot be opened,
    ValueError for a limit under 1 or a window not above 0.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: read at least 1 row, or leave it out to read all")
    if window_s is not None and not 0 < window_s < math.inf:
        raise ValueError(f"window_s {window_s}: choose seconds above 0, or leave it out to keep all")
    window_ns = math.inf if window_s is None else round(window_s * 1e9)

    kept, first_ns = [], math.inf
    for count, row in enumerate(_rows(path), start=1):
        first_ns = min(first_ns, row[0])
        if row[0] - first_ns < window_ns:
            kept.append(row)
        if count == limit:
            break
    if not kept:
        raise TraceError(path, 1, None, "a header without rows", FETCH)
    kept = [row for row in kept if row[0] - first_ns < window_ns]
    kept.sort(key=lambda row: row[0])
    return independent(
        [(ns - first_ns) / 1e9 for ns, _, _ in kept], [row[1] for row in kept], [row[2] for row in kept]
    )


def _rows(path: str | os.PathLike) -> Iterator[tuple[int, int, int]]:
    """Time in ns since 1970, context and generated tokens of each row, in the file's order."""
    # Bytes that are not UTF-8 are kept as they are, so that the check of their value names line and column.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = _records(path, csv.reader(file))
        line, header = next(records, (1, None))
        if header is None:
            raise TraceError(path, line, None, "an empty file", FETCH)
        header = [name.strip() for name in header]
        places = _places(path, line, header)
        for line, fields in records:
            if len(fields) != len(header):
                column = header[len(fields)] if len(fields) < len(header) else None
                found = f"{len(fields)} values {_quote(','.join(fields))} for {len(header)} columns"
                remedy = f"write one value for each of {','.join(header)}, numbers without separators"
                raise TraceError(path, line, column, found, remedy)
            time, context, generated = (fields[place].strip() for place in places)
            yield (
                _nanoseconds(path, line, time),
                _tokens(path, line, COLUMNS[1], context),
                _tokens(path, line, COLUMNS[2], generated),
            )


def _records(path: str | os.PathLike, reader) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV reader that are not blank, each with the line that it begins on."""
    line = 1
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise TraceError(path, line, None, f"not CSV ({error})", FETCH) from error


def _places(path: str | os.PathLike, line: int, header: list[str]) -> list[int]:
    for column in COLUMNS:
        if header.count(column) != 1:
            found = "no such column" if column not in header else "more than one such column"
            found += f" in the header {_quote(','.join(header))}"
            remedy = f"begin the file with a line of UTF-8 text that names each of {','.join(COLUMNS)} once"
            raise TraceError(path, line, column, found, remedy)
    return [header.index(column) for column in COLUMNS]


def _quote(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")


def _tokens(path: str | os.PathLike, line: int, column: str, text: str) -> int:
    remedy = f"write a whole number from 0 to {MAX_SEGMENT_TOKENS} in digits alone, or take the row out"
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        raise TraceError(path, line, column, f"{_quote(text)} is not a whole number", remedy)
    if text.startswith("-"):
        raise TraceError(path, line, column, f"{_quote(text)} tokens are negative", remedy)
    if len(text) > 20 or int(text) > MAX_SEGMENT_TOKENS:  # int() refuses to read thousands of digits
        raise TraceError(path, line, column, f"{_quote(text)} tokens are too many", remedy)
    return int(text)


def _nanoseconds(path: str | os.PathLike, line: int, text: str) -> int:
    match = _TIME.fullmatch(text)
    try:
        if match is None:
            raise ValueError("of no known form")
        date, time, fraction, zone = match.groups()
        return _epoch_s(date, time, zone) * 10**9 + int((fraction or "0")[:9].ljust(9, "0"))
    except ValueError as error:
        remedy = "write it as 2023-11-16 18:15:46.6805900 or ...46.6805900+00:00, or take the row out"
        raise TraceError(path, line, COLUMNS[0], f"{_quote(text)} is no time: {error}", remedy) from error


@lru_cache(maxsize=256)  # rows of one second stand together
def _epoch_s(date: str, time: str, zone: str | None) -> int:
    offset = "+00:00" if zone in (None, "Z", "UTC") else zone
    return (datetime.fromisoformat(f"{date}T{time}{offset}") - _EPOCH) // timedelta(seconds=1)
