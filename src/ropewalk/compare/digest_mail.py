"""The words of the mails: the digest, and the question whether somebody wants it; as text, and as HTML with everything escaped."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from ropewalk.database import EPOCH

if TYPE_CHECKING:
    from ropewalk.compare.digest import Digest, Item

HEADINGS = {
    "verdict": "New verdicts",
    "shipped": "Shipped",
    "rolled_back": "Taken back",
    "changed": "The suite has changed since",
    "vote": "Waiting for your vote",
}
COUNTED = {
    "verdict": ("new verdict", "new verdicts"),
    "shipped": ("shipped", "shipped"),
    "rolled_back": ("taken back", "taken back"),
    "changed": ("changed suite", "changed suites"),
    "vote": ("waiting for your vote", "waiting for your vote"),
}
LEAD = "Verdicts are measured; votes are opinions."
NO_NEWS = "Nothing is new, and nothing would be sent."  # seen in a preview only
# Tables and styles in place: mail programs know no other way.
BEGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ subject }}</title></head>
<body style="margin:0;padding:24px 12px;font:16px/1.5 system-ui,sans-serif">
<table role="presentation" align="center" width="100%" style="max-width:600px;border-collapse:collapse"><tr><td>
"""
END = """
</td></tr></table></body></html>
"""
BODY = (
    BEGIN
    + """<h1 style="font-size:22px;margin:0 0 4px">What changed, {{ span }}</h1>
<p style="margin:0 0 20px;opacity:.7">{{ lead }}</p>
{% for heading, items in groups %}<h2 style="font-size:17px;margin:20px 0 6px">{{ heading }}</h2>
<ul style="margin:0;padding-left:20px">{% for item in items %}
<li style="margin:0 0 8px">{% if item.href %}<a href="{{ item.href }}">{{ item.title }}</a>\
{% else %}<b>{{ item.title }}</b>{% endif %}<br>{{ item.sentence }}</li>{% endfor %}
</ul>
{% endfor %}<p style="margin:28px 0 0;font-size:13px;opacity:.7">You asked for this once a week. \
<a href="{{ leave_url }}">Unsubscribe</a></p>"""
    + END
)
QUESTION = (
    BEGIN
    + """<h1 style="font-size:22px;margin:0 0 12px">Do you want the weekly digest?</h1>
<p>Somebody, perhaps you, asked for the digest of the workspace <b>{{ workspace }}</b> to come to this address once a week, \
when something has changed.</p>
<p><a href="{{ url }}" style="display:inline-block;padding:10px 18px;border:1px solid;border-radius:6px">Yes, send it</a></p>
<p style="font-size:13px;opacity:.7">The link holds for two days. If you did not ask, do nothing: no other mail will come.</p>"""
    + END
)
_environment = Environment(autoescape=True, undefined=StrictUndefined)


def subject_of(digest: Digest) -> str:
    """How much of what: never a name."""
    counted = [(kind, len(digest.of(kind))) for kind in COUNTED]  # type: ignore[arg-type]
    parts = [f"{count} {COUNTED[kind][count > 1]}" for kind, count in counted if count]
    return f"Ropewalk {digest.week}: {', '.join(parts) or 'nothing new'}"


def text_of(digest: Digest, url: str, leave_url: str) -> str:
    """The digest as plain text."""
    lines = [f"What changed, {span(digest)}", "", *(() if digest.news else (NO_NEWS, ""))]
    for heading, items in _groups(digest, url):
        lines += [heading, ""]
        for item in items:
            lines += [f"* {_line(item['title'])}", f"  {_line(item['sentence'])}"]
            lines += [f"  {item['href']}"] if item["href"] else []
        lines.append("")
    return "\n".join([*lines, "-- ", f"You asked for this once a week. Unsubscribe: {leave_url}", ""])


def html_of(digest: Digest, url: str, leave_url: str) -> str:
    """The digest as a whole page."""
    shown = {"subject": subject_of(digest), "span": span(digest), "groups": _groups(digest, url), "leave_url": leave_url}
    return _environment.from_string(BODY).render(shown, lead=LEAD if digest.news else NO_NEWS)


def confirmation(workspace: str, url: str) -> tuple[str, str, str]:
    """Subject, text and HTML of the question whether an address wants the digest."""
    subject = "Ropewalk: confirm the weekly digest"
    text = (
        f"Somebody, perhaps you, asked for the digest of the workspace {_line(workspace)} to come to this address\n"
        f"once a week, when something has changed.\n\nYes, send it: {url}\n\n"
        "The link holds for two days. If you did not ask, do nothing: no other mail will come.\n"
    )
    return subject, text, _environment.from_string(QUESTION).render(subject=subject, workspace=workspace, url=url)


def span(digest: Digest) -> str:
    """16 to 22 November 2026"""
    first, last = (EPOCH + timedelta(microseconds=at) for at in (digest.since, digest.until - 1))
    begin = f"{first.day}" if first.month == last.month else f"{first.day} {first:%B}"
    begin += f" {first.year}" if first.year != last.year else ""
    return f"{begin} to {last.day} {last:%B %Y}"


def _groups(digest: Digest, url: str) -> list[tuple[str, list[dict[str, Any]]]]:
    groups = [(heading, digest.of(kind)) for kind, heading in HEADINGS.items()]  # type: ignore[arg-type]
    return [(heading, [_shown(item, url) for item in items]) for heading, items in groups if items]


def _shown(item: Item, url: str) -> dict[str, Any]:
    tail = "/vote" if item.kind == "vote" else ""
    return {"title": item.title, "sentence": item.sentence, "href": f"{url}/compare/{item.ref}{tail}" if item.ref else ""}


def _line(text: str) -> str:
    """On one line: a title must not be able to write lines of its own."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
