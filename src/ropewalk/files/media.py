"""What bytes are: their media type, by what they begin with, then by their name."""

from __future__ import annotations

import codecs
import mimetypes
import re

UNKNOWN = "application/octet-stream"
HEAD = 1 << 16  # bytes that are enough to tell
DECLARED = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]*/[a-z0-9][a-z0-9!#$&^_.+-]*( *;.*)?", re.IGNORECASE)
LONGEST = 255
SIGNATURES: dict[bytes, str] = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"PAR1": "application/vnd.apache.parquet",
    b"\x1f\x8b": "application/gzip",
}
OFFICE = "application/vnd.openxmlformats-officedocument."
# A folder that only one kind of Office file has; in the names that stand before each member of the archive.
OFFICE_FOLDERS = {
    b"word/": OFFICE + "wordprocessingml.document",
    b"ppt/": OFFICE + "presentationml.presentation",
    b"xl/": OFFICE + "spreadsheetml.sheet",
}
# Names that tell more than the bytes do, where the system's table says nothing or something else.
BY_ENDING = {
    ".jsonl": "application/jsonl",
    ".ndjson": "application/jsonl",
    ".md": "text/markdown",
    ".csv": "text/csv",
    ".yml": "application/yaml",
    ".yaml": "application/yaml",
    ".toml": "application/toml",
    ".ts": "application/typescript",
    ".rs": "text/x-rust",
    ".go": "text/x-go",
    ".parquet": "application/vnd.apache.parquet",
    ".docx": OFFICE + "wordprocessingml.document",
    ".pptx": OFFICE + "presentationml.presentation",
    ".xlsx": OFFICE + "spreadsheetml.sheet",
}
ARCHIVES = {*OFFICE_FOLDERS.values(), "application/zip", "application/epub+zip", "application/java-archive"}
# Types that are known by their first bytes, so a name alone does not make a file one of them.
BY_CONTENT = {*SIGNATURES.values(), "application/pdf", "image/webp", *ARCHIVES}
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
HTML = re.compile(rb"\s*<(!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE)
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def sniff(head: bytes, filename: str | None, declared: str | None) -> str:
    """The declared media type, if it says anything; else what the first bytes and the name tell."""
    if declared and len(declared) <= LONGEST and DECLARED.fullmatch(declared) and declared.lower() != UNKNOWN:
        return declared.lower()
    return _by_signature(head, filename) or _by_name(head, filename) or (_other(head) if head else UNKNOWN)


def _by_signature(head: bytes, filename: str | None) -> str | None:
    for signature, media in SIGNATURES.items():
        if head.startswith(signature):
            return media
    if b"%PDF-" in head[:1024]:  # readers of PDF allow it that late
        return "application/pdf"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    return _archive(head, filename) if head.startswith(b"PK\x03\x04") else None


def _archive(head: bytes, filename: str | None) -> str:
    """A ZIP archive by its first members; those that begin like an Office file but do not show which go by their name."""
    for start in (match.start() for match in re.finditer(rb"PK\x03\x04", head)):
        length = int.from_bytes(head[start + 26 : start + 28], "little")
        member = head[start + 30 : start + 30 + length]
        for folder, media in OFFICE_FOLDERS.items():
            if member.startswith(folder):
                return media
        if member == b"mimetype":  # as EPUB and OpenDocument have it: stored, not deflated
            declared = re.match(rb"[a-z0-9!#$&^_.+/-]+", head[start + 30 + length :])
            if declared and DECLARED.fullmatch(named := declared.group().removesuffix(b"PK").decode()):
                return named
    ending = _ending(filename)
    return ending if ending in ARCHIVES else "application/zip"


def _by_name(head: bytes, filename: str | None) -> str | None:
    """What the name's ending says, unless the bytes would have said so too."""
    named = _ending(filename)
    if named is None or (head and named in BY_CONTENT):
        return None
    return named


def _ending(filename: str | None) -> str | None:
    ending = re.search(r"\.[A-Za-z0-9]{1,10}$", filename or "")
    if ending is None:
        return None
    return BY_ENDING.get(ending.group().lower()) or mimetypes.guess_type("x" + ending.group())[0]


def _other(head: bytes) -> str:
    if _is_text(head):
        return "text/html" if HTML.match(head) else "text/plain"
    from puremagic import PureError, magic_string

    try:
        found = [match.mime_type for match in magic_string(head[:4096]) if match.mime_type]
    except (PureError, ValueError):
        return UNKNOWN
    return next((media for media in found if DECLARED.fullmatch(media) and media not in BY_CONTENT), UNKNOWN)


def _is_text(head: bytes) -> bool:
    if head.startswith(BYTE_ORDER_MARKS):
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return CONTROL.search(head) is None
