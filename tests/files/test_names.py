"""Names are data: kept as given where they may be, refused where they may not, never a path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.errors import BadInput
from ropewalk.files.media import sniff
from ropewalk.files.names import extension_of, stored_name


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("lease.pdf", "lease.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\files\\a b.txt", "a b.txt"),
        ("отчёт ‮fdp.exe", "отчёт ‮fdp.exe"),
        ("a" * 255, "a" * 255),
        (None, "unnamed.pdf"),
        ("", "unnamed.pdf"),
        ("folder/", "unnamed.pdf"),
    ],
)
def test_the_last_component_is_kept(given_name, kept):
    assert stored_name(given_name, ".pdf") == kept


@pytest.mark.parametrize("name", ["a" * 256, "a<b", "a>b", "a:b", 'a"b', "a|b", "a?b", "a*b", "a\x00b", "a\r\nb", "\ud800"])
def test_a_name_that_cannot_be_kept_is_refused(name):
    with pytest.raises(BadInput, match="filename"):
        stored_name(name, "")


@given(st.text(st.characters(), max_size=300))
def test_whatever_is_given_a_kept_name_is_short_and_no_path(name):
    try:
        kept = stored_name(name, ".bin")
    except BadInput:
        return
    assert 1 <= len(kept) <= 255
    assert not set(kept) & set('<>:"|?*\\/')
    kept.encode()


@pytest.mark.parametrize(
    ("head", "name", "declared", "media"),
    [
        (b"%PDF-1.7", None, None, "application/pdf"),
        (b"%PDF-1.7", "x.txt", "text/plain", "text/plain"),  # what is declared counts
        (b"%PDF-1.7", "x.txt", "application/octet-stream", "application/pdf"),  # which declares nothing
        (b"\x89PNG\r\n\x1a\n..", None, None, "image/png"),
        (b"RIFF....WEBPVP8 ", None, None, "image/webp"),
        (b'{"a": 1}\n', "rows.jsonl", None, "application/jsonl"),
        ("grüße".encode(), None, None, "text/plain"),
        (b"x" * 65535 + "ü".encode()[:1], None, None, "text/plain"),  # a character cut off
        (b"\x00\x01\x02", None, None, "application/octet-stream"),
        (b"", None, None, "application/octet-stream"),
        (b"abc", None, "not a media type", "text/plain"),
    ],
)
def test_the_media_type_is_the_declared_one_or_what_the_bytes_say(head, name, declared, media):
    assert sniff(head, name, declared) == media


def test_extensions_are_the_usual_ones():
    assert [extension_of(m) for m in ("text/plain", "application/pdf", "image/jpeg", "x/y")] == [".txt", ".pdf", ".jpg", ".bin"]
