"""XLSX: a section for each sheet, a line for each row that is not empty, tabs between its cells."""

from __future__ import annotations

import warnings
from datetime import date, datetime, time
from typing import Any

import openpyxl

from ropewalk.files.readers.draft import Draft
from ropewalk.files.readers.package import checked


def read(data: bytes, draft: Draft) -> None:
    """Values as they were last computed; a formula that never was is empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about drawings and extensions, which have no text
        book = openpyxl.load_workbook(checked(data), read_only=True, data_only=True, keep_links=False)
        for sheet in book.worksheets:
            draft.section("sheet", sheet.title)
            sheet.reset_dimensions()  # what a file says of its extent may be a million empty rows
            lines = 0
            for row in sheet.iter_rows(values_only=True):
                line = "\t".join(_cell(value) for value in row).rstrip("\t")
                if line:
                    draft.write(("\n" if lines else "") + line)
                    lines += 1
        book.close()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat(" ", "seconds")
    if isinstance(value, date | time):
        return value.isoformat()
    return " ".join(str(value).split())
