"""DOCX: paragraphs and tables in their order, with a section from each heading to the next."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import docx
from docx.oxml.ns import qn

from ropewalk.files.readers.draft import Draft
from ropewalk.files.readers.package import checked

PARAGRAPH, TABLE, ROW, CELL = qn("w:p"), qn("w:tbl"), qn("w:tr"), qn("w:tc")
CONTAINERS = {qn("w:sdt"), qn("w:sdtContent"), qn("w:smartTag"), qn("w:customXml"), qn("w:ins"), qn("w:moveTo")}
TEXT, TAB = qn("w:t"), qn("w:tab")
BREAKS = {qn("w:br"), qn("w:cr")}
# A text box stands twice in a file, the second time for old programs; a tab stop is not a tab.
SKIPPED = {"{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback", qn("w:pPr"), qn("w:del"), qn("w:moveFrom")}
HEADING = re.compile(r"(heading \d|title)", re.IGNORECASE)


def read(data: bytes, draft: Draft) -> None:
    """The body; headers, footers, notes and comments are left out."""
    document = docx.Document(checked(data))
    headings = {style.style_id for style in document.styles if style.name is not None and HEADING.fullmatch(style.name)}
    draft.section("section")
    begun = False
    for block in _blocks(document.element.body):
        if block.tag == TABLE:
            text = "\n".join("\t".join(cells) for cells in _rows(block))
        else:
            text = _text(block)
            style = block.find(f"{qn('w:pPr')}/{qn('w:pStyle')}")
            if text.strip() and style is not None and style.get(qn("w:val")) in headings:
                if begun:
                    draft.section("section", text)
                else:  # nothing stood before the first heading
                    draft.name(text)
                draft.write(text)
                begun = True
                continue
        if text.strip():
            draft.write(("\n" if begun else "") + text)
            begun = True


def _blocks(parent: Any) -> Iterator[Any]:
    """Paragraphs and tables, also those inside content controls and tracked insertions."""
    for child in parent:
        if child.tag in (PARAGRAPH, TABLE):
            yield child
        elif child.tag in CONTAINERS:
            yield from _blocks(child)


def _rows(table: Any) -> Iterator[list[str]]:
    for row in table.iter(ROW):
        if next(row.iterancestors(TABLE)) is table:
            cells = [cell for cell in row.iter(CELL) if next(cell.iterancestors(TABLE)) is table]
            yield [" ".join(" ".join(_text(paragraph).split()) for paragraph in cell.iter(PARAGRAPH)).strip() for cell in cells]


def _text(paragraph: Any) -> str:
    skipped: set[Any] = set()
    words = []
    for element in paragraph.iter():
        if element.tag in SKIPPED or element.getparent() in skipped:
            skipped.add(element)
        elif element.tag == TEXT:
            words.append(element.text or "")
        elif element.tag == TAB:
            words.append("\t")
        elif element.tag in BREAKS or (element.tag == PARAGRAPH and words):
            words.append("\n")
    return "".join(words)
