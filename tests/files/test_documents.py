"""Documents: what the readers make of honest files, and that hostile ones harm nobody."""

import asyncio
import dataclasses
import gc
import importlib.util
import io
import random
from pathlib import Path

import pytest
import time_machine
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from sqlalchemy import func, select

from ropewalk import sandbox
from ropewalk.errors import BadInput, DocumentError, FileExpired, NotFound, SandboxFailed
from ropewalk.files import documents, reading
from ropewalk.files.documents import Document, PageImage, Section, document, page_image, read_document
from ropewalk.files.settings import Settings
from ropewalk.files.tables import derived

_spec = importlib.util.spec_from_file_location("papers", Path(__file__).with_name("papers.py"))
papers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(papers)


@pytest.fixture
def settings(tmp_path):
    """What is tested here does not depend on where the state lies."""
    return Settings(data=tmp_path / "data")


def read(data, media_type=None, filename="file", **limits):
    """As the server does it."""
    limits = {"seconds": 60, "cpu_seconds": 20, **limits}
    made = sandbox.call("ropewalk.files.reading:read_serialised", (media_type, filename), data=data, **limits)
    return Document.from_bytes(made)


def parts(document):
    return [(s.kind, s.title, document.text[s.start : s.end]) for s in document.sections]


HONEST = {
    "pdf": (
        papers.pdf("Hello world\nsecond line", "", "page three"),
        "application/pdf",
        [("page", "", "Hello world\nsecond line"), ("page", "", ""), ("page", "", "page three")],
    ),
    "docx": (
        papers.word(),
        papers.DOCX,
        [
            ("section", "", "Before any heading."),
            ("section", "First", "First\nA tab\there, a break\nthere; naïve ≥ 𝛼.\na\tb\nc\td"),
            ("section", "Second", "Second\nThe end."),
        ],
    ),
    "pptx": (
        papers.slides(),
        papers.PPTX,
        [("slide", "Welcome", "Welcome\nOne point\nAnother\nNotes: Smile."), ("slide", "", "left\tright")],
    ),
    "xlsx": (
        papers.sheets(),
        papers.XLSX,
        [("sheet", "Prices", "item\tprice\nrope\t2.5\n\tTRUE"), ("sheet", "Far", "\t\tfar away")],
    ),
    "html": (
        b"<!doctype html><html><head><title>The page</title><style>p{}</style></head><body><p>Hi <b>you</b>\n all<br>there"
        b"<script>evil()</script><h2>A &amp; B</h2><ul><li>one<li>two</ul><pre>  x\n   y</pre><table><tr><td>1<td>2<tr><td>3",
        "text/html",
        [("section", "The page", "Hi you all\nthere"), ("section", "A & B", "A & B\n\n- one\n- two\n\n  x\n   y\n\n1\t2\n3")],
    ),
    "md": (
        "Intro.\n\n# One #\n\n```\n# not a heading\n```\nTwo\n---\nText é\n#no heading\n### \tThree\n".encode(),
        "text/markdown",
        [
            ("section", "", "Intro.\n\n"),
            ("section", "One", "# One #\n\n```\n# not a heading\n```\n"),
            ("section", "Two", "Two\n---\nText é\n#no heading\n"),
            ("section", "Three", "### \tThree\n"),
        ],
    ),
    "csv": (b"a,b\r\n1,2\r\n", "text/csv", [("section", "", "a,b\r\n1,2\r\n")]),
    "jsonl": (b'{"a": 1}\n{"a": 2}\n', "application/jsonl", [("section", "", '{"a": 1}\n{"a": 2}\n')]),
    "py": (b"def f():\n\treturn 1\n", "text/x-python", [("section", "", "def f():\n\treturn 1\n")]),
    "txt": (b"", "text/plain", [("section", "", "")]),
}


@pytest.mark.parametrize("ending", HONEST)
def test_each_kind_of_file_is_read_in_sections(ending):
    data, media_type, expected = HONEST[ending]
    found = read(data, None, f"file.{ending}")
    assert parts(found) == expected
    assert found.media_type == media_type
    assert [section.number for section in found.sections] == list(range(1, len(expected) + 1))
    assert found == read_document(data, media_type, "")


def test_filled_in_fields_of_a_form_are_text():
    data = papers.form()
    assert read(data).text == "Lease\ntenant: Ada Léger"
    assert render(data).size == (1568, 1568)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_pictures_have_dimensions_and_no_text(kind):
    found = read(papers.picture(kind))
    assert (found.media_type, found.text, found.sections) == (f"image/{kind.lower()}", "", ())
    assert found.images == (PageImage(1, 30, 20),)
    assert read(papers.picture(kind), "image/gif") == found  # as one that was misnamed


def render(data, number=1, media_type=None):
    png = sandbox.call("ropewalk.files.reading:render_page", (media_type, "", number), data=data)
    return Image.open(io.BytesIO(png))


def test_a_page_is_drawn_as_large_as_its_document_says():
    data = papers.pdf("one", "two")
    drawn = render(data, 2)
    promised = read(data).images[1]
    assert drawn.format == "PNG"
    assert drawn.size == (promised.width, promised.height) == (1212, 1568)
    assert drawn.convert("L").getextrema() == (0, 255)  # white paper, black letters
    assert render(papers.animation()).size == (8, 6)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-32-le", b"\xff\xfe\0\0"),
        ("utf-16-le", b""),
        ("utf-16-be", b""),
        ("cp1252", b""),
    ],
)
def test_text_is_the_same_in_every_character_set(encoding, mark):
    text = "Die Straße führt über die Brücke; dort hört man nachts die Frösche, und es ist kühl.\r\nZweite Zeile\n"
    assert read(mark + text.encode(encoding), "text/plain").text == text


def test_a_declared_character_set_is_believed():
    text = "Съешь ещё этих мягких французских булок"
    assert read(text.encode("koi8-r"), "text/plain; charset=koi8-r").text == text
    assert read(b"caf\xe9", "text/html; charset=latin-1").text == "café"
    assert read(b"<meta charset=iso-8859-1>caf\xe9", "text/html").text == "café"


def test_a_character_set_that_is_none_is_not_believed():
    """Python's registry of codecs has decompressors too."""
    assert read(b"plain", "text/plain; charset=zlib").text == "plain"


@given(st.text(st.characters(codec="utf-8"), max_size=300), st.sampled_from(["text/plain", "text/markdown", "text/html"]))
@hypothesis_settings(max_examples=150, deadline=None)
def test_offsets_are_exact_for_any_text(text, media_type):
    found = read_document(text.encode(), f"{media_type}; charset=utf-8", "")
    assert [found.text[s.start : s.end] for s in found.sections] == [part for _, _, part in parts(found)]
    edges = [edge for s in found.sections for edge in (s.start, s.end)]
    assert edges == sorted(edges)
    assert edges[-1] == len(found.text)
    if media_type != "text/html":
        assert found.text == text.removeprefix("\ufeff")
        assert "".join(part for _, _, part in parts(found)) == found.text
    assert Document.from_bytes(found.to_bytes()) == found


SHEET = b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>%s</sheetData></worksheet>'
WHOLE, WORD, SHEETS = papers.pdf("a page"), papers.word(), papers.sheets()
# What makes the file, as what it is declared, and the code of the error; None: it is read, within its bounds.
HOSTILE = {
    "encrypted PDF": (lambda: papers.encrypted_pdf("secret"), None, "document_encrypted"),
    "encrypted PDF that opens": (lambda: papers.encrypted_pdf(""), None, "document_encrypted"),
    "601 pages": (lambda: papers.pdf(*["x"] * 601), None, "too_many_pages"),
    "a million pages": (lambda: papers.pdf("x", count=1_000_000), None, "too_many_pages"),
    "no pages": (papers.pdf, None, "document_damaged"),
    "page tree in a loop": (papers.looped_pages, None, "document_damaged"),
    "not a PDF": (lambda: b"%PDF-1.7 and nothing else", None, "document_damaged"),
    "half a PDF": (lambda: WHOLE[: len(WHOLE) // 2], None, "document_damaged"),
    "empty PDF": (lambda: b"", "application/pdf", "document_damaged"),
    "text as PDF": (lambda: b"plain text", "application/pdf", "document_damaged"),
    "8001 pixels": (lambda: papers.claimed_png(8001, 10), None, "image_dimensions_too_large"),
    "a terapixel": (lambda: papers.claimed_png(1_000_000, 1_000_000), None, "image_dimensions_too_large"),
    "pixels that are not there": (lambda: papers.claimed_png(8000, 8000), None, "document_damaged"),
    "half a picture": (lambda: papers.picture("WEBP")[:40], None, "document_damaged"),
    "half a JPEG": (lambda: papers.picture("JPEG", 300, 300)[:400], None, "document_damaged"),
    "inflates to 257 MiB": (lambda: papers.archive({"word/document.xml": b" " * (257 << 20)}), None, "document_too_large"),
    "inflates to more than it says": (lambda: papers.lying_archive(1 << 20), papers.DOCX, "document_damaged"),
    "10,001 parts": (lambda: papers.archive({f"word/{i}": b"" for i in range(10_001)}), None, "document_too_large"),
    "entities in DOCX": (
        lambda: papers.repacked(WORD, word__document_xml=papers.BILLION_LAUGHS),
        papers.DOCX,
        "document_damaged",
    ),
    "entities in XLSX": (
        lambda: papers.repacked(SHEETS, xl__workbook_xml=papers.BILLION_LAUGHS),
        papers.XLSX,
        "document_damaged",
    ),
    "entities in UTF-16": (
        lambda: papers.repacked(WORD, word__document_xml=papers.BILLION_LAUGHS.decode().encode("utf-16")),
        papers.DOCX,
        "document_damaged",
    ),
    "deep XML": (
        lambda: papers.repacked(WORD, word__document_xml=papers.nested_xml(b"w", 100_000)),
        papers.DOCX,
        "document_damaged",
    ),
    "rows in rows": (
        lambda: papers.repacked(SHEETS, xl__worksheets__sheet1_xml=SHEET % papers.nested_xml(b"row", 50_000)),
        papers.XLSX,
        None,
    ),
    "DOCX as PPTX": (lambda: WORD, papers.PPTX, "document_damaged"),
    "half a DOCX": (lambda: WORD[: len(WORD) // 2], papers.DOCX, "document_damaged"),
    "encrypted DOCX": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000), papers.DOCX, "document_encrypted"),
    "too much text": (lambda: b"x" * 10_000_001, "text/plain", "document_too_large"),
    "too many headings": (lambda: b"# x\n" * 20_001, "text/markdown", "document_too_large"),
    "bytes as text": (lambda: bytes(range(256)) * 4, "text/plain", "document_damaged"),
    "broken UTF-16": (lambda: b"\xff\xfea", "text/plain", "document_damaged"),
    "a film": (lambda: b"\0\0\0\x18ftypmp42" + bytes(50), None, "document_type_unsupported"),
    "an archive": (lambda: papers.archive({"a": b"1"}), None, "document_type_unsupported"),
    "huge page": (lambda: papers.pdf("x", box="0 0 1e9 1e9"), None, None),
    "page without extent": (lambda: papers.pdf("x", box="0 0 0 0"), None, None),
    "table of objects in a loop": (papers.looped_xref, None, None),
    "filters in filters": (lambda: papers.nested_filters(30, 1000), None, None),
    "deep JSON": (lambda: b"[" * 1_000_000, "application/json", None),
    "deep HTML": (lambda: b"<div>" * 100_000, "text/html", None),
    "unclosed tags": (lambda: b"<p " * 200_000, "text/html", None),
    "unclosed comments": (lambda: b"<!--" * 200_000, "text/html", None),
    "spaces": (lambda: b"<pre>" + b" " * 1_000_000 + b"x", "text/html", None),
    "deep quotes": (lambda: b"> " * 500_000, "text/markdown", None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_a_typed_error_or_are_read_in_bounds(name):
    make, media_type, code = HOSTILE[name]
    data = make()
    if code is None:
        found = read(data, media_type, cpu_seconds=10)
        assert len(found.text) <= len(data)
        return
    with pytest.raises(DocumentError) as caught:
        read(data, media_type)
    assert (caught.value.error_code, caught.value.status) == (code, 400)
    assert str(caught.value).startswith(("this ", "byte ", "video/mp4 ", "application/zip "))
    if code == "image_dimensions_too_large":
        assert caught.value.details == {"max_side_length_pixels": 8000}


def test_what_takes_too_much_ends_and_costs_this_process_nothing():
    """400 MiB under two layers of deflate; the library that inflates it aborts when memory runs out."""
    bomb = papers.nested_filters(2, 400 << 20)
    rows = b'<row r="%d"><c r="XFD%d"><v>1</v></c></row>'
    wide = papers.repacked(
        papers.sheets(), xl__worksheets__sheet1_xml=SHEET % b"".join(rows % (i, i) for i in range(1, 20_000))
    )
    gc.collect()
    before = resident()
    with pytest.raises(SandboxFailed) as caught:
        read(bomb, memory_bytes=256 << 20)
    assert caught.value.reason in ("crash", "memory")
    with pytest.raises(BadInput) as caught:
        read(wide, papers.XLSX, cpu_seconds=1)
    assert caught.value.status == 400
    assert resident() - before < 20 << 20


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_drawing_is_bounded_too():
    for data in (papers.pdf("x", box="0 0 1e9 1e9"), papers.pdf("x", box="0 0 1e9 1"), papers.pdf("x", box="0 0 -9 1e38")):
        assert max(render(data).size) == 1568
    assert render(papers.picture("PNG", 4000, 10)).size == (1568, 4)
    for data, number, media_type in ((papers.pdf("x"), 2, None), (papers.pdf("x"), 0, None), (papers.picture("GIF"), 2, None)):
        with pytest.raises(DocumentError, match="there is no"):
            render(data, number, media_type)
    with pytest.raises(DocumentError, match="no pages to draw"):
        render(b"text", 1, "text/plain")


FUZZED = {ending: HONEST[ending] for ending in ("pdf", "docx", "pptx", "xlsx", "html", "md")} | {
    kind: (papers.picture(kind, 60, 60), f"image/{kind.lower()}", None) for kind in ("PNG", "JPEG", "GIF", "WEBP")
}


@given(st.sampled_from(sorted(FUZZED)), st.randoms(use_true_random=False), st.sampled_from(["cut", "flip", "splice", "repeat"]))
@hypothesis_settings(max_examples=60, deadline=None)
def test_damaged_files_give_a_document_or_a_typed_error(kind, chance, how):
    data, media_type, _ = FUZZED[kind]
    found = outcome(damage(bytearray(data), chance, how), media_type)
    if isinstance(found, Document):
        assert all(0 <= s.start <= s.end <= len(found.text) for s in found.sections)
    else:
        assert isinstance(found, DocumentError) or found.reason in ("memory", "crash", "cpu")


def outcome(data, media_type):
    try:
        return read(data, media_type, cpu_seconds=10)
    except (DocumentError, SandboxFailed) as error:
        return error


def damage(data: bytearray, chance: random.Random, how: str) -> bytes:
    first, second = sorted(chance.randrange(len(data)) for _ in range(2))
    if how == "cut":
        del data[second:]
    elif how == "flip":
        for _ in range(chance.randint(1, 30)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "splice":
        del data[first:second]
    else:
        data[second:second] = data[first:second]
    return bytes(data)


def valid():
    return Document("text/plain", "ab\ncd", (Section("section", 1, "t", 0, 2), Section("section", 2, "", 3, 5)), ())


@pytest.mark.parametrize(
    "changed",
    [
        b"",
        b"{}\n",
        b"[" * 5000 + b"\n",
        valid().to_bytes()[:-1],
        valid().to_bytes() + b"x",
        valid().to_bytes() + b"\xff",
        dataclasses.replace(valid(), sections=(Section("section", 1, "", 3, 2),)).to_bytes(),
        dataclasses.replace(valid(), sections=(Section("section", 1, "", 0, 6),)).to_bytes(),
        dataclasses.replace(valid(), sections=(Section("section", 1, "", -1, 2),)).to_bytes(),
        b'{"version": 1}\n',
        b'{"version": 1, "sections": [1], "images": [], "characters": 0, "media_type": ""}\n',
    ],
    ids=range(11),
)
def test_a_document_that_was_tampered_with_is_refused(changed):
    assert Document.from_bytes(valid().to_bytes()) == valid()
    with pytest.raises((ValueError, KeyError, TypeError)):
        Document.from_bytes(changed)


# -- of stored files


@pytest.fixture
def calls(monkeypatch):
    """Every use of the sandbox."""
    made = []
    inner = documents.call_async

    async def counted(function, arguments, **limits):
        made.append((function.partition(":")[2], *arguments))
        return await inner(function, arguments, **limits)

    monkeypatch.setattr(documents, "call_async", counted)
    return made


def test_a_stored_file_is_read_once_however_many_ask(opened, calls):
    async def body(store, caller):
        file = await store.put(caller, papers.pdf("one", "two"), "a.pdf")
        found = await asyncio.gather(*(document(store, caller, file.id) for _ in range(5)))
        assert {one.text for one in found} == {"one\n\ntwo"}
        same = await store.put(caller, papers.pdf("one", "two"), "b.pdf")  # the same bytes under another name
        assert await document(store, caller, same.id) == found[0]
        assert len(calls) == 1

    opened(body)


def test_pages_of_stored_files_are_drawn(opened, calls):
    async def body(store, caller):
        file = await store.put(caller, papers.pdf("one", "two"), "a.pdf")
        first, second = await page_image(store, caller, file.id, 1), await page_image(store, caller, file.id, 2)
        assert first != second
        assert Image.open(io.BytesIO(first)).size == (1212, 1568)
        assert [call[0] for call in calls] == ["read_serialised", "render_page", "render_page"]
        for number in (0, 3, -1, 10**30):
            with pytest.raises(DocumentError, match=r"there is no picture .* of this file; it has 2"):
                await page_image(store, caller, file.id, number)
        text = await store.put(caller, b"text", "a.txt")
        with pytest.raises(DocumentError, match="it has 0"):
            await page_image(store, caller, text.id, 1)
        async with store.database.reading() as connection:
            assert set((await connection.execute(select(derived.c.kind))).scalars()) == {"text"}

    opened(body)


def test_a_verdict_is_kept_too(opened, calls):
    async def body(store, caller):
        file = await store.put(caller, papers.claimed_png(9000, 10), "a.png")
        said = []
        for _ in range(2):
            with pytest.raises(DocumentError) as caught:
                await document(store, caller, file.id)
            said.append((str(caught.value), caught.value.error_code, caught.value.details))
        assert said[0] == said[1]
        assert said[0][1:] == ("image_dimensions_too_large", {"max_side_length_pixels": 8000})
        assert len(calls) == 1

    opened(body)


@pytest.mark.parametrize(("reason", "asked"), [("crash", 1), ("memory", 1), ("cpu", 1), ("time", 2), ("killed", 2)])
def test_only_what_the_file_is_to_blame_for_is_kept(opened, monkeypatch, reason, asked):
    tried = []

    async def failing(function, arguments, **limits):
        tried.append(function)
        raise SandboxFailed(f"reading failed: {reason}", reason)

    async def body(store, caller):
        file = await store.put(caller, b"text", "a.txt")
        for _ in range(2):
            with pytest.raises(SandboxFailed, match=reason) as caught:
                await document(store, caller, file.id)
            assert caught.value.reason == reason
        assert len(tried) == asked

    monkeypatch.setattr(documents, "call_async", failing)
    opened(body)


def test_what_was_kept_by_another_version_is_made_again(opened, calls, monkeypatch):
    async def body(store, caller):
        file = await store.put(caller, b"text", "a.txt")
        await document(store, caller, file.id)
        monkeypatch.setattr(documents, "KEPT", b"\xff")
        assert (await document(store, caller, file.id)).text == "text"
        assert len(calls) == 2

    opened(body)


def test_equal_bytes_of_two_declared_types_are_two_documents(opened):
    async def body(store, caller):
        page = b"<p>one <b>two</b>"
        as_page, as_text = await store.put(caller, page, "a", "text/html"), await store.put(caller, page, "b", "text/plain")
        assert (await document(store, caller, as_page.id)).text == "one two"
        assert (await document(store, caller, as_text.id)).text == page.decode()

    opened(body)


def test_a_deleted_or_expired_file_has_no_document(opened):
    async def body(store, caller):
        file = await store.put(caller, papers.pdf("gone"), "a.pdf")
        await document(store, caller, file.id)
        receipt = await store.delete(caller, file.id)
        assert "text" in receipt.derived
        with pytest.raises(NotFound):
            await document(store, caller, file.id)
        async with store.database.reading() as connection:
            assert (await connection.execute(select(func.count()).select_from(derived))).scalar_one() == 0
        brief = await store.put(caller, b"brief", "b.txt", expires_in=3600)
        await document(store, caller, brief.id)
        with time_machine.travel(brief.expires_at / 1e6 + 1, tick=False), pytest.raises(FileExpired):
            await document(store, caller, brief.id)

    opened(body)


def test_a_file_too_large_to_read_is_not_opened(opened, calls, monkeypatch):
    async def body(store, caller):
        file = await store.put(caller, b"x" * 101, "a.txt")
        with pytest.raises(DocumentError, match="101 bytes are more than the 100"):
            await document(store, caller, file.id)
        assert calls == []

    monkeypatch.setattr(documents, "MAX_BYTES", 100)
    opened(body)


def test_what_the_machine_lacks_is_said(monkeypatch):
    held = sandbox.containment()
    assert held["seccomp"]
    monkeypatch.setattr(documents, "containment", lambda: {**held, "landlock": True})
    assert documents.weakness() is None
    monkeypatch.setattr(documents, "containment", lambda: {**held, "landlock": False})
    assert "a user of its own" in documents.weakness()
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(documents, "containment", sandbox.containment)
    assert "run the server in a container" in documents.weakness()


def test_every_reader_is_there():
    for name in {*reading.READERS.values(), "text"}:
        assert Path(reading.__file__).with_name("readers").joinpath(f"{name}.py").is_file()
