"""The chat page in a real Chromium: a reply of a tiny base as it comes, and one that cites, with its sources opened."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the package playwright is not installed: pip install playwright")

from PIL import Image
from playwright.sync_api import Page, expect

from browser import CHROMIUM, violations, visit
from ropewalk.chat.messages import BlockEnded, BlockStarted, CitationAdded, Cited, Delta, Ended, Started, Text, Usage
from ropewalk.config.serving import EngineOptions, Retrieval, ServedModel, Serving
from ropewalk.files.settings import Settings
from ropewalk.models.base import make_base
from ropewalk.quickstart import facts
from ropewalk.server import chat
from ropewalk.server.settings import ServerSettings
from ropewalk.tenants.prices import Price
from server.conftest import Running, running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or name one in $CHROMIUM")

# What the quickstart begins with: it has learnt to read short texts, and answers in a word.
READER = files("ropewalk") / "quickstart" / "base"
SCREENSHOTS = os.environ.get("SCREENSHOTS")
RENT = "The rent is 2,400 a month, due on the third working day."
ENTRY = "The landlord may enter with a day's notice, to look or to repair."
LEASE = (
    "# Lease agreement\n\nThe landlord lets the premises to the tenant for five years, beginning on 1 December 2026. "
    f"{RENT} What is paid late bears interest at four percent.\n\n# Use\n\nThe tenant keeps the premises in good repair. "
    f"Repairs up to 300 are the tenant's. {ENTRY} <b>What is not in writing</b> has not been agreed.\n"
)
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.fixture(scope="module")
def served(root_key: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with one tiny base, under two names."""
    data = tmp_path_factory.mktemp("chat")
    make_base(data / "tiny", "qwen3_moe", size="tiny", seed=3)
    base = str(data / "tiny")
    models = {"tiny": ServedModel(base, price=Price(0.5, 2.0, 0.05)), "house": ServedModel(base)}
    models["reader"] = ServedModel(str(READER), price=Price(0.1, 0.4, 0.01))
    serving = Serving(models, EngineOptions(threads=1), Retrieval(chunk=200))
    with running(data, Settings(data=data), ServerSettings(serving=serving)) as found:
        yield found


class Citing:
    """Answers as a model that cites would."""

    def __init__(self, file_id: str, usage: Usage, end: str) -> None:
        self.file_id, self.usage, self.end = file_id, usage, end

    async def stream(self, caller, request):
        yield Started(self.usage)
        for said, cited in (
            ("The rent is 2,400 a month, and is due on the third working day.", RENT),
            (" The landlord may come in to look or to repair, with a day’s notice.", ENTRY),
            (self.end, None),
        ):
            yield BlockStarted(Text(""))
            for word in re.findall(r"\s*\S+", said):
                await asyncio.sleep(0)
                yield Delta(word)
            if cited:
                begin = LEASE.index(cited)
                yield CitationAdded(Cited("char_location", cited, 0, "Lease.md", self.file_id, begin, begin + len(cited)))
            yield BlockEnded()
        yield Ended("end_turn", None, self.usage)


def put(server: Running, key: str, name: str = "Lease.md", text: str = LEASE, kind: str = "text/markdown") -> str:
    with server.http(key) as http:
        return http.post("/v1/files", files={"file": (name, text.encode(), kind)}).json()["id"]


def cites(
    server: Running, monkeypatch: pytest.MonkeyPatch, id: str, usage: Usage, end: str = f" No more is said {HOSTILE}."
) -> None:
    async def answerer(name: str, caller: object = None) -> Citing:
        return Citing(id, usage, end)

    monkeypatch.setattr(server.app.state.models, "answerer", answerer)


def test_a_second_question_is_read_from_the_cache_and_the_page_says_what_that_saved(served, browser, monkeypatch):
    monkeypatch.setattr(chat, "MOST_TOKENS", 16)  # the base's context is small
    _, key = served.workspace("chat real")
    put(served, key, text=LEASE[:300])
    with visit(browser, served.url) as seen:
        page = seen.sign_in(key).page
        page.get_by_role("link", name="Chat").click()
        page.get_by_label("Model").select_option("tiny")
        page.get_by_label("Lease.md").check()
        for question in ("How much is the rent?", "And when is it due?"):
            page.get_by_label("Question", exact=True).fill(question)
            page.get_by_role("button", name="Ask").click()
            expect(page.locator("#told")).to_have_text("Answered", timeout=60_000)
        spent = page.locator(".spent")
        expect(spent).to_have_count(2)
        expect(spent.nth(1)).to_contain_text(re.compile(r"[1-9]\d* tokens read from the cache.*the cache saved [1-9]\d*%.*USD"))


def test_a_citation_opens_its_passage_and_nothing_of_a_reply_is_markup(served, browser, monkeypatch):
    _, key = served.workspace("chat cites")
    cites(served, monkeypatch, put(served, key), Usage(30, 0, 4100, 25))
    with visit(browser, served.url) as seen:
        page = seen.sign_in(key).page
        page.goto(served.url + "/chat")
        page.get_by_label("Lease.md").check()
        page.get_by_label("Question", exact=True).fill(HOSTILE)
        page.get_by_role("button", name="Ask").click()
        expect(page.locator(".asked bdi")).to_have_text(HOSTILE)
        expect(page.locator(".said")).to_contain_text(HOSTILE)
        assert page.locator("main img, main script").count() == 0
        marked = page.locator("mark").nth(1)
        expect(marked).not_to_be_visible()
        page.get_by_role("link", name="Source 2").click()
        expect(marked).to_be_visible()
        expect(marked).to_have_text(ENTRY)
        expect(page.locator(".passage").nth(1)).to_contain_text("<b>What is not in writing</b>")
        page.locator("details[open] a").click()
        expect(page.locator("#preview")).to_contain_text(ENTRY)


def test_without_scripts_the_form_answers_with_the_whole_page(served, browser, monkeypatch):
    _, key = served.workspace("chat plain")
    cites(served, monkeypatch, put(served, key), Usage(30, 4100, 0, 25))
    with visit(browser, served.url, java_script_enabled=False) as seen:
        page = seen.sign_in(key).page
        page.goto(served.url + "/chat")
        page.get_by_label("Lease.md").check()
        for question in ("How much is the rent?", "May the landlord come in?"):
            page.get_by_label("Question", exact=True).fill(question)
            page.get_by_role("button", name="Ask").click()
            expect(page.locator(".asked").last).to_contain_text(question)
        expect(page.locator(".turn")).to_have_count(2)
        expect(page.locator(".spent")).to_contain_text("4,130 read now")
        expect(page.get_by_label("Lease.md")).to_be_checked()


def test_what_keeps_a_reply_from_coming_is_said_where_it_would_stand(served, browser):
    _, key = served.workspace("chat failing")
    put(served, key, "picture.md", " \n")
    with visit(browser, served.url) as seen:
        page = seen.sign_in(key).page
        page.goto(served.url + "/chat")
        page.get_by_label("picture.md").check()
        page.get_by_label("Question", exact=True).fill("What is this?")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator(".notice.bad")).to_contain_text("no text that could be read")
        expect(page.get_by_label("Question", exact=True)).to_have_value("What is this?")


def test_a_files_chunks_are_shown_with_their_places(served, browser):
    _, key = served.workspace("chat chunks")
    id = put(served, key)
    with visit(browser, served.url) as seen:
        page = seen.sign_in(key).page
        page.goto(f"{served.url}/files/{id}/chunks")
        assert violations(page) == []
        expect(page.locator("article").first).to_contain_text(
            re.compile(r"Chunk 1.*section 1: Lease agreement.*characters 0 to \d+")
        )
        assert page.locator("article").count() > 2
    with visit(browser, served.url, expected=("404",)) as seen:
        page = seen.sign_in(served.workspace("chat stranger")[1]).page
        page.goto(f"{served.url}/files/{id}/chunks")
        expect(page.get_by_role("heading", level=1)).to_have_text("Not Found")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#told")).to_have_text("Answered", timeout=60_000)


def aruba(server: Running, key: str) -> str:
    """A file about a country that the reader has never seen -> the sentence that names its capital."""
    (country,) = (country for country in facts.split()[1] if country.name == "Aruba")
    text = facts.document(country)
    put(server, key, "Aruba.txt", text, "text/plain")
    (told,) = re.findall(r"[^.]*Oranjestad[^.]*\.", text)
    return told.strip()


def test_a_real_model_reads_a_file_once_answers_twice_and_shows_where_it_stands(served, browser, tmp_path):
    """With SCREENSHOTS=docs, the picture that the docs show: nothing in it is made up."""
    _, key = served.workspace("Atlas")
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    put(served, key, "Handbook for adjusters.md")
    put(served, key, "Price list.csv", "article,price\n", "text/csv")
    told = aruba(served, key)
    with visit(browser, served.url, device_scale_factor=1.5, viewport={"width": 1240, "height": 900}) as seen:
        page = seen.sign_in(key).page
        page.get_by_role("link", name="Aruba.txt").click()
        page.get_by_role("link", name="Ask about it").click()
        expect(page.get_by_label("Aruba.txt")).to_be_checked()
        page.get_by_label("Model").select_option("reader")
        ask(page, "What is the capital of Aruba?")
        first = page.locator(".turn").first
        expect(first.locator(".said")).to_contain_text("Oranjestad")
        first.get_by_role("link", name="Source 1").click()
        expect(first.locator("mark")).to_be_visible()
        expect(first.locator("mark")).to_have_text(told)
        expect(first.locator(".spent")).to_contain_text(re.compile(r"[1-9]\d* read now"))
        ask(page, "What is the currency of Aruba?")
        second = page.locator(".turn").last
        expect(second.locator(".said")).to_contain_text("Guilder")
        expect(second.locator(".spent")).to_contain_text(
            re.compile(r"1\d\d tokens read from the cache.*the cache saved [5-9]\d% of the reading, 0\.0000\d+ USD")
        )
        assert violations(page) == []
        page.get_by_label("Question", exact=True).fill("How many people live there?")
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=folder / "chat-page.png")
        page.locator("details[open] a").first.click()
        expect(page.locator("#preview")).to_contain_text(told)
        page.get_by_role("link", name="Files", exact=True).first.click()
        expect(page.locator(".asked-about")).to_have_text(
            re.compile(r"^2 questions, 1\d\d tokens not read again, 0\.0\S+ USD saved$")
        )
    with Image.open(folder / "chat-page.png") as picture:
        picture.convert("RGB").quantize(192).save(folder / "chat-page.png", optimize=True)


def test_a_real_model_answers_and_cites_without_scripts_too(served, browser):
    _, key = served.workspace("Atlas plain")
    told = aruba(served, key)
    with visit(browser, served.url, java_script_enabled=False) as seen:
        page = seen.sign_in(key).page
        page.goto(served.url + "/chat")
        page.get_by_label("Model").select_option("reader")
        page.get_by_label("Aruba.txt").check()
        for question, answer in (
            ("What is the capital of Aruba?", "Oranjestad"),
            ("What is the currency of Aruba?", "Guilder"),
        ):
            page.get_by_label("Question", exact=True).fill(question)
            page.get_by_role("button", name="Ask").click()
            expect(page.locator(".said").last).to_contain_text(answer, timeout=60_000)
            if answer == "Oranjestad":
                page.get_by_role("link", name="Source 1").click()
                page.locator("details summary").click()
                expect(page.locator("mark")).to_have_text(told)
        expect(page.locator(".spent").last).to_contain_text(re.compile(r"1\d\d tokens read from the cache"))
