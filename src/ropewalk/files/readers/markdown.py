"""Markdown: the text as it stands, with a section from each heading to the next."""

from __future__ import annotations

import re

from ropewalk.files.readers.draft import Draft
from ropewalk.files.readers.text import decode

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")


def read(data: bytes, draft: Draft) -> None:
    """Sections join to the whole text without anything between them."""
    text = decode(data, draft.media_type)
    starts = list(_headings(text))
    if not starts or text[: starts[0][0]].strip():
        starts.insert(0, (0, ""))
    else:
        starts[0] = (0, starts[0][1])
    for (start, title), end in zip(starts, [*(start for start, _ in starts[1:]), len(text)], strict=True):
        draft.section("section", title, separator="")
        draft.write(text[start:end])


def _headings(text: str) -> list[tuple[int, str]]:
    """(offset, title) of each heading outside of fenced code."""
    found: list[tuple[int, str]] = []
    fence, place, above = "", 0, ""
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        mark = FENCE.match(bare)
        if fence:
            if mark and mark.group(1).startswith(fence) and not bare[mark.end() :].strip():
                fence = ""
        elif mark:
            fence = mark.group(1)
        elif (title := _title(bare)) is not None:
            found.append((place, title))
        elif above.strip() and UNDERLINE.fullmatch(bare) and not above.lstrip().startswith(("-", "*", ">", "|", "#")):
            found.append((place - len(above), above.strip()))
        above = line if not fence and not mark and bare.strip() and _title(bare) is None else ""
        place += len(line)
    return found


def _title(line: str) -> str | None:
    """The words of a `## heading ##`; None for any other line."""
    marked = line.lstrip(" ")
    words = marked.lstrip("#")
    if len(line) - len(marked) > 3 or not 1 <= len(marked) - len(words) <= 6 or words[:1] not in ("", " ", "\t"):
        return None
    words = words.strip(" \t")
    bare = words.rstrip("#")
    return bare.rstrip(" \t") if not bare or bare[-1] in " \t" else words
