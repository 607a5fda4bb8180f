"""The pages in a real Chromium, over a real server: what a person does there, and that nothing but this server is asked."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the package playwright is not installed: pip install playwright")

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from PIL import Image
from playwright.sync_api import Page, expect
from sqlalchemy import select, update

from browser import CHROMIUM, pdf, violations, visit
from ropewalk.files.receipts import verify
from ropewalk.files.tables import files
from ropewalk.server import pages
from ropewalk.server.sessions import SECURE
from ropewalk.server.settings import ServerSettings
from ropewalk.tenants.keys import authenticate, create_key, revoke_key

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or name one in $CHROMIUM")

LEASE = pdf(*(f"Lease agreement, page {n}\nThe tenant keeps the premises in good repair." for n in (1, 2, 3)))
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder: pictures for the docs are made anew


def chosen(name: str, content: bytes, kind: str = "text/plain") -> dict[str, object]:
    return {"name": name, "mimeType": kind, "buffer": content}


def revoke(server, secret: str) -> None:
    """What `ropewalk keys revoke` does."""

    async def ended() -> None:
        async with server.store.database.reading() as connection:
            key = await authenticate(connection, server.store.pepper, secret)
        await revoke_key(server.store.database, key.id)

    server.run(ended())


def choose(page: Page, *some: dict[str, object]) -> None:
    """Uploads by the file chooser, and waits until all are stored."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose files").click()
    before = page.locator("#uploads li").count()
    chooser.value.set_files(list(some))
    expect(page.locator("#uploads .done")).to_have_count(before + len(some))


def test_sign_in_and_out(server, browser):
    _, key = server.workspace("pages sign in")
    with visit(browser, server.url, expected=("401 (Unauthorized)",)) as seen:
        page = seen.page
        page.goto(server.url + "/files?name=x")
        assert page.url.startswith(server.url + "/login?next=")
        page.get_by_label("Key").fill("rw-key-wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("opens nothing")
        page.get_by_label("Key").fill(key)
        page.keyboard.press("Enter")
        page.wait_for_url("**/files?name=x")
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/login")
        page.goto(server.url + "/files")
        assert page.url.startswith(server.url + "/login")


def test_files_are_chosen_shown_read_and_deleted_with_a_receipt(server, browser):
    workspace, key = server.workspace("pages whole", limit_bytes=1_000_000)
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        expect(page.locator("#found")).to_contain_text("No files yet")
        choose(page, chosen("lease.pdf", LEASE, "application/pdf"), chosen("notes.txt", b"word " * 4000))
        row = page.get_by_role("row", name=re.compile("lease.pdf"))
        expect(row).to_contain_text("PDF")
        expect(row).to_contain_text("just now")
        # "word " is 5 bytes, 20,000 in all: 5,000 tokens at four bytes each, counted without being opened.
        expect(page.get_by_role("row", name=re.compile("notes.txt"))).to_contain_text("~5.0 k")
        expect(page.locator("#quota")).to_contain_text(f"{(20_000 + len(LEASE)) / 1000:.1f} kB of 1.0 MB")
        expect(page.locator("#quota")).to_contain_text("2 files")
        expect(page.get_by_role("meter")).to_have_attribute("aria-valuenow", "2")

        row.get_by_role("link").click()
        expect(page.locator(".sheet h3")).to_have_text(["Page 1", "Page 2", "Page 3"])
        expect(page.locator(".sheet").nth(1)).to_contain_text("Lease agreement, page 2\nThe tenant keeps")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert Path(download.value.path()).read_bytes() == LEASE
        assert download.value.suggested_filename == "lease.pdf"
        page.get_by_role("link", name="Show as a picture").first.click()
        expect(page.locator("img")).to_have_js_property("naturalHeight", 1568)
        page.go_back()

        file_id = page.url.rpartition("/")[2]
        page.get_by_role("link", name="Delete…").click()
        page.get_by_role("button", name="Delete for good").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("The file is deleted")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download the receipt").click()
        receipt = verify(json.loads(Path(download.value.path()).read_text()), server.store.signing_key.public_key())
        assert receipt.is_of(file_id)
        assert (receipt.workspace_id, receipt.content, receipt.size_bytes) == (workspace.id, "erased", len(LEASE))
        page.get_by_role("link", name="To the files").click()
        expect(page.locator("#quota")).to_contain_text("1 file")
        expect(page.get_by_role("row", name=re.compile("lease.pdf"))).to_have_count(0)


def test_a_dropped_file_is_uploaded_with_its_time_to_live(server, browser):
    _, key = server.workspace("pages drop")
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        page.get_by_label("Keep").select_option("7 days")
        held = page.evaluate_handle(
            "() => { const held = new DataTransfer(); held.items.add(new File(['dropped'], 'dropped.txt')); return held; }"
        )
        page.dispatch_event("main", "dragover", {"dataTransfer": held})
        expect(page.locator("#upload")).to_have_class(re.compile("over"))
        page.dispatch_event("main", "drop", {"dataTransfer": held})
        expect(page.locator("#uploads .done")).to_contain_text("stored, 7 B")
        expect(page.get_by_role("row", name=re.compile("dropped.txt"))).to_contain_text("in 7 days")
        page.get_by_role("button", name="Dismiss dropped.txt").click()
        expect(page.locator("#uploads li")).to_have_count(0)


def test_progress_is_shown_and_a_cancelled_upload_leaves_nothing(server, browser, tmp_path):
    (tmp_path / "large.bin").write_bytes(os.urandom(20_000_000))
    _, key = server.workspace("pages progress")
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        network = seen.context.new_cdp_session(page)
        network.send(
            "Network.emulateNetworkConditions",
            {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2_000_000},
        )
        page.set_input_files("#pick", tmp_path / "large.bin")
        expect(page.locator("#uploads .state")).to_have_text(re.compile(r"^[1-9]\d?% of 20\.0 MB$"))
        assert 0 < page.get_by_role("progressbar", name="Upload of large.bin").evaluate("bar => bar.value") < 100
        page.get_by_role("button", name="Cancel the upload of large.bin").click()
        expect(page.locator("#uploads .failed")).to_contain_text("cancelled; nothing was stored")
        page.reload()
        expect(page.locator("#found")).to_contain_text("No files yet")


def test_what_cannot_be_stored_is_said_beside_the_file(server, browser):
    _, key = server.workspace("pages too much", limit_bytes=100_000)
    with visit(browser, server.url, expected=("400 (Bad Request)",)) as seen:
        page = seen.sign_in(key).page
        page.set_input_files("#pick", [chosen("much.bin", b"x" * 3_000_000), chosen("a:b.txt", b"x"), chosen("fits.txt", b"x")])
        expect(page.locator("#uploads li").nth(0)).to_contain_text("Storage quota exceeded")
        expect(page.locator("#uploads li").nth(1)).to_contain_text("the character ':' is not allowed")
        expect(page.locator("#uploads li").nth(2)).to_contain_text("stored")
        expect(page.get_by_role("row")).to_have_count(2)  # with that of the headings


def test_everything_works_with_scripts_off(server, browser):
    _, key = server.workspace("pages plain")
    with visit(browser, server.url, java_script_enabled=False) as seen:
        page = seen.sign_in(key).page
        page.get_by_label("Files to upload").set_input_files(
            [chosen("a.txt", b"first\n"), chosen("lease.pdf", LEASE, "application/pdf")]
        )
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.get_by_role("status").first).to_have_text("a.txt, lease.pdf are stored.")
        page.get_by_label("Find by the beginning of the name").fill("LEA")
        page.get_by_role("button", name="Find").click()
        expect(page.get_by_role("row")).to_have_count(2)
        page.get_by_role("link", name="lease.pdf").click()
        page.get_by_role("link", name="Read it now").click()
        expect(page.locator(".sheet h3")).to_have_text(["Page 1", "Page 2", "Page 3"])
        page.get_by_role("link", name="Delete…").click()
        page.get_by_role("button", name="Delete for good").click()
        expect(page.locator("main")).to_contain_text("no other file held the same bytes")


def test_names_and_texts_are_never_markup(server, browser):
    _, key = server.workspace("pages hostile")
    names = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(2)>',
        "{{7*7}}",
        "invoice\u202efdp.exe",
        "&lt;b&gt;",
        "\u200b",
    ]
    with server.http(key) as http:
        ids = [
            http.post("/v1/files", files={"file": (f"{n}.txt", b"</pre><script>alert(3)</script>")}).json()["id"]
            for n in range(6)
        ]

    async def rename() -> None:  # names that no upload can have
        async with server.store.database.writing() as connection:
            for id, name in zip(ids, names):
                await connection.execute(update(files).where(files.c.id == id).values(filename=name))

    server.run(rename())
    shown = ["invoiceU+202Efdp.exe" if "\u202e" in name else "U+200B" if name == "\u200b" else name for name in names]
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        expect(page.locator("th[scope=row] a")).to_have_text(shown[::-1])
        for id, name in zip(ids, shown):
            page.goto(f"{server.url}/files/{id}")
            expect(page.get_by_role("heading", level=1)).to_have_text(name)
            expect(page.locator(".sheet pre")).to_have_text("</pre><script>alert(3)</script>")


def test_the_list_is_paged_and_searched_in_place(server, browser, monkeypatch):
    monkeypatch.setattr(pages, "ROWS", 5)
    _, key = server.workspace("pages many")

    async def fill() -> None:
        caller = await server.store.local_caller("pages many")
        for n in range(14):
            await server.store.put(caller, b"", f"{'odd' if n % 2 else 'even'}-{n}.bin")

    server.run(fill())
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        names = page.locator("th[scope=row] a")
        expect(names).to_have_text([f"{'odd' if n % 2 else 'even'}-{n}.bin" for n in (13, 12, 11, 10, 9)])
        page.get_by_role("link", name="Older").click()
        expect(names.first).to_have_text("even-8.bin")
        assert "page=page_" in page.url
        page.get_by_role("link", name="Older").click()
        expect(names).to_have_count(4)
        expect(page.get_by_role("link", name="Older")).to_have_count(0)
        page.get_by_role("link", name="Newer").click()
        expect(names.first).to_have_text("even-8.bin")
        page.go_back()
        expect(names).to_have_count(4)
        page.goto(server.url + "/files")
        page.get_by_role("searchbox").press_sequentially("EVEN-1")
        expect(names).to_have_text(["even-12.bin", "even-10.bin"])
        assert page.url.endswith("name=EVEN-1")
        expect(page.get_by_role("searchbox")).to_be_focused()
        page.get_by_role("searchbox").fill("none such")
        expect(page.locator("#found")).to_contain_text("No file’s name begins with “none such”.")


def test_a_long_text_is_read_in_parts_and_a_picture_is_drawn(server, browser, tmp_path):
    _, key = server.workspace("pages long")
    Image.new("RGB", (40, 30), "navy").save(tmp_path / "navy.png")
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        long = "\n".join(f"line {n}" for n in range(10_000)).encode()
        choose(page, chosen("long.txt", long), chosen("navy.png", (tmp_path / "navy.png").read_bytes(), "image/png"))
        page.get_by_role("link", name="long.txt").click()
        expect(page.locator(".sheet pre")).to_contain_text("line 3000")
        page.get_by_role("link", name="Later").click()
        expect(page.locator(".sheet pre")).to_contain_text("line 3333")
        page.get_by_role("link", name="Earlier").click()
        expect(page.locator(".sheet pre")).to_contain_text("line 0\n")
        page.goto(server.url + "/files")
        page.get_by_role("link", name="navy.png").click()
        expect(page.locator(".sheet img")).to_have_js_property("naturalWidth", 40)


def test_a_key_that_is_revoked_ends_an_open_page(server, browser):
    _, key = server.workspace("pages revoked")
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        revoke(server, key)
        page.get_by_role("searchbox").press_sequentially("a")
        page.wait_for_url("**/login")


def test_over_tls_the_session_is_bound_to_the_host(start, browser, tmp_path):
    certify(tmp_path)
    with start(settings=ServerSettings(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")) as found:
        origin = found.url.replace("http:", "https:")
        with visit(browser, origin, ignore_https_errors=True) as seen:
            page = seen.sign_in(found.key).page
            (cookie,) = seen.context.cookies()
            assert (cookie["name"], cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (SECURE, True, True, "Strict")
            choose(page, chosen("a.txt", b"over TLS"))
            page.get_by_role("link", name="a.txt").click()
            expect(page.locator("pre.block")).to_contain_text(f"{origin}/v1/files/file_")


def certify(folder: Path) -> None:
    """A certificate for 127.0.0.1 that nobody else vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    begins = datetime.now(UTC) - timedelta(hours=1)
    made = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), begins, begins + timedelta(days=1)
    )
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


# -- for everybody

NAMELESS = """() => [...document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a, img, progress, meter, section, nav")]
  .filter((e) => !e.closest("[hidden]"))
  .filter((e) => !(e.labels && e.labels.length && e.labels[0].textContent.trim()) && !e.getAttribute("aria-label") && !e.getAttribute("alt")
    && !(e.getAttribute("aria-labelledby") && document.getElementById(e.getAttribute("aria-labelledby"))) && !e.textContent.trim())
  .map((e) => e.outerHTML)"""
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter((e) => !e.closest("pre.block, .hidden-label, .skip, thead, [hidden], svg, caption"))
  .filter((e) => e.getClientRects().length && (e.getBoundingClientRect().right > innerWidth + 1
    || (e.closest(".card") && e.getBoundingClientRect().right > e.closest(".card").getBoundingClientRect().right + 1)))
  .map((e) => e.outerHTML.slice(0, 120))"""
REPEATED = """() => [...document.querySelectorAll("[id]")].map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i)"""
# WCAG 2.2, success criterion 1.4.3: 4.5 to 1, 3 to 1 for large text.
FAINT = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
  const ground = (e) => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, style = getComputedStyle(e);
    if (!texts.currentNode.textContent.trim() || !e.getClientRects().length || e.closest(".hidden-label, .skip, option, script, [hidden]")) continue;
    const [a, b] = [light(parse(style.color)), light(ground(e))], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found.push(ratio.toFixed(2) + " " + e.outerHTML.slice(0, 120));
  }
  return found; }"""


def addresses(server, key: str) -> list[str]:
    """Every page there is."""
    with server.http(key) as http:
        id = http.post("/v1/files", files={"file": ("lease.pdf", LEASE, "application/pdf")}).json()["id"]
        gone = http.post("/v1/files", files={"file": ("gone.txt", b"gone")}).json()["id"]
        receipt = http.delete(f"/v1/files/{gone}", headers={"x-ropewalk-extensions": "1"}).json()["receipt"]
    return [
        f"/files/{id}?from=0",
        f"/files/{id}/delete",
        f"/files/{gone}/receipt/{receipt['sequence']}",
        "/files",
        "/chat",
        "/usage",
        "/files/file_0",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_can_be_read_by_everybody(server, browser, scheme):
    _, key = server.workspace(f"pages everybody {scheme}", limit_bytes=1_000_000)
    small = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    with visit(browser, server.url, expected=("404 (Not Found)",), **small) as seen:
        page = seen.page
        page.goto(server.url + "/login")
        for address in ["/login", *addresses(server, key)]:
            if address == "/login":
                page.get_by_label("Key").wait_for()
            else:
                if page.url.endswith("/login"):
                    seen.sign_in(key)
                page.goto(server.url + address)
            assert page.locator("html").get_attribute("lang") == "en"
            assert page.title().endswith(" · Ropewalk")
            levels = page.locator("h1, h2, h3").evaluate_all("all => all.map((e) => Number(e.tagName[1]))")
            assert levels.count(1) == 1, address
            assert all(after - before <= 1 for before, after in pairwise(levels)), (address, levels)
            assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
            assert page.evaluate(NAMELESS) == [], address
            assert page.evaluate(REPEATED) == [], address
            assert page.evaluate(FAINT) == [], address
            assert page.evaluate(OVERFLOWING) == [], address
            assert violations(page) == [], address


def test_the_keyboard_alone_is_enough(server, browser):
    _, key = server.workspace("pages keyboard")
    with server.http(key) as http:
        http.post("/v1/files", files={"file": ("lease.pdf", LEASE, "application/pdf")})
    with visit(browser, server.url) as seen:
        page = seen.sign_in(key).page
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        page.keyboard.press("Enter")
        reached = []
        for _ in range(8):
            page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            reached.append(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.name"))
            if reached[-1] == "lease.pdf":
                break
        assert reached[1:] == ["Choose files", "name", "Find", "lease.pdf"]
        page.keyboard.press("Enter")
        page.wait_for_url("**/files/file_*")


def test_the_pictures_of_the_docs(server, browser, tmp_path):
    """With SCREENSHOTS=docs, the ones that the docs show."""
    workspace, _ = server.workspace("Claims", limit_bytes=5_000_000, limit_files=500)
    _, key = server.run(create_key(server.store.database, server.store.vault, workspace.id, "Claims desk"))
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path

    async def spread() -> None:  # as if they had come over some days
        async with server.store.database.writing() as connection:
            found = await connection.execute(
                select(files.c.id).where(files.c.workspace_id == workspace.id).order_by(files.c.created_at.desc())
            )
            for hours, id in zip((0, 2, 5, 26, 50, 75), found.scalars().all()):
                moved = update(files).where(files.c.id == id).values(created_at=files.c.created_at - hours * 3_600_000_000)
                await connection.execute(moved)

    with visit(browser, server.url, device_scale_factor=1.5, viewport={"width": 1240, "height": 760}) as seen:
        page = seen.sign_in(key).page
        leaves = [f"Lease agreement, page {n}\n\n" + "\n".join(CLAUSES[(n - 1) % 3]) for n in range(1, 13)]
        choose(
            page,
            chosen("claims-2026-10.jsonl", b'{"claim": "water damage", "paid": 1840}\n' * 32_000, "application/jsonl"),
            chosen("Price list.csv", b"article,price\nrope,12.50\n" * 3_400, "text/csv"),
            chosen("settle.py", b"def settle(claim):\n    return claim.paid\n" * 60, "text/x-python"),
            chosen("Roof, north side.png", _picture(), "image/png"),
            chosen(
                "Handbook for adjusters.md", b"# Handbook\n\nAn adjuster writes down what is seen.\n" * 900, "text/markdown"
            ),
        )
        page.get_by_label("Keep").select_option("30 days")
        choose(page, chosen("Lease agreement.pdf", pdf(*leaves), "application/pdf"))
        server.run(spread())
        page.goto(server.url + "/files")
        expect(page.get_by_role("row", name=re.compile("Lease agreement"))).to_contain_text("~")
        expect(page.locator("#reading")).to_have_count(0)
        page.screenshot(path=folder / "files-page.png")
        page.get_by_role("link", name="Lease agreement.pdf").click()
        expect(page.locator(".sheet").nth(2)).to_be_visible()
        page.screenshot(path=folder / "file-page.png")
    for name, settings in {"dark": {"color_scheme": "dark"}, "phone": {"viewport": {"width": 390, "height": 844}}}.items():
        with visit(browser, server.url, device_scale_factor=1.5, **settings) as seen:
            seen.sign_in(key).page.screenshot(path=folder / f"files-page-{name}.png")
    for path in folder.glob("file*-page*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # not an empty page
            picture.convert("RGB").quantize(192).save(path, optimize=True)


CLAUSES = [
    [
        "1. The landlord lets the premises to the tenant for five years,",
        "beginning on 1 December 2026.",
        "2. The rent is 2,400 a month, due on the third working day.",
    ],
    [
        "3. The tenant keeps the premises in good repair and gives notice",
        "of damage without delay.",
        "4. Repairs up to 300 are the tenant's.",
    ],
    [
        "5. The landlord may enter with a day's notice, to look or to repair.",
        "6. What is not in writing has not been agreed.",
    ],
]


def _picture() -> bytes:
    out = BytesIO()
    Image.effect_noise((900, 600), 60).save(out, "PNG")
    return out.getvalue()
