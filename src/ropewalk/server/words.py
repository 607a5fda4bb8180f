"""Names, sizes, times and kinds, as people read them."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime

from ropewalk.database import now

# What joins letters in Persian and emoji is no disguise.
SHOWN_AS_THEY_ARE = {"\u200c", "\u200d"}
KINDS = {
    "application/pdf": ("PDF", "PDF"),
    "application/json": ("JSON", "JSON"),
    "application/jsonl": ("JSONL", "JSON lines"),
    "application/x-ndjson": ("JSONL", "JSON lines"),
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ("DOCX", "Word document"),
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": ("PPTX", "Presentation"),
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": ("XLSX", "Spreadsheet"),
    "application/zip": ("ZIP", "ZIP archive"),
    "application/octet-stream": ("BIN", "Binary"),
    "text/plain": ("TXT", "Plain text"),
    "text/markdown": ("MD", "Markdown"),
    "text/html": ("HTML", "HTML"),
    "text/csv": ("CSV", "CSV table"),
    "image/png": ("PNG", "Image"),
    "image/jpeg": ("JPEG", "Image"),
    "image/gif": ("GIF", "Image"),
    "image/webp": ("WEBP", "Image"),
}
CODE = {"python": "PY", "javascript": "JS", "typescript": "TS", "ruby": "RB", "rust": "RS", "msdos-program": "EXE"}


@dataclass(frozen=True)
class Part:
    """A stretch of a name; `unseen` where it stands for a character that has no shape."""

    text: str
    unseen: bool


@dataclass(frozen=True)
class Moment:
    """A time, exactly and in words."""

    exact: str
    words: str


def parts(name: str) -> tuple[Part, ...]:
    """A name in which nothing hides: what turns the direction of text or has no shape is spelt out."""
    found: list[Part] = []
    for character in name:
        unseen = (
            unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in SHOWN_AS_THEY_ARE
        )
        if unseen:
            found.append(Part(f"U+{ord(character):04X}", True))
        elif found and not found[-1].unseen:
            found[-1] = Part(found[-1].text + character, False)
        else:
            found.append(Part(character, False))
    return tuple(found)


def kind_of(mime_type: str) -> tuple[str, str]:
    """A media type as a badge and in words."""
    if known := KINDS.get(mime_type.partition(";")[0]):
        return known
    kind, _, full = mime_type.partition(";")[0].partition("/")
    sub = full.removeprefix("x-").removeprefix("vnd.")
    badge = CODE.get(sub) or (sub.upper() if sub.isalnum() and len(sub) <= 5 else "CODE" if kind == "text" else "FILE")
    return badge, f"{sub.capitalize()} source" if kind == "text" and sub.isalpha() else mime_type


def size(count: int) -> str:
    """Bytes in the unit that fits, as disks are sold: 1 MB is 1,000,000 bytes."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """12 s, 5 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def exactly(count: int) -> str:
    """Every byte of them."""
    return f"{count:,} byte{'' if count == 1 else 's'}"


def sentence(message: str) -> str:
    """An error's message, as a sentence of its own."""
    return message[:1].upper() + message[1:] + ("" if message.endswith((".", "?", "!")) else ".")


def moment(microseconds: int) -> Moment:
    """A time of the database."""
    at = datetime.fromtimestamp(microseconds // 1_000_000, UTC)
    return Moment(f"{at:%Y-%m-%d %H:%M} UTC", _distance((microseconds - now()) / 1e6, at))


def estimate(tokens: int | None) -> str | None:
    """About how many tokens: two figures that mean something."""
    if tokens is None:
        return None
    if tokens < 1000:
        return f"~{tokens}"
    return (
        f"~{tokens / 1000:.1f} k"
        if tokens < 99_950
        else f"~{tokens / 1000:.0f} k"
        if tokens < 999_500
        else f"~{tokens / 1e6:.1f} M"
    )


def _distance(seconds: float, at: datetime) -> str:
    away = abs(seconds)
    if away >= 30 * 86400 and seconds < 0:
        return f"{at.day} {at:%b %Y}"
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if away >= length - 30:  # what was set to expire in 7 days is not shown as 6
            count = max(1, round(away / length))
            words = f"{count} {unit}{'' if count == 1 else 's'}"
            return f"in {words}" if seconds > 0 else f"{words} ago"
    return "in less than a minute" if seconds > 0 else "just now"
