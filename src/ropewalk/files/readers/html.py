"""HTML: what a reader of the page would see as text, with a section from each heading to the next."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lxml import etree

from ropewalk.files.readers.draft import Draft
from ropewalk.files.readers.text import decode

UNSEEN = {"script", "style", "template", "noscript", "svg", "math", "iframe", "object", "select", "head"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCKS = HEADINGS | {
    *(
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
    ),
    *(
        "figure",
        "footer",
        "form",
        "header",
        "hr",
        "li",
        "main",
        "nav",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tr",
        "ul",
    ),
}
PARAGRAPHS = HEADINGS | {"p", "blockquote", "pre", "table", "ul", "ol", "dl", "figure"}
CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([A-Za-z0-9_-]+)", re.IGNORECASE)


def read(data: bytes, draft: Draft) -> None:
    """Text without scripts and styles; white space as a browser shows it."""
    declared = CHARSET.search(data[:4096])
    media_type = draft.media_type
    if declared and "charset" not in media_type:
        media_type += f"; charset={declared.group(1).decode()}"
    page = _Page()
    # The parser of the C library takes linear time over whatever it is given, which Python's own does not.
    parser = etree.HTMLParser(target=page, huge_tree=True)
    parser.feed(decode(data, media_type) or " ")
    parser.close()
    sections = [(title, text) for title, text in page.sections if text]
    for number, (title, text) in enumerate(sections or [("", "")]):
        draft.section("section", title or (page.title if number == 0 else ""))
        draft.write(text)


class _Page:
    """Collects the text; keeps no tree, so that no depth of nesting can hurt."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, str]] = []
        self.title = ""
        self._heading = ""
        self._words: list[str] = []
        self._unseen: list[str] = []  # open elements whose text is not shown
        self._naming: list[str] | None = None  # words of the heading that is open
        self._in_title = False
        self._pre = 0
        self._breaks = 0  # line ends due before the next word
        self._spaced = True  # whether a space here would be one too many

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "title" and not self.title and "svg" not in self._unseen:
            self._in_title = True
            return
        if tag in ("body", "p", "div", "main", *HEADINGS):  # a head that nobody closed
            self._unseen = [name for name in self._unseen if name != "head"]
        if tag in UNSEEN:
            self._unseen.append(tag)
        if self._unseen:
            return
        if tag in HEADINGS:
            self._end_section()
            self._naming = []
        self._block(tag)
        if tag == "pre":
            self._pre += 1
        elif tag == "li":
            self._say("- ")
            self._spaced = True
        elif tag in ("td", "th") and self._words and not self._breaks:
            self._say("\t")
            self._spaced = True
        elif tag == "br":
            self._breaks = max(self._breaks, 1)
            self._spaced = True

    def end(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
            return
        if tag in self._unseen:
            while self._unseen.pop() != tag:
                pass
            return
        if self._unseen:
            return
        if tag in HEADINGS and self._naming is not None:
            self._heading, self._naming = "".join(self._naming), None
        if tag == "pre":
            self._pre = max(0, self._pre - 1)
        self._block(tag)

    def data(self, data: str) -> None:
        if self._in_title:
            self.title += data
            return
        if self._unseen:
            return
        if self._naming is not None:
            self._naming.append(data)
        if self._pre:
            self._say(data)
            self._spaced = data[-1:].isspace()
            return
        words = re.sub(r"[ \t\n\r\f]+", " ", data)
        if self._spaced or self._breaks:
            words = words.lstrip(" ")
        if words:
            self._say(words)
            self._spaced = words.endswith(" ")

    def close(self) -> None:
        self._end_section()

    def _block(self, tag: str) -> None:
        if tag in BLOCKS:
            self._breaks = max(self._breaks, 2 if tag in PARAGRAPHS else 1)
            self._spaced = True

    def _say(self, words: str) -> None:
        if self._breaks and self._words:
            self._words.append("\n" * self._breaks)
        self._breaks = 0
        self._words.append(words)

    def _end_section(self) -> None:
        text = re.sub(r"(?<! ) +\n", "\n", "".join(self._words)).strip()
        self.sections.append((self._heading, text))
        self._heading, self._words, self._breaks, self._spaced = "", [], 0, True
