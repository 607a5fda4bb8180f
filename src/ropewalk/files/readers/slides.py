"""PPTX: a section for each slide, with its tables and the speaker's notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pptx import Presentation

from ropewalk.errors import DocumentError
from ropewalk.files.readers.draft import Draft
from ropewalk.files.readers.package import checked

MAX_SLIDES = 600
DEEPEST = 20  # groups within groups


def read(data: bytes, draft: Draft) -> None:
    """Shapes in the order that the file has them, which is how they are stacked."""
    slides = Presentation(checked(data)).slides
    if len(slides) > MAX_SLIDES:
        raise DocumentError(
            f"this file has {len(slides):,} slides; at most {MAX_SLIDES} can be read: split it", "too_many_pages"
        )
    for slide in slides:
        title = slide.shapes.title
        draft.section("slide", title.text_frame.text if title is not None and title.has_text_frame else "")
        parts = [text for shape in slide.shapes for text in _texts(shape) if text.strip()]
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            notes = slide.notes_slide.notes_text_frame.text
            parts += [f"Notes: {notes}"] if notes.strip() else []
        draft.write("\n".join(part.replace("\v", "\n") for part in parts))


def _texts(shape: Any, depth: int = 0) -> Iterator[str]:
    if depth > DEEPEST:
        raise RecursionError
    if hasattr(shape, "shapes"):
        for inner in shape.shapes:
            yield from _texts(inner, depth + 1)
    elif shape.has_text_frame:
        yield shape.text_frame.text
    elif getattr(shape, "has_table", False):
        for row in shape.table.rows:
            yield "\t".join(" ".join(cell.text_frame.text.split()) for cell in row.cells)
