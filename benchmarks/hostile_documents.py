"""Documents that mean harm, as a hypothesis strategy: bombs, loops and lies from the tests' workshop, and honest ones damaged on the way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Document = tuple[str, bytes]  # name, content


def _workshop() -> Any:
    path = Path(__file__).resolve().parents[1] / "tests" / "files" / "papers.py"
    spec = importlib.util.spec_from_file_location("papers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


papers = _workshop()

HONEST: list[Callable[[], Document]] = [
    lambda: ("a.pdf", papers.pdf("one page", "and another")),
    lambda: ("a.docx", papers.word()),
    lambda: ("a.pptx", papers.slides()),
    lambda: ("a.xlsx", papers.sheets()),
    lambda: ("a.png", papers.picture("PNG")),
    lambda: ("a.jpg", papers.picture("JPEG")),
    lambda: ("a.gif", papers.animation()),
    lambda: ("a.html", b"<!doctype html><title>t</title><p>one<p>two<table><tr><td>x" * 40),
    lambda: ("a.md", b"# one\n\n* two\n\n```\nthree\n```\n" * 40),
    lambda: ("a.csv", b"a,b\n1,2\n" * 200),
    lambda: ("a.json", b'{"a": [1, 2, {"b": null}]}'),
    lambda: ("a.txt", "Grüße 你好".encode("utf-16")),
]
HARMFUL: list[Callable[[], Document]] = [
    lambda: ("pages.pdf", papers.pdf("x", count=1_000_000)),
    lambda: ("xref.pdf", papers.looped_xref()),
    lambda: ("tree.pdf", papers.looped_pages()),
    lambda: ("filters.pdf", papers.nested_filters(5, 30_000_000)),
    lambda: ("secret.pdf", papers.encrypted_pdf("user")),
    lambda: ("box.pdf", papers.pdf("x", box="0 0 1e9 1e9")),
    lambda: ("large.png", papers.claimed_png(60_000, 60_000)),
    lambda: ("larger.png", papers.claimed_png(2**31 - 1, 2**31 - 1)),
    lambda: ("lie.docx", papers.lying_archive(300_000_000)),
    lambda: ("laughs.docx", papers.repacked(papers.word(), word__document_xml=papers.BILLION_LAUGHS)),
    lambda: ("nested.docx", papers.repacked(papers.word(), word__document_xml=papers.nested_xml(b"p", 200_000))),
    lambda: ("laughs.xlsx", papers.repacked(papers.sheets(), xl__workbook_xml=papers.BILLION_LAUGHS)),
    lambda: ("deep.json", b"[" * 2_000_000),
    lambda: ("deep.html", b"<div>" * 300_000),
    lambda: ("wide.csv", b"," * 3_000_000),
    lambda: ("long.md", b"[" * 200_000 + b"](" * 1000),
    lambda: ("nul.txt", b"\x00" * 1_000_000),
]


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """One that means harm as it is, or one with pieces changed, cut out, doubled, or under another's name."""
    if draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from(HARMFUL))()
    name, content = draw(st.sampled_from(HONEST))()
    for _ in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 4, 50, 5000])))
        piece = draw(st.one_of(st.binary(max_size=8), st.just(content[start:end] * 30), st.just(b"\xff" * 8), st.just(b"")))
        content = content[:start] + piece + content[end:]
    if draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(HONEST))()[0]
    return name, content
