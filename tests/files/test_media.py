"""Media types: what is declared, what the first bytes say, what the name adds."""

import gzip
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.files.media import DECLARED, sniff

_spec = importlib.util.spec_from_file_location("papers", Path(__file__).with_name("papers.py"))
papers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(papers)


@pytest.mark.parametrize(
    ("head", "filename", "media_type"),
    [
        (papers.pdf("x"), None, "application/pdf"),
        (b"\n\n" + papers.pdf("x"), "x.txt", "application/pdf"),
        (papers.picture("PNG"), "photo.jpg", "image/png"),
        (papers.picture("JPEG"), None, "image/jpeg"),
        (papers.picture("GIF"), None, "image/gif"),
        (papers.picture("WEBP"), None, "image/webp"),
        (papers.word(), None, papers.DOCX),
        (papers.slides(), "unnamed", papers.PPTX),
        (papers.sheets(), "a.zip", papers.XLSX),
        (papers.archive({"[Content_Types].xml": b"<x/>"}), "a.docx", papers.DOCX),
        (papers.archive({"a.txt": b"x"}), "a.zip", "application/zip"),
        (papers.archive({"a.txt": b"x"}), "a.pdf", "application/zip"),
        (b"a,b\n1,2\n", "a.csv", "text/csv"),
        (b"# A\n", "a.md", "text/markdown"),
        (b'{"a": 1}\n', "a.jsonl", "application/jsonl"),
        (b'{"a": 1}\n', "a.JSON", "application/json"),
        (b"def f(): ...\n", "a.py", "text/x-python"),
        (b"plain words", None, "text/plain"),
        (b"plain words", "a.pdf", "text/plain"),
        (b"plain words", "a.png", "text/plain"),
        ("é".encode() * 100_000, None, "text/plain"),
        ("é".encode() * 100, None, "text/plain"),
        (("é" * 100).encode()[:-1], None, "text/plain"),
        ("wide".encode("utf-16"), None, "text/plain"),
        (b" \n<!DOCTYPE html><p>x", None, "text/html"),
        (b"<html lang=en>", None, "text/html"),
        (b"<htmlish>", None, "text/plain"),
        (gzip.compress(b"x"), "a.txt", "application/gzip"),
        (b"\0\0\0\x18ftypmp42" + bytes(50), None, "video/mp4"),
        (b"\x9d\x13\xfe\x07" * 20, None, "application/octet-stream"),
        (b"\x9d\x13\xfe\x07" * 20, "a.pdf", "application/octet-stream"),
        (b"", None, "application/octet-stream"),
        (b"", "a.txt", "text/plain"),
    ],
    ids=lambda value: "head" if isinstance(value, bytes) else None,  # some hold the time: not the same in two processes
)
def test_the_type_is_detected(head, filename, media_type):
    assert sniff(head, filename, None) == media_type
    assert sniff(head, filename, "application/octet-stream") == media_type


def test_a_declared_type_is_kept():
    assert sniff(b"a,b", "a.csv", "text/plain") == "text/plain"
    assert sniff(b"x", None, "Text/Plain; charset=UTF-8") == "text/plain; charset=utf-8"


@pytest.mark.parametrize("declared", ["", "nonsense", "a/b\r\nx: y", "text/" + "x" * 300, "Application/Octet-Stream", "é/é"])
def test_a_declared_type_that_says_nothing_is_not(declared):
    assert sniff(b"plain", None, declared) == "text/plain"


@given(st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"%PDF-", b"RIFF", b"<!--", b"\xff\xfe"]), st.text())
def test_any_bytes_have_a_type(head, start, filename):
    assert DECLARED.fullmatch(sniff(start + head, filename, None))
