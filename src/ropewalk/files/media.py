"""What bytes are: their media type, by what they begin with, then by their name."""

from __future__ import annotations

import mimetypes
import re

UNKNOWN = "application/octet-stream"
DECLARED = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]*/[a-z0-9][a-z0-9!#$&^_.+-]*( *;.*)?", re.IGNORECASE)
LONGEST = 255
SIGNATURES: dict[bytes, str] = {
    b"%PDF-": "application/pdf",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"PAR1": "application/vnd.apache.parquet",
    b"\x1f\x8b": "application/gzip",
}
# Names that tell more than the bytes do, where the system's table says nothing or something else.
BY_ENDING = {
    ".jsonl": "application/jsonl",
    ".ndjson": "application/jsonl",
    ".md": "text/markdown",
    ".csv": "text/csv",
    ".yml": "application/yaml",
    ".yaml": "application/yaml",
    ".parquet": "application/vnd.apache.parquet",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ".xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}


def sniff(head: bytes, filename: str | None, declared: str | None) -> str:
    """The declared media type, if it says anything; else what the first bytes and the name tell."""
    if declared and len(declared) <= LONGEST and DECLARED.fullmatch(declared) and declared.lower() != UNKNOWN:
        return declared.lower()
    for signature, media in SIGNATURES.items():
        if head.startswith(signature):
            return media
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    ending = re.search(r"\.[A-Za-z0-9]{1,10}$", filename or "")
    if ending:
        known = BY_ENDING.get(ending.group().lower()) or mimetypes.guess_type("x" + ending.group())[0]
        if known:
            return known
    return "text/plain" if head and _is_text(head) else UNKNOWN


def _is_text(head: bytes) -> bool:
    try:
        # The last character may be cut off.
        text = head.decode("utf-8", errors="ignore" if len(head) > 3 else "strict")
        head[:-3].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text)
