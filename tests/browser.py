"""A real Chromium for tests of pages: one that says what its console says, and where it asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage"
).split()
# What htmx tells the console when a newer request ends an older one, as is asked of it.
OVERTAKEN = ("htmx:sendAbort", "htmx:afterRequest")
PATIENCE = 20_000  # milliseconds; a busy machine is no fault of a page
# Runs before the page's own scripts, and apart from its policy.
TELL_VIOLATIONS = """addEventListener("securitypolicyviolation",
  (event) => console.error("policy: " + event.violatedDirective + " " + event.blockedURI))"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own, empty."""
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One person at one browser window."""

    page: Page
    context: BrowserContext
    origin: str
    complaints: list[str] = field(default_factory=list)  # what the console said, what broke, what was asked of others

    def sign_in(self, key: str) -> Visit:
        self.page.goto(self.origin + "/files")
        self.page.get_by_label("Key").fill(key)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url("**/files")
        return self

    def asked(self, request: Request) -> None:
        if not request.url.startswith(self.origin + "/"):
            self.complaints.append(f"asked {request.url}")


@contextmanager
def visit(browser: Browser, origin: str, *, expected: tuple[str, ...] = (), **settings: Any) -> Iterator[Visit]:
    """A window of its own; fails at its end if anything went wrong in it that was not expected."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 880}, **settings})
    context.set_default_timeout(PATIENCE)
    context.add_init_script(TELL_VIOLATIONS)
    found = Visit(context.new_page(), context, origin)
    found.page.on("console", lambda said: said.type in ("error", "warning") and found.complaints.append(said.text))
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    context.on("request", found.asked)
    try:
        yield found
    finally:
        context.close()
    wrong = [words for words in found.complaints if not any(known in words for known in (*expected, *OVERTAKEN))]
    assert not wrong, wrong


def violations(page: Page) -> list[str]:
    """What axe finds to keep people from using a page."""
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:160]}" for one in found for node in one["nodes"]]


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text for each line of each page."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        lines = [line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in text.split("\n")]
        drawn = "BT /F1 11 Tf 60 780 Td 15 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
        resources = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] {resources} /Contents {len(objects)} 0 R >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\n"
    return body + f"{end}startxref\n{len(body)}\n%%EOF\n".encode()
