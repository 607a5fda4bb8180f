"""PDF: a section and a picture for each page."""

from __future__ import annotations

import ctypes
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pypdfium2
import pypdfium2.raw as raw

from ropewalk.errors import DocumentError
from ropewalk.files.readers.draft import Draft
from ropewalk.files.readers.picture import LONGEST_SIDE

MAX_PAGES = 600


def read(data: bytes, draft: Draft) -> None:
    """The text layer of each page, as it is, then the fields of its form that are filled in; a scanned page has none."""
    with _open(data) as pdf:
        for number in range(len(pdf)):
            draft.section("page")
            page = pdf[number]
            draft.image(*_size(page))
            text = page.get_textpage()
            draft.write("\n".join((_clean(text.get_text_range()), *_fields(pdf, page))))
            text.close()
            page.close()


def render(data: bytes, number: int) -> bytes:
    """A page as PNG, filled-in forms and all."""
    with _open(data) as pdf:
        if not 1 <= number <= len(pdf):
            raise DocumentError(f"there is no page {number}; this file has {len(pdf)}", "document_no_such_page")
        page = pdf[number - 1]
        width, height = _size(page)
        longest = max(page.get_width(), page.get_height())
        scale = LONGEST_SIDE / longest if math.isfinite(longest) and longest > 0 else 1.0
        if max(width, height) / min(width, height) >= LONGEST_SIDE:  # too thin a strip to show anything
            raise DocumentError(f"page {number} is too long and thin to be drawn", "document_damaged")
        output = io.BytesIO()
        page.render(scale=scale, may_draw_forms=True).to_pil().save(output, "PNG")
        return output.getvalue()


@contextmanager
def _open(data: bytes) -> Iterator[pypdfium2.PdfDocument]:
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if error.err_code == raw.FPDF_ERR_PASSWORD or error.err_code == raw.FPDF_ERR_SECURITY:
            raise _encrypted() from error
        raise
    try:
        if raw.FPDF_GetSecurityHandlerRevision(pdf) != -1:  # also one that opens with an empty password
            raise _encrypted()
        if len(pdf) > MAX_PAGES:
            raise DocumentError(f"this PDF has {len(pdf):,} pages; at most {MAX_PAGES} can be read: split it", "too_many_pages")
        if pdf.get_formtype() != raw.FORMTYPE_NONE:
            pdf.init_forms()
        yield pdf
    finally:
        pdf.close()


def _encrypted() -> DocumentError:
    return DocumentError(
        "this PDF is encrypted; remove its password and restrictions, and upload it again", "document_encrypted"
    )


def _size(page: pypdfium2.PdfPage) -> tuple[int, int]:
    """In pixels, as drawn: whatever the page claims, its longer side is LONGEST_SIDE."""
    width, height = (side if math.isfinite(side) and side > 0 else 1.0 for side in page.get_size())
    scale = LONGEST_SIDE / max(width, height)
    return max(1, math.ceil(width * scale)), max(1, math.ceil(height * scale))


def _clean(text: str) -> str:
    """One kind of line end; a word that was hyphenated at a line's end whole again; no marks of the library's own."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\ufffe\n", "").replace("\x02\n", "").replace("\ufffe", "").replace("\uffff", "").replace("\0", "")


def _fields(pdf: pypdfium2.PdfDocument, page: pypdfium2.PdfPage) -> Iterator[str]:
    """Name and value of each field that holds something; a box that is not ticked holds nothing."""
    for index in range(raw.FPDFPage_GetAnnotCount(page) if pdf.formenv else 0):
        annotation = raw.FPDFPage_GetAnnot(page, index)
        if raw.FPDFAnnot_GetSubtype(annotation) == raw.FPDF_ANNOT_WIDGET:
            name, value = (
                _clean(_wide(get, pdf.formenv, annotation))
                for get in (raw.FPDFAnnot_GetFormFieldName, raw.FPDFAnnot_GetFormFieldValue)
            )
            if value.strip() and value != "Off":
                yield f"{name}: {value}"
        raw.FPDFPage_CloseAnnot(annotation)


def _wide(get: Callable[..., int], form: Any, annotation: Any) -> str:
    """What a function of the library writes as UTF-16 with a zero at the end, once it has said how long it is."""
    length = get(form, annotation, None, 0)
    buffer = ctypes.create_string_buffer(length)
    get(form, annotation, ctypes.cast(buffer, ctypes.POINTER(raw.FPDF_WCHAR)), length)
    return buffer.raw.decode("utf-16-le", errors="replace").rstrip("\0")
