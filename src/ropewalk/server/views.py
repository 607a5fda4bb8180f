"""What each page shows: one dataclass per page."""

from __future__ import annotations

import json
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from ropewalk.files.catalog import File
from ropewalk.files.receipts import Receipt
from ropewalk.server.previews import Preview
from ropewalk.server.words import Moment, Part, estimate, exactly, kind_of, moment, parts, size
from ropewalk.tenants.quotas import Usage

LINKS = (
    ("/", "Home"),
    ("/files", "Files"),
    ("/chat", "Chat"),
    ("/jobs", "Jobs"),
    ("/models", "Models"),
    ("/compare", "Compare"),
    ("/usage", "Usage"),
)
BELOW = {"/candidates": "/compare", "/method": "/compare", "/digest": "/", "/rollback": "/"}  # pages under another’s link
KEEP = (
    (None, "until deleted"),
    (3600, "1 hour"),
    (86400, "1 day"),
    (604_800, "7 days"),
    (2_592_000, "30 days"),
    (7_776_000, "90 days"),
)
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
        first = "/" + self.path.split("/")[1]
        return [Link(href, label, BELOW.get(first, first) == href) for href, label in LINKS]


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
    asked: str  # what questions about it saved; '' before the first


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
    here: dict[str, str]  # the query that this part of the list answers
    unread: list[str]  # files whose texts are still to be read, when scripts are on
    unread_at: str
    newer: str | None
    older: str | None
    uploaded: list[Stored]
    may_write: bool
    max_bytes: int
    max_size: str
    keep: tuple[Keep, ...] = tuple(Keep(seconds or "", label) for seconds, label in KEEP)


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
    base: str  # this server's address, as the browser has it
    asked: str  # what questions about it saved; '' before the first
    read: str  # tokens that were read for them, and kept


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


def row(file: File, tokens: int | None, asked: str = "") -> Row:
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
        asked,
    )


def file_page(
    file: File,
    tokens: int | None,
    preview: Preview,
    preview_at: str | None,
    *,
    base: str,
    may_download: bool,
    may_write: bool,
    asked: str = "",
    read: str = "",
) -> FilePage:
    """A file as a page of its own."""
    return FilePage(
        id=file.id,
        name=parts(file.filename),
        kind=kind_of(file.mime_type)[1],
        mime_type=file.mime_type,
        size=size(file.size),
        size_exact=exactly(file.size),
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
        base=base,
        asked=asked,
        read=read,
    )


def receipt_page(receipt: Receipt, download: str) -> ReceiptPage:
    """A receipt in words and as it was signed."""
    facts = [
        Fact("Deleted", receipt.deleted_at),
        Fact("Created", receipt.created_at),
        Fact("Size", exactly(receipt.size_bytes)),
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
