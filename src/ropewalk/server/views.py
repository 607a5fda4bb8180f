"""What each page shows: one dataclass per page, and how sizes, times, names and kinds are put into words."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

from ropewalk.database import now
from ropewalk.files.catalog import File
from ropewalk.files.documents import Document, Section
from ropewalk.files.receipts import Receipt
from ropewalk.tenants.quotas import Usage

LINKS = (("/files", "Files"),)
KEEP = (
    (None, "until deleted"),
    (3600, "1 hour"),
    (86400, "1 day"),
    (604_800, "7 days"),
    (2_592_000, "30 days"),
    (7_776_000, "90 days"),
)
PREVIEW = 30_000  # characters of text on one page
BYTES_PER_TOKEN = 4  # of English text, with the tokenizers of current models; other languages and code have more tokens
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
FATES = {
    "erased": "Its content is erased: no other file held the same bytes, and the key that could open them is destroyed.",
    "shared": "The id is gone. Other files of this workspace hold the same bytes; these stay until the last of them is deleted.",
    "expired": "The id is gone. The content had been erased before, when the file expired.",
}


@dataclass(frozen=True)
class Link:
    """A page of the menu."""

    href: str
    label: str
    here: bool


@dataclass(frozen=True)
class Choice:
    """A workspace that may be switched to."""

    id: str
    name: str


@dataclass(frozen=True)
class Who:
    """Whose page it is."""

    key: str
    workspace_id: str
    workspace: str
    workspaces: tuple[Choice, ...]


@dataclass(frozen=True)
class Frame:
    """What surrounds every page."""

    title: str
    token: str
    who: Who | None
    path: str

    @property
    def links(self) -> list[Link]:
        return [Link(href, label, self.path.startswith(href)) for href, label in LINKS]


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


@dataclass(frozen=True)
class Quota:
    """What a workspace uses of what it may."""

    used: str
    limit: str | None
    share: float | None  # percent
    files: str


@dataclass(frozen=True)
class Row:
    """One file of the list."""

    id: str
    name: tuple[Part, ...]
    badge: str
    kind: str
    size: str
    tokens: str | None
    created: Moment
    expires: Moment | None
    expired: bool


@dataclass(frozen=True)
class Stored:
    """A file that was just uploaded."""

    id: str
    name: tuple[Part, ...]


@dataclass(frozen=True)
class Keep:
    """How long a file may be kept."""

    seconds: int | str
    label: str


@dataclass(frozen=True)
class FilesPage:
    """/files"""

    rows: list[Row]
    quota: Quota
    name: str
    here: str
    newer: str | None
    older: str | None
    uploaded: list[Stored]
    may_write: bool
    max_bytes: int
    max_size: str
    keep: tuple[Keep, ...] = tuple(Keep(seconds or "", label) for seconds, label in KEEP)


@dataclass(frozen=True)
class Sheet:
    """A page, slide, sheet or section of the text, or the part of it that is on this page."""

    heading: str | None
    text: str


@dataclass(frozen=True)
class Preview:
    """Part of a file's text, or the sentence that says why there is none."""

    sheets: tuple[Sheet, ...] = ()
    extent: str = ""
    earlier: str | None = None
    later: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class FilePage:
    """/files/{id}"""

    id: str
    name: tuple[Part, ...]
    kind: str
    mime_type: str
    size: str
    size_exact: str
    sha256: str
    tags: tuple[str, ...]
    tokens: str | None
    created: Moment
    expires: Moment | None
    expired: bool
    may_download: bool
    may_write: bool
    preview: Preview
    preview_at: str | None  # where the text can be had, when it is yet to be read


@dataclass(frozen=True)
class DeletePage:
    """/files/{id}/delete"""

    id: str
    name: tuple[Part, ...]
    size: str
    created: Moment


@dataclass(frozen=True)
class Fact:
    """One line of a receipt."""

    label: str
    value: str
    code: bool = False


@dataclass(frozen=True)
class ReceiptPage:
    """/files/{id}/receipt"""

    sequence: int
    fate: str
    facts: tuple[Fact, ...]
    json: str
    download: str


@dataclass(frozen=True)
class LoginPage:
    """/login"""

    next: str
    hours: int
    problem: str | None = None


@dataclass(frozen=True)
class ErrorPage:
    """What could not be done, and why."""

    heading: str
    message: str


_templates = Environment(
    loader=PackageLoader("ropewalk.server"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(template: str, frame: Frame, page: object) -> str:
    """A page as HTML."""
    return _templates.get_template(template).render(frame=frame, page=page)


def row(file: File, tokens: int | None) -> Row:
    """A file as a line of the list."""
    badge, kind = kind_of(file.mime_type)
    expires = None if file.expires_at is None else moment(file.expires_at)
    return Row(
        file.id,
        parts(file.filename),
        badge,
        kind,
        size(file.size),
        estimate(tokens),
        moment(file.created_at),
        expires,
        file.expired,
    )


def file_page(
    file: File, tokens: int | None, preview: Preview, preview_at: str | None, *, may_download: bool, may_write: bool
) -> FilePage:
    """A file as a page of its own."""
    return FilePage(
        id=file.id,
        name=parts(file.filename),
        kind=kind_of(file.mime_type)[1],
        mime_type=file.mime_type,
        size=size(file.size),
        size_exact=f"{file.size:,} bytes",
        sha256=file.sha256,
        tags=file.tags,
        tokens=estimate(tokens),
        created=moment(file.created_at),
        expires=None if file.expires_at is None else moment(file.expires_at),
        expired=file.expired,
        may_download=may_download,
        may_write=may_write,
        preview=preview,
        preview_at=preview_at,
    )


def preview(document: Document, path: str, start: int) -> Preview:
    """The part of a document's text that begins at `start`, divided where the document is."""
    start = min(max(0, start), len(document.text))
    end = min(start + PREVIEW, len(document.text))
    sheets = tuple(
        Sheet(_heading(section, start), document.text[max(section.start, start) : min(section.end, end)].strip("\n"))
        for section in document.sections
        if (section.start < end and section.end > start) or (section.start == section.end and start <= section.start <= end)
    )
    problem = None
    if not document.text.strip():
        problem = "This file holds no text." + (" Its images are read by the model itself." if document.images else "")
    return Preview(
        sheets=() if problem else sheets,
        extent=_extent(document),
        earlier=f"{path}?{urlencode({'from': max(0, start - PREVIEW)})}#preview" if start else None,
        later=f"{path}?{urlencode({'from': end})}#preview" if end < len(document.text) else None,
        problem=problem,
    )


def receipt_page(receipt: Receipt, download: str) -> ReceiptPage:
    """A receipt in words and as it was signed."""
    facts = [
        Fact("Deleted", receipt.deleted_at),
        Fact("Created", receipt.created_at),
        Fact("Size", f"{receipt.size_bytes:,} bytes"),
        Fact("SHA-256 of the content", receipt.sha256, True),
        Fact("SHA-256 of the file’s id", receipt.file_id_sha256, True),
        Fact("Erased with it", ", ".join(receipt.derived) or "nothing had been made from it"),
        Fact("Signed with the key", receipt.key_id, True),
    ]
    if receipt.adapters:
        facts.append(Fact("Adapters trained on it, which cannot forget it", ", ".join(receipt.adapters)))
    text = json.dumps(receipt.as_dict(), indent=2)
    return ReceiptPage(receipt.sequence, FATES[receipt.content], tuple(facts), text, download)


def quota(usage: Usage) -> Quota:
    """Usage in words; what is set aside for uploads under way counts as used."""
    used, files = usage.used_bytes + usage.reserved_bytes, usage.used_files + usage.reserved_files
    shares = [100 * have / limit for have, limit in ((used, usage.limit_bytes), (files, usage.limit_files)) if limit]
    counted = f"{files:,} file{'' if files == 1 else 's'}" + (
        f" of {usage.limit_files:,}" if usage.limit_files is not None else ""
    )
    limit = None if usage.limit_bytes is None else size(usage.limit_bytes)
    return Quota(size(used), limit, min(100.0, max(shares)) if shares else None, counted)


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
    if known := KINDS.get(mime_type):
        return known
    kind, _, sub = mime_type.partition("/")
    sub = sub.removeprefix("x-").removeprefix("vnd.")
    if kind == "text":
        return sub[:6].upper(), f"Code ({sub})" if sub.isalpha() else mime_type
    return (sub[:6].upper() if sub.isalnum() else "FILE"), mime_type


def size(count: int) -> str:
    """Bytes in the unit that fits, as disks are sold: 1 MB is 1,000,000 bytes."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.1f} {unit}"


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


def tokens_in(count: int) -> int:
    """About how many tokens so many bytes of text are."""
    return -(-count // BYTES_PER_TOKEN)


def _distance(seconds: float, at: datetime) -> str:
    away = abs(seconds)
    if away >= 30 * 86400 and seconds < 0:
        return f"{at.day} {at:%b %Y}"
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if away >= length:
            count = int(away // length)
            words = f"{count} {unit}{'' if count == 1 else 's'}"
            return f"in {words}" if seconds > 0 else f"{words} ago"
    return "in less than a minute" if seconds > 0 else "just now"


def _heading(section: Section, start: int) -> str | None:
    label = f"{section.kind.capitalize()} {section.number}" if section.kind != "section" else ""
    words = ": ".join(word for word in (label, section.title or "") if word)
    return (words + (", continued" if section.start < start else "")) or None


def _extent(document: Document) -> str:
    kinds: Iterable[str] = {section.kind for section in document.sections}
    if set(kinds) == {"section"} or not document.sections:
        return f"{len(document.text):,} characters"
    return ", ".join(f"{n:,} {kind}{'' if n == 1 else 's'}" for kind, n in _counted(document.sections)) + (
        f" · {len(document.text):,} characters"
    )


def _counted(sections: Sequence[Section]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for section in sections:
        counts[section.kind] = counts.get(section.kind, 0) + 1
    return list(counts.items())
