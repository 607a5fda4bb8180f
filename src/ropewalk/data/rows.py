"""Rows, each with the place it stands at. A source is cut into chunks, small enough to hand to a worker process.

Chunks are always cut in the same places, so that interrupted work goes on where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ropewalk.data.sources import DataFile, Found, HubSet, Kind, load_hub_set
from ropewalk.errors import DataError, MissingExtra

CHUNK_BYTES, CHUNK_ROWS = 1 << 18, 512


@dataclass(frozen=True)
class Row:
    """One row and where it stands: the line of its file, or its number (Parquet, the hub), counted from 1."""

    values: dict[str, Any]
    path: str
    line: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, read as far as is cheap: JSON lines stay bytes until a worker parses them."""

    path: str
    first: int
    lines: bytes | None
    values: tuple[tuple[int, Any], ...] = ()

    def __iter__(self) -> Iterator[tuple[int, bytes | Any]]:
        """Each row's place and what stands there."""
        if self.lines is None:
            yield from self.values
            return
        for number, line in enumerate(self.lines.split(b"\n"), self.first):
            if line.strip():
                yield number, line

    def read(self, line: int, raw: bytes | Any) -> Row:
        """One row; what is no JSON object is an error that names its place."""
        values = _parse(raw, self.path, line) if isinstance(raw, bytes) else raw
        if not isinstance(values, dict):
            kind = {list: "a list", str: "a text", type(None): "null"}.get(type(values), "a number")
            raise DataError(f"a row must be an object with named values, and this is {kind}", path=self.path, line=line)
        return Row(values, self.path, line)


def chunks(found: Found) -> Iterator[Chunk]:
    """A source's rows in order."""
    if isinstance(found, HubSet):
        yield from _grouped(found.path, enumerate(load_hub_set(found), 1))
        return
    for file in found:
        yield from _READERS[file.kind](file)


def streamed_chunks(found: Found) -> Iterator[Chunk]:
    """The same without downloading a data set of the hub first."""
    if isinstance(found, HubSet):
        return _grouped(found.path, enumerate(load_hub_set(found, streaming=True), 1))
    return chunks(found)


def _read_lines(file: DataFile) -> Iterator[Chunk]:
    line, rest = 1, b""
    with file.open() as handle:
        while block := handle.read(CHUNK_BYTES):
            whole, newline, rest_after = (rest + block).rpartition(b"\n")
            if newline:
                yield Chunk(file.name, line, whole)
                line += whole.count(b"\n") + 1
            rest = rest_after
    if rest.strip():
        yield Chunk(file.name, line, rest)


def _read_json(file: DataFile) -> Iterator[Chunk]:
    """A file with one JSON array, or with objects one after another, on lines or across them."""
    with file.open() as handle:
        head = handle.readline()
    try:
        if isinstance(json.loads(head), dict):
            yield from _read_lines(file)
            return
    except ValueError:
        pass  # the first line is not a row by itself: read the file as a whole
    with file.open() as handle:
        text = _decode(handle.read(), file.name, 1)
    yield from _grouped(file.name, _values_of(text, file.name))


def _values_of(text: str, path: str) -> Iterator[tuple[int, Any]]:
    decoder, line, seen = json.JSONDecoder(), 1, 0
    at = _past(text, 0)
    inside = text.startswith("[", at)
    at = _past(text, at + inside)
    while at < len(text) and not (inside and text[at] == "]"):
        line += text.count("\n", seen, at)
        seen = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"malformed JSON: {error.msg} at column {error.colno}", path=path, line=error.lineno) from error
        yield line, value
        at = _past(text, at)
    if inside and at >= len(text):
        raise DataError("malformed JSON: the list that begins the file is not closed", path=path, line=line)


def _past(text: str, at: int) -> int:
    """The next place that is neither blank nor a comma between values."""
    found = _BETWEEN.match(text, at)
    return found.end() if found else at


_BETWEEN = re.compile(r"[\s,]*")


def _read_csv(file: DataFile) -> Iterator[Chunk]:
    with file.open() as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter="\t" if ".tsv" in file.name else ",")
        try:
            header = next(reader)
            yield from _grouped(file.name, _csv_rows(reader, header, file.name))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"malformed CSV: {error}", path=file.name, line=reader.line_num + 1) from error


def _csv_rows(reader: Any, header: list[str], path: str) -> Iterator[tuple[int, Any]]:
    line = reader.line_num + 1
    for cells in reader:
        if cells and len(cells) != len(header):
            message = f"this row has {len(cells)} columns, its header {len(header)} ({', '.join(header)})"
            raise DataError(message, path=path, line=line)
        if cells:
            yield line, dict(zip(header, cells))
        line = reader.line_num + 1


def _read_text(file: DataFile) -> Iterator[Chunk]:
    with file.open() as handle:
        yield from _grouped(
            file.name,
            (
                (line, {"text": _decode(raw, file.name, line).rstrip("\r\n")})
                for line, raw in enumerate(handle, 1)
                if raw.strip()
            ),
        )


def _read_parquet(file: DataFile) -> Iterator[Chunk]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", f"reading {file.name}") from error
    with file.open() as handle:
        try:
            table = parquet.ParquetFile(handle)
        except Exception as error:  # pyarrow's errors have no common class of their own
            raise DataError(f"is no Parquet file: {error}", path=file.name) from error
        yield from _grouped(file.name, _table_rows(table.iter_batches(CHUNK_ROWS)))


def _read_arrow(file: DataFile) -> Iterator[Chunk]:
    try:
        import pyarrow.ipc as ipc
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", f"reading {file.name}") from error
    with file.open() as handle:
        of_file = handle.read(6) == b"ARROW1"
        handle.seek(0)
        reader = ipc.open_file(handle) if of_file else ipc.open_stream(handle)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if of_file else reader
        yield from _grouped(file.name, _table_rows(batches))


def _table_rows(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    number = 1
    for batch in batches:
        for values in batch.to_pylist():
            yield number, values
            number += 1


def _grouped(path: str, values: Iterable[tuple[int, Any]]) -> Iterator[Chunk]:
    values = iter(values)
    while group := tuple(islice(values, CHUNK_ROWS)):
        yield Chunk(path, group[0][0], None, group)


def _parse(raw: bytes, path: str, line: int) -> Any:
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON: {error.msg} at column {error.colno}", path=path, line=line) from error
    except UnicodeDecodeError as error:
        raise DataError(f"malformed text: byte {error.start + 1} is not UTF-8", path=path, line=line) from error


def _decode(raw: bytes, path: str, line: int) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = line + raw.count(b"\n", 0, error.start)
        raise DataError(f"malformed text: byte {error.start + 1} is not UTF-8", path=path, line=at) from error


_READERS: dict[Kind, Callable[[DataFile], Iterator[Chunk]]] = {
    "jsonl": _read_lines,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}
