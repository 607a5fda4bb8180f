"""The pages of Compare in a real Chromium: compare, diff, vote, bookmark, ship, roll back, digest; for everybody, and with scripts off."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("playwright", reason="the package playwright is not installed: pip install playwright")

from PIL import Image
from playwright.sync_api import Page, expect
from sqlalchemy import update

from browser import CHROMIUM, violations, visit
from ropewalk.compare.candidates import add_cards
from ropewalk.compare.records import create
from ropewalk.database import now
from ropewalk.jobs.tables import jobs
from ropewalk.models.base import make_base
from server.compared import compared
from server.conftest import Running
from server.test_pages import FAINT, NAMELESS, OVERFLOWING, REPEATED

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or name one in $CHROMIUM")

SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder: pictures for the docs are made anew
PAGES = Path(__file__).parents[1] / "compare" / "pages"


@pytest.fixture(scope="module")
def leases(server: Running, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """Two bases and an alias; neither is loaded before one is shipped."""
    other = tmp_path_factory.mktemp("bases") / "other"
    make_base(other, "qwen3_moe", size="tiny", seed=4)
    server.app.state.registry.publish_base("lease-base", tiny)
    server.app.state.registry.publish_base("lease-r16", other)
    server.app.state.registry.ship("leases", "lease-base")
    return server


@pytest.fixture
def home(leases: Running, request: pytest.FixtureRequest) -> SimpleNamespace:
    """A workspace of its own, with a key to it."""
    workspace, key = leases.workspace(request.node.name.removeprefix("test_").replace("_", " ").capitalize()[:90])
    caller = leases.run(leases.store.local_caller(workspace.name))
    parts = {"store": leases.store, "models": leases.app.state.models, "workspace": workspace}
    return SimpleNamespace(server=leases, key=key, caller=caller, **parts)


def made(home: SimpleNamespace, **settings):
    """A comparison that has run, in this workspace."""
    return home.server.run(compared(home.store, home.models, home.caller, **settings))


@pytest.fixture
def seen(home: SimpleNamespace, browser) -> Iterator[Page]:
    """A window that is signed in."""
    with visit(browser, home.server.url) as found:
        yield found.sign_in(home.key).page


@pytest.fixture
def admin(home: SimpleNamespace, browser) -> Iterator[Page]:
    """A window of who may ship, for which a key opens every workspace."""
    with visit(browser, home.server.url) as found:
        page = found.sign_in(home.server.key).page
        page.get_by_label("Workspace", exact=True).select_option(home.workspace.id)
        page.get_by_role("button", name="Switch").click()
        yield page


def test_a_comparison_is_read_from_the_verdict_to_the_words_that_changed(home, seen):
    one = made(home)
    seen.goto(f"{home.server.url}/compare/{one.comparison.id}")
    verdict = seen.locator(".verdict")
    expect(verdict.locator(".state")).to_have_text("SHIP")
    # 60 prompts: the old one is right on the odd 30; the new one wrong on every n % 4 == 2, so right on 45.
    expect(verdict).to_contain_text("60 prompts in 60 groups")
    expect(verdict).to_contain_text(re.compile(r"better than lease-base: \+\d"))
    expect(seen.locator("svg.intervals")).to_have_count(1)
    expect(seen.locator("#difference ~ ul")).to_contain_text("95% interval")
    expect(seen.locator("#measured ~ *, section:has(#measured)").first).to_contain_text("pass rate")
    tabs = seen.get_by_role("navigation", name="Filters")
    expect(tabs.get_by_role("link", name="fixed 15")).to_be_visible()
    expect(tabs.get_by_role("link", name="broke 0")).to_be_visible()
    tabs.get_by_role("link", name="both wrong 15").click()
    expect(seen.locator("section:has(#changed) tbody tr")).to_have_count(15)
    tabs.get_by_role("link", name="quarterly 15").click()
    expect(seen.locator("section:has(#changed) tbody tr")).to_have_count(15)
    seen.get_by_role("link", name="#4", exact=True).click()
    expect(seen.get_by_role("heading", level=1)).to_contain_text("Prompt 4 fixed")
    expect(seen.locator("ins").first).to_be_visible()
    expect(seen.locator(".answer del").first).to_be_visible()


def test_regressions_are_read_one_after_the_other_with_j(home, seen):
    one = made(home, right=lambda number, by: number > 3 or by == "old")
    seen.goto(f"{home.server.url}/compare/{one.comparison.id}")
    seen.keyboard.press("j")
    expect(seen.get_by_role("heading", level=1)).to_contain_text("Prompt 1 broke")
    expect(seen.get_by_text("must pass")).to_be_visible()
    seen.keyboard.press("j")
    expect(seen.get_by_role("heading", level=1)).to_contain_text("Prompt 2 broke")
    seen.get_by_role("link", name="Next regression").click()
    expect(seen.get_by_role("heading", level=1)).to_contain_text("Prompt 3 broke")
    seen.keyboard.press("j")
    expect(seen.get_by_role("heading", level=1)).to_contain_text("Prompt 1 broke")


def test_a_vote_is_cast_blind_with_a_key_and_with_a_button(home, seen):
    one = made(home)
    seen.goto(f"{home.server.url}/compare/{one.comparison.id}/vote")
    assert "lease-r16" not in seen.content()
    assert "lease-base" not in seen.locator("main").inner_html()
    seen.keyboard.press("1")
    expect(seen.get_by_role("status")).to_contain_text(re.compile(r"You chose lease-(base|r16)\. A was lease-"))
    seen.get_by_role("button", name="Both bad").click()
    expect(seen.get_by_role("status")).to_contain_text("Both bad. A was")
    seen.goto(f"{home.server.url}/compare/{one.comparison.id}")
    expect(seen.locator("section:has(#votes)")).to_contain_text("1 person; no percentage below five")


def test_a_colleague_votes_by_a_link_of_their_own(home, seen, browser):
    one = made(home)
    seen.goto(f"{home.server.url}/compare/{one.comparison.id}")
    seen.get_by_role("button", name="Make a link for a colleague").click()
    link = seen.get_by_label("The link").input_value()
    with visit(browser, home.server.url) as other:
        other.page.goto(link)
        other.page.keyboard.press("2")
        expect(other.page.get_by_role("status")).to_contain_text("You chose")
        assert violations(other.page) == []
    with visit(browser, home.server.url, expected=("404 (Not Found)",)) as other:
        other.page.goto(link[:-3] + "xyz")
        expect(other.page.get_by_role("alert")).to_be_visible()


def test_a_bookmark_is_set_shown_at_home_and_taken_away(home, seen):
    one = made(home, title="Which lease reader?")
    seen.goto(home.server.url + "/")
    expect(seen.locator("section:has(#bookmarks)")).to_contain_text("No bookmark yet")
    seen.goto(f"{home.server.url}/compare/{one.comparison.id}")
    seen.get_by_role("button", name="Bookmark").click()
    expect(seen.get_by_role("button", name="Bookmarked")).to_have_attribute("aria-pressed", "true")
    seen.goto(home.server.url + "/")
    expect(seen.locator("section:has(#bookmarks)")).to_contain_text("Which lease reader?")
    expect(seen.locator("section:has(#waiting)")).to_contain_text("lease-r16 may be shipped")
    seen.get_by_role("button", name="Remove the bookmark").click()
    expect(seen.locator("section:has(#bookmarks)")).to_contain_text("No bookmark yet")


ANYTHING = b"\n".join(
    b'{"prompt": "Say anything, %d", "checks": [{"kind": "length", "unit": "characters", "most": 400}], "group": "%d"}' % (n, n)
    for n in range(60)
)


def test_what_is_better_is_shipped_and_rolled_back(home, admin):
    seen = admin
    long = lambda number, right, by: f"{number} words" if by == "new" else "words " * 200
    one = made(home, source=ANYTHING, texts=long, right=lambda number, by: True)
    registry = home.server.app.state.registry
    seen.goto(f"{home.server.url}/models")
    expect(seen.get_by_role("row", name=re.compile("^lease-r16"))).to_contain_text("SHIP")
    seen.get_by_role("link", name="Ship lease-r16").click()
    expect(seen.get_by_label("Alias that shall serve it")).to_have_value("leases")
    assert violations(seen) == []
    seen.get_by_role("button", name="Ship it", exact=True).click()
    seen.wait_for_url(f"**/compare/{one.comparison.id}", timeout=120_000)
    assert registry.aliases()["leases"] == "lease-r16"
    expect(seen.locator("main")).to_contain_text("leases serves lease-r16 since")
    seen.goto(home.server.url + "/models")
    seen.get_by_text("The same in words").click()
    expect(seen.get_by_role("listitem").filter(has_text="shipped on a verdict")).to_contain_text(
        "leases shipped on a verdict, from SHIP"
    )
    expect(seen.locator(".lineage svg g.good .title", has_text="SHIP")).to_be_visible()
    seen.goto(home.server.url + "/")
    row = seen.get_by_role("row", name=re.compile("leases"))
    expect(row).to_contain_text("SHIP")
    row.get_by_role("link", name="Roll back…").click()
    expect(seen.get_by_role("button", name="Roll back now")).to_be_visible()
    assert violations(seen) == []
    seen.get_by_role("button", name="Roll back now").click()
    seen.wait_for_url(home.server.url + "/", timeout=120_000)
    assert registry.aliases()["leases"] == "lease-base"


def test_an_override_is_red_and_says_why(home, admin):
    seen = admin
    one = made(home, right=lambda number, by: by == "old")
    seen.goto(f"{home.server.url}/compare/{one.comparison.id}")
    expect(seen.locator(".verdict .state")).to_have_text("SKIP")
    seen.get_by_role("link", name="Ship all the same…").click()
    expect(seen.get_by_role("alert")).to_contain_text("The rule does not permit this")
    assert violations(seen) == []
    button = seen.get_by_role("button", name="Ship it against the verdict")
    button.click()
    assert seen.url.partition("?")[0].endswith("/ship")  # the reason is missing
    assert seen.get_by_label("Why all the same?").evaluate("e => e.validity.valueMissing")


def test_a_pasted_page_becomes_cards_about_which_nothing_was_run(home, seen):
    text = (PAGES / "two_tools.txt").read_text()
    seen.goto(home.server.url + "/compare/new")
    seen.get_by_label("The text of a comparison page").fill(text)
    seen.get_by_role("button", name="Read it into cards").click()
    expect(seen.locator(".verdict .state")).to_have_text("OPINION ONLY — nothing was run")
    expect(seen.get_by_role("link", name=re.compile("^Ship"))).to_have_count(0)
    cards = seen.locator(".imported")
    expect(cards).to_have_count(2)
    first = " ".join(cards.first.inner_text().split())
    for words in (
        "Larkspur Forge", "Training", "Shape a small model around your own documents", "Ship · 3 ship / 1 skip", "75%", "Paid",
        "Open Source", "No votes so far", "75%, recomputed: as printed", "12x faster epochs and 30x less memory", "untested",
        "82/100 · ship", "41/100 · skip", "No panel take", "I could not find who measured the memory figure",
    ):  # fmt: skip
        assert words in first, (words, first)
    expect(cards.nth(1)).to_contain_text("Teams that lose what they know")
    expect(cards.first.locator(".notice.bad")).to_contain_text("Paid")


def test_hostile_texts_are_shown_and_nothing_of_them_is_a_link(home, seen):
    name = '<img src=x onerror="alert(1)">\u202e'
    page = (PAGES / "two_tools.txt").read_text().replace("Larkspur Forge", f"{name} Forge")
    page = page.replace(
        "Shape a small", "javascript:alert(2) https://evil.example/ <a href=https://evil.example/>x</a> Shape a small"
    )
    cards = home.server.run(add_cards(home.store, home.caller, page, source_url="javascript:alert(3)"))
    one = home.server.run(create(home.store, home.caller, baseline_id=cards[0].id, candidate_ids=[cards[1].id], title=name))
    home.server.run(home.server.app.state.comparisons.decide(home.caller, one.id))
    for path in (f"/compare/{one.id}", f"/candidates/{cards[0].id}", "/compare", "/compare/new", "/"):
        seen.goto(home.server.url + path)
        assert seen.locator("main img:not([src^='/badge/'])").count() == 0
        hrefs = seen.locator("a").evaluate_all("all => all.map((a) => a.getAttribute('href'))")
        assert [href for href in hrefs if not href.startswith(("/", "#"))] == []
    seen.goto(f"{home.server.url}/candidates/{cards[0].id}")
    expect(seen.locator("main")).to_contain_text("javascript:alert(3)")


def test_the_digest_is_shown_before_it_is_sent(home, seen):
    seen.goto(home.server.url + "/digest")
    expect(seen.locator("main")).to_contain_text("Nothing changed")
    made(home, title="Leases, again")
    seen.goto(home.server.url + "/")
    seen.get_by_role("link", name="What it would say now").click()
    expect(seen.locator("main")).to_contain_text("Leases, again")


def test_with_scripts_off_everything_is_links_and_forms(home, browser):
    one = made(home, right=lambda number, by: number > 3 or by == "old")
    with visit(browser, home.server.url, java_script_enabled=False) as found:
        page = found.sign_in(home.key).page
        page.goto(home.server.url + "/")
        page.get_by_role("navigation", name="The loop").get_by_role("link", name="Shipping").click()
        page.get_by_text("The same in words").click()
        page.locator(f"""ul.chain a[href="/compare/{one.comparison.id}"]""").first.click()
        expect(page).to_have_url(f"{home.server.url}/compare/{one.comparison.id}")
        page.get_by_role("link", name="Read what broke").click()
        page.get_by_role("link", name="Next regression").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("Prompt 2 broke")
        page.goto(f"{home.server.url}/compare/{one.comparison.id}/vote")
        page.get_by_role("button", name="A is better").click()
        expect(page.get_by_role("status")).to_contain_text("You chose")


def test_the_method_page_shows_the_rule_and_says_that_no_selftest_was_run(home, browser):
    with visit(browser, home.server.url) as found:
        found.page.goto(home.server.url + "/method")
        expect(found.page.locator("pre.rule")).to_contain_text("OPINION ONLY")
        expect(found.page.locator("section:has(#selftest)")).to_contain_text("ropewalk compare selftest")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_of_compare_can_be_read_by_everybody(home, browser, scheme):
    one = made(home, right=lambda number, by: number > 3 or by == "old")
    cards = home.server.run(add_cards(home.store, home.caller, (PAGES / "two_tools.txt").read_text()))
    told = home.server.run(create(home.store, home.caller, baseline_id=cards[0].id, candidate_ids=[cards[1].id]))
    home.server.run(home.server.app.state.comparisons.decide(home.caller, told.id))
    id, candidate = one.comparison.id, one.candidate.id
    addresses = [
        "/",
        "/models",
        "/compare",
        "/compare/new",
        f"/compare/{id}",
        f"/compare/{id}/prompts/{one.prompts[0].id}",
        f"/compare/{id}/vote",
        f"/compare/{told.id}",
        f"/candidates/{candidate}",
        f"/candidates/{cards[0].id}",
        "/method",
        "/digest",
    ]
    small = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    with visit(browser, home.server.url, **small) as found:
        page = found.sign_in(home.key).page
        for address in addresses:
            page.goto(home.server.url + address)
            assert page.locator("html").get_attribute("lang") == "en"
            assert page.locator("h1").count() == 1, address
            assert page.evaluate(NAMELESS) == [], address
            assert page.evaluate(REPEATED) == [], address
            assert page.evaluate(FAINT) == [], address
            assert page.evaluate(OVERFLOWING) == [], address
            assert violations(page) == [], address


def finished_job(home: SimpleNamespace) -> str:
    """The name of what a job has made of a file, as if it had been trained."""
    runner, registry = home.server.app.state.jobs, home.server.app.state.registry
    options, runner.options = runner.options, replace(runner.options, at_once=0)
    try:
        rows = json.dumps({"messages": [{"role": "user", "content": "Due?"}, {"role": "assistant", "content": "May"}]})
        with home.server.http(home.key) as http:
            file = http.post("/v1/files", files={"file": ("leases.jsonl", rows + "\n")}).json()["id"]
            id = http.post("/v1/fine_tuning/jobs", json={"model": "lease-base", "training_file": file}).json()["id"]
        ended = {"state": "succeeded", "model": "ft:lease-base:desk", "step": 4, "steps": 4, "finished_at": now()}
        home.server.run(ended_as(home.store, id, ended))
    finally:
        runner.options = options
    lineage = {"file": file, "job": id, "workspace": home.workspace.id}
    return registry.publish_adapter(ended["model"], registry.resolve("lease-base").path, "lease-base", lineage).name


async def ended_as(store, id: str, values: dict) -> None:
    async with store.database.writing() as connection:
        await connection.execute(update(jobs).where(jobs.c.id == id).values(values))


def test_what_a_job_has_made_is_drawn_from_its_file_to_its_name(home, seen):
    name = finished_job(home)
    seen.goto(f"{home.server.url}/models")
    seen.get_by_text("The same in words").click()
    made_of = seen.locator("ul.chain li")
    job = made_of.filter(has_text="supervised, succeeded")
    expect(job).to_contain_text("from leases.jsonl")
    expect(made_of.filter(has=seen.get_by_role("link", name=name))).to_contain_text("over lease-base, from job ")
    assert seen.locator(".lineage path").count() >= 3  # file, job, model; and the alias on its base; others' beside them
    job.get_by_role("link").click()
    expect(seen.get_by_role("heading", level=1)).to_contain_text("succeeded")


def test_the_pictures_of_the_docs(home, browser, tmp_path):
    """With SCREENSHOTS=docs, the ones that the docs show."""
    one = made(
        home,
        right=lambda n, by: n % 15 != 4 if by == "new" else n % 2 == 1 or n % 15 == 4,
        title="Lease desk: r16 or what is served?",
    )
    cards = home.server.run(add_cards(home.store, home.caller, (PAGES / "two_tools.txt").read_text()))
    told = home.server.run(create(home.store, home.caller, baseline_id=cards[0].id, candidate_ids=[cards[1].id]))
    home.server.run(home.server.app.state.comparisons.decide(home.caller, told.id))
    finished_job(home)
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    with visit(browser, home.server.url, device_scale_factor=1.5, viewport={"width": 1240, "height": 1000}) as found:
        page = found.sign_in(home.server.key).page
        page.get_by_label("Workspace", exact=True).select_option(home.workspace.id)
        page.get_by_role("button", name="Switch").click()
        page.goto(f"{home.server.url}/compare/{one.comparison.id}")
        page.screenshot(path=folder / "compare-page.png")
        page.keyboard.press("j")
        expect(page.get_by_role("heading", level=1)).to_contain_text("broke")
        page.screenshot(path=folder / "compare-prompt.png")
        page.goto(f"{home.server.url}/compare/{one.comparison.id}/vote")
        page.screenshot(path=folder / "compare-vote.png")
        page.goto(f"{home.server.url}/compare/{told.id}")
        page.screenshot(path=folder / "compare-card.png")
        page.goto(f"{home.server.url}/models")
        page.screenshot(path=folder / "models-page.png")
        page.goto(f"{home.server.url}/")
        page.screenshot(path=folder / "home-page.png")
    for name in ("compare-page", "compare-prompt", "compare-vote", "compare-card", "models-page", "home-page"):
        with Image.open(folder / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # not an empty page
            picture.convert("RGB").quantize(192).save(folder / f"{name}.png", optimize=True)
