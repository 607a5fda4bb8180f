"""The ZIP archive that a DOCX, PPTX or XLSX file is: looked through before a library may open it."""

from __future__ import annotations

import io
import zipfile

from ropewalk.errors import DocumentError

MAX_MEMBERS = 10_000
MAX_INFLATED = 256 << 20
BLOCK = 1 << 18
ENCRYPTED = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # a compound file: an encrypted one, or one of before 2007
MARKUP = (".xml", ".rels", ".vml")
DECLARATION = b"<!DOCTYPE"  # Office files have none; entities that expand into one another begin with it


def checked(data: bytes) -> io.BytesIO:
    """The archive, once every member has been inflated and counted: sizes that an archive claims may be lies."""
    if data.startswith(ENCRYPTED):
        raise DocumentError(
            "this file is encrypted, or of the format before 2007; save it without a password as DOCX, PPTX or XLSX",
            "document_encrypted",
        )
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise DocumentError(f"this file has {len(members):,} parts; at most {MAX_MEMBERS:,} are read", "document_too_large")
    left = MAX_INFLATED
    if sum(member.file_size for member in members) > left:
        raise _too_large()
    for member in members:
        if member.flag_bits & 1:
            raise DocumentError("this file is encrypted; save it without a password", "document_encrypted")
        left = _count(archive, member, left)
    return io.BytesIO(data)


def _count(archive: zipfile.ZipFile, member: zipfile.ZipInfo, left: int) -> int:
    """What is left of the bytes allowed when this member has been read to its end, and its check sum with it."""
    with archive.open(member) as part:
        first = True
        while block := part.read(BLOCK):
            left -= len(block)
            if left < 0:
                raise _too_large()
            if first and member.filename.endswith(MARKUP) and DECLARATION in block.replace(b"\0", b"").upper():
                raise DocumentError(
                    f"this file declares entities in its part '{member.filename[:100]}'; save it anew", "document_damaged"
                )
            first = False
    return left


def _too_large() -> DocumentError:
    return DocumentError(
        f"this file inflates to more than {MAX_INFLATED >> 20} MiB, which is the most that is read", "document_too_large"
    )
