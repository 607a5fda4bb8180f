"""Small documents, made from nothing; honest ones, and some that mean harm."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib

import docx
import openpyxl
import pptx
from PIL import Image

OFFICE = "application/vnd.openxmlformats-officedocument."
DOCX = OFFICE + "wordprocessingml.document"
PPTX = OFFICE + "presentationml.presentation"
XLSX = OFFICE + "spreadsheetml.sheet"


def pdf(*pages: str, box: str = "0 0 612 792", extra: dict[int, bytes] | None = None, count: int | None = None) -> bytes:
    """A PDF with a line of Helvetica on each page for each line of its text; objects 1 and 2 are the catalog and the page tree."""
    objects = {1: b"<< /Type /Catalog /Pages 2 0 R >>", 3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"}
    kids = []
    for index, text in enumerate(pages):
        number = 4 + 2 * index
        kids.append(f"{number} 0 R")
        lines = " ".join(f"({line}) Tj 0 -20 Td" for line in text.split("\n"))
        objects[number] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents {number + 1} 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
        ).encode()
        objects[number + 1] = stream(f"BT /F1 12 Tf 72 700 Td {lines} ET".encode())
    objects[2] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(pages) if count is None else count} >>".encode()
    return written({**objects, **(extra or {})})


def stream(data: bytes, entries: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(data), entries, data)


def written(objects: dict[int, bytes], trailer: bytes = b"") -> bytes:
    """The objects with a table of where they stand."""
    out, places = bytearray(b"%PDF-1.7\n"), {}
    for number, body in sorted(objects.items()):
        places[number] = len(out)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start, size = len(out), max(objects) + 1
    out += b"xref\n0 %d\n0000000000 65535 f \n" % size
    for number in range(1, size):
        out += b"%010d 00000 n \n" % places[number] if number in places else b"0000000000 00000 f \n"
    return bytes(out + b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, start))


def form() -> bytes:
    """A page with words, a filled-in field, an empty one, and a box that is not ticked."""
    widget = b"<< /Type /Annot /Subtype /Widget /Rect [0 0 90 20] /P 4 0 R %s >>"
    objects = {
        1: b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [6 0 R 7 0 R 8 0 R] /DA (/F1 12 Tf) >> >>",
        4: b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Contents 5 0 R /Annots [6 0 R 7 0 R 8 0 R]"
        b" /Resources << /Font << /F1 3 0 R >> >> >>",
        6: widget % b"/FT /Tx /T (tenant) /V (Ada L\\351ger)",
        7: widget % b"/FT /Tx /T (street)",
        8: widget % b"/FT /Btn /T (pets) /V /Off /AS /Off",
    }
    return pdf("Lease", extra=objects)


def encrypted_pdf(password: str) -> bytes:
    """Under the oldest of the standard's methods (revision 2, RC4 of 40 bits); with '' anybody can open it."""
    padding = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    owner, permissions, id = bytes(32), -4, bytes(16)
    padded = (password.encode() + padding)[:32]
    key = hashlib.md5(padded + owner + struct.pack("<i", permissions) + id).digest()[:5]
    user = rc4(key, padding)
    encrypt = f"<< /Filter /Standard /V 1 /R 2 /O <{owner.hex()}> /U <{user.hex()}> /P {permissions} >>"
    trailer = f"/Encrypt {encrypt} /ID [<{id.hex()}> <{id.hex()}>]".encode()
    return pdf("secret").replace(b"/Root 1 0 R", b"/Root 1 0 R " + trailer)


def rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def nested_filters(depth: int, size: int) -> bytes:
    """A page whose content is `size` bytes under `depth` layers of deflate."""
    data = b" " * size
    for _ in range(depth):
        data = zlib.compress(data, 9)
    entries = b"/Filter [" + b"/FlateDecode " * depth + b"]"
    return pdf("x", extra={5: stream(data, entries)})


def looped_xref() -> bytes:
    """A table of objects that names itself as the one before it."""
    made = pdf("a page")
    start = made.rindex(b"xref\n0", 0, made.index(b"startxref"))
    return made.replace(b"/Root 1 0 R", b"/Root 1 0 R /Prev %d" % start)


def looped_pages() -> bytes:
    """A page tree that is its own child."""
    return written({1: b"<< /Type /Catalog /Pages 2 0 R >>", 2: b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 4 >>"})


def word() -> bytes:
    document = docx.Document()
    document.add_paragraph("Before any heading.")
    document.add_heading("First", 1)
    document.add_paragraph("A tab\there, a break\nthere; naïve ≥ 𝛼.")
    table = document.add_table(2, 2)
    for row, cells in zip(table.rows, (("a", "b"), ("c", "d")), strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    document.add_heading("Second", 2)
    document.add_paragraph("The end.")
    return saved(document)


def slides() -> bytes:
    presentation = pptx.Presentation()
    first = presentation.slides.add_slide(presentation.slide_layouts[1])
    first.shapes.title.text = "Welcome"
    first.placeholders[1].text = "One point\nAnother"
    first.notes_slide.notes_text_frame.text = "Smile."
    second = presentation.slides.add_slide(presentation.slide_layouts[6])
    table = second.shapes.add_table(1, 2, 0, 0, 9, 9).table
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    return saved(presentation)


def sheets() -> bytes:
    book = openpyxl.Workbook()
    book.active.title = "Prices"
    for row in (["item", "price"], ["rope", 2.5], [], [None, True]):
        book.active.append(row)
    book.create_sheet("Far").cell(row=1_000_000, column=3, value="far away")
    return saved(book)


def saved(made) -> bytes:
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


def picture(kind: str, width: int = 30, height: int = 20, **how) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, kind, **how)
    return out.getvalue()


def animation() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("P", (8, 6), color) for color in (1, 2, 3)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def claimed_png(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def repacked(office: bytes, **changed: bytes) -> bytes:
    """An Office file with parts replaced or added; two underscores stand for a slash, one before the ending for a dot."""
    return archive(
        {**parts(office), **{name.replace("__", "/").replace("_xml", ".xml"): data for name, data in changed.items()}}
    )


def parts(office: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(office)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in members.items():
            opened.writestr(name, data)
    return out.getvalue()


def lying_archive(size: int) -> bytes:
    """An Office file with a part that inflates to `size` bytes and claims to be one byte long."""
    made = bytearray(archive({"word/document.xml": b" " * size}))
    true = struct.pack("<I", size)
    for place in (22, made.index(b"PK\x01\x02") + 24):
        assert made[place : place + 4] == true
        made[place : place + 4] = struct.pack("<I", 1)
    return bytes(made)


BILLION_LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(9))
    + b"]><a>&j;</a>"
)


def nested_xml(name: bytes, depth: int) -> bytes:
    return b"<%s>" % name * depth + b"</%s>" % name * depth
