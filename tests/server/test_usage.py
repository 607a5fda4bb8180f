"""The Usage page and what is told of each file, in a real Chromium, over questions that a tiny base was really asked."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the package playwright is not installed: pip install playwright")

from PIL import Image
from playwright.sync_api import expect
from sqlalchemy import update

from browser import CHROMIUM, violations, visit
from ropewalk.config.serving import EngineOptions, ServedModel, Serving
from ropewalk.database import now
from ropewalk.files import token_ledger
from ropewalk.files.settings import Settings
from ropewalk.files.token_ledger import FileTokens, Spent
from ropewalk.jobs.tables import jobs
from ropewalk.models.base import make_base
from ropewalk.server.settings import ServerSettings
from ropewalk.tenants.caller import RIGHTS, Caller
from ropewalk.tenants.prices import Price
from server.conftest import Running, running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or name one in $CHROMIUM")

SCREENSHOTS = os.environ.get("SCREENSHOTS")
TEXT = "The rent is 2,400 a month. It is due on the third working day. "


@pytest.fixture(scope="module")
def served(root_key: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with one tiny base under two names, of which one has a price."""
    data = tmp_path_factory.mktemp("usage")
    make_base(data / "tiny", "qwen3_moe", size="tiny", seed=3)
    base = str(data / "tiny")
    price = Price(1.0, 5.0, 0.1, training=2.0, device_hour=4.0, as_of="2026-11-22")
    serving = Serving({"tiny": ServedModel(base, price=price), "free": ServedModel(base)}, EngineOptions(threads=1))
    with running(data, Settings(data=data), ServerSettings(serving=serving)) as found:
        yield found


def put(server: Running, key: str, name: str = "lease.txt", text: str = TEXT) -> str:
    with server.http(key) as http:
        return http.post("/v1/files", files={"file": (name, text.encode(), "text/plain")}).json()["id"]


def ask(server: Running, key: str, id: str, model: str = "tiny", **more: object) -> dict[str, int]:
    """A question about a file -> its usage."""
    document = {"type": "document", "source": {"type": "file", "file_id": id}}
    content = [document, {"type": "text", "text": "What is the rent?"}]
    asked = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": content}], **more}
    with server.http(key) as http:
        answer = http.post("/v1/messages", json=asked)
        assert answer.status_code == 200, answer.text
        return answer.json().get("usage", {})


def test_what_questions_cost_is_told_by_file_by_day_and_by_model(served, browser):
    _, key = served.workspace("usage told")
    id = put(served, key)
    first, second = ask(served, key, id), ask(served, key, id)
    assert second["cache_read_input_tokens"] > 0
    ask(served, key, id, "free", temperature=0.0)
    with visit(browser, served.url, accept_downloads=True) as seen:
        page = seen.sign_in(key).page
        told = page.locator(".asked-about")
        # What is not read again of the file are tokens of the file: less than of the whole prompt.
        expect(told).to_have_text(re.compile(r"^3 questions, \d+ tokens not read again, 0\.0000\d+ USD saved$"))
        found = int(re.search(r"(\d+) tokens", told.inner_text())[1])
        assert 0 < found <= 2 * second["cache_read_input_tokens"]
        page.get_by_role("link", name="lease.txt").click()
        expect(page.locator(".facts")).to_contain_text(re.compile(r"3 questions, \d+ tokens not read again.*\d+ tokens read"))
        page.get_by_role("link", name="Usage", exact=True).click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Usage of usage told")
        row = page.get_by_role("row", name=re.compile("^tiny"))
        names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        prompts = sum(usage[name] for usage in (first, second) for name in names)
        output = first["output_tokens"] + second["output_tokens"]
        read = first["cache_read_input_tokens"] + second["cache_read_input_tokens"]
        cells = [text.strip() for text in row.locator("td").all_inner_texts()]
        share = f"{read:,} {100 * read / prompts:.0f}%"
        cost = ((prompts - read) * 1.0 + read * 0.1 + output * 5.0) / 1e6
        assert cells[1:5] == ["2", f"{prompts:,}", share, f"{output:,}"]
        assert float(cells[5].split()[0]) == pytest.approx(cost, abs=1e-6)
        assert float(cells[6].split()[0]) == pytest.approx(read * 0.9 / 1e6, abs=1e-6)
        expect(page.get_by_role("row", name=re.compile("^free"))).to_contain_text("–")
        expect(page.locator("main")).to_contain_text(
            "tiny: input 1, cached 0.1, output 5, trained 2, an hour of a device 4 USD, as of 2026-11-22"
        )
        with page.expect_download() as download:
            page.get_by_role("link", name="JSON").click()
        whole = json.loads(Path(download.value.path()).read_text())
        assert [(found["model"], found["requests"]) for found in whole["models"]] == [("tiny", 2), ("free", 1)]
        with page.expect_download() as download:
            page.get_by_role("link", name="CSV").click()
        lines = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
        assert {line["model"]: line["cache_read_input_tokens"] for line in lines}["tiny"] == str(read)
        assert violations(page) == []


def test_a_reply_that_is_cut_off_a_file_read_ahead_and_a_streamed_reply_are_counted(served):
    _, key = served.workspace("usage cut")
    id = put(served, key, text=TEXT * 3)
    with served.http(key) as http:
        warmed = http.post(f"/v1/files/{id}/warm", json={"model": "tiny"}).json()["usage"]
        asked = {"model": "tiny", "max_tokens": 60, "stream": True}
        document = {"type": "document", "source": {"type": "file", "file_id": id}}
        asked["messages"] = [{"role": "user", "content": [document, {"type": "text", "text": "Tell."}]}]
        with http.stream("POST", "/v1/messages", json=asked) as answer:
            next(answer.iter_lines())
    ledger = served.app.state.models.ledger
    served.run(ledger.flush())
    found = served.run(token_ledger.of_files(served.store.database, [id]))[id]["tiny"]
    assert found.cache_creation > 0
    assert found.cache_creation <= warmed["cache_creation_input_tokens"]
    assert found.questions <= 1  # the cut-off reply is counted as soon as its engine has let go


def test_members_see_their_workspace_users_their_own_and_admins_all(served, browser):
    workspace, key = served.workspace("usage members")
    other, others = served.workspace("usage others")
    ask(served, key, put(served, key))
    ask(served, others, put(served, others))
    ann = served.new_key(workspace.id, user_id="ann")
    with visit(browser, served.url, java_script_enabled=False) as seen:
        page = seen.sign_in(ann).page
        page.get_by_role("link", name="Usage", exact=True).click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Usage of ann in usage members")
        expect(page.locator("main")).to_contain_text("No question yet.")
        assert page.get_by_label("Of", exact=True).count() == 0
    with visit(browser, served.url, expected=("403",)) as seen:
        page = seen.sign_in(key).page
        page.goto(served.url + "/usage?of=all")
        expect(page.get_by_role("heading", level=1)).to_have_text("Forbidden")
        page.goto(served.url + "/usage?days=7")
        assert other.name not in page.content()
    admin = served.new_key(None, rights=RIGHTS)
    with visit(browser, served.url) as seen:
        page = seen.sign_in(admin).page
        page.goto(served.url + "/usage")
        page.get_by_label("Of", exact=True).select_option("all workspaces")
        page.get_by_role("button", name="Show").click()
        for name in (workspace.name, other.name):
            expect(page.get_by_role("row", name=re.compile(f"^{name}"))).to_have_count(1)
        assert violations(page) == []


def test_trainings_are_counted_beside_questions(served):
    import httpx

    _, key = served.workspace("usage of trainings")
    runner = served.app.state.jobs
    options, runner.options = runner.options, replace(runner.options, at_once=0)
    served.app.state.registry.publish_base("tiny", served.data / "tiny")

    async def ended(id):
        values = {"state": "failed", "tries": 1, "trained_tokens": 3_000_000, "device_time": 5400_000_000, "finished_at": now()}
        async with served.store.database.writing() as connection:
            await connection.execute(update(jobs).where(jobs.c.id == id).values(values))

    with served.http(key) as http:
        row = json.dumps({"messages": [{"role": "user", "content": "Due?"}, {"role": "assistant", "content": "May"}]})
        file = http.post("/v1/files", files={"file": ("rows.jsonl", row + "\n")}).json()["id"]
        served.run(ended(http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file}).json()["id"]))
    runner.options = options
    with httpx.Client(base_url=served.url, headers={"origin": served.url}, follow_redirects=True) as http:
        token = re.search(r'name="csrf" value="([^"]+)"', http.get("/login").text)[1]
        http.post("/login", data={"csrf": token, "key": key})
        said = re.sub(r"<[^>]+>", " ", http.get("/usage").text)
        told = http.get("/usage/json").json()["total"]
        lines = list(csv.DictReader(http.get("/usage/csv").text.splitlines()))
    # Three million tokens at 2 a million, and an hour and a half at 4.
    assert (told["jobs"], told["trained_tokens"], told["device_seconds"]) == (1, 3_000_000, 5400.0)
    assert told["training_cost"] == {"USD": 12.0}
    assert re.search(r"Tokens trained\s+3,000,000\s+Device time\s+90 min\s+Cost of jobs\s+12.00 USD", said)
    assert re.search(r"tiny\s.*1\s+3,000,000\s+90 min\s+12.00 USD", said, re.DOTALL)
    assert "trained 2, an hour of a device 4 USD" in said
    stored, trained = sorted(lines, key=lambda line: line["model"])
    assert (int(stored["stored_bytes"]), trained["training_cost"]) == (len(row) + 1, "12.00000000")


@pytest.mark.parametrize("query", ["days=x", "days=0", "days=99999", "days=-1"])
def test_days_that_are_none_are_told(served, query):
    import httpx

    _, key = served.workspace(f"usage {query}")
    with httpx.Client(base_url=served.url, headers={"origin": served.url}, follow_redirects=True) as http:
        token = re.search(r'name="csrf" value="([^"]+)"', http.get("/login").text)[1]
        http.post("/login", data={"csrf": token, "key": key})
        answer = http.get(f"/usage?{query}")
        assert answer.status_code == 400
        assert re.search("[Dd]ays:", answer.text)


def test_the_picture_of_the_docs(served, browser, tmp_path, monkeypatch):
    """With SCREENSHOTS=docs, the one that the docs show: a month of questions, as the ledger would have added them up."""
    workspace, key = served.workspace("Claims", limit_bytes=10_000_000)
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    id = put(served, key, "Lease.md", TEXT * 2000)
    ledger, caller = served.app.state.models.ledger, Caller("", workspace.id, None)
    today = datetime.now(UTC).date()

    async def a_month() -> None:
        for back, questions in enumerate((46, 61, 12, 0, 38, 52, 44, 7, 71, 58)):
            with monkeypatch.context() as patch:
                patch.setattr(token_ledger, "today", lambda day=today - timedelta(days=back): day.isoformat())
                for n in range(questions):
                    model = "tiny" if n % 4 else "free"
                    spent = Spent(38 + n, 16_402 if n % 16 == 0 else 210, 0 if n % 16 == 0 else 16_192, 180 + 3 * n)
                    share = FileTokens(1, 16_380 if n % 16 == 0 else 0, 0 if n % 16 == 0 else 16_180)
                    ledger.add(caller, model, spent, {id: share})
        await ledger.flush()

    served.run(a_month())
    with visit(browser, served.url, device_scale_factor=1.5, viewport={"width": 1240, "height": 1120}) as seen:
        page = seen.sign_in(key).page
        expect(page.locator(".asked-about")).to_contain_text("389 questions")
        page.get_by_role("link", name="Usage", exact=True).click()
        expect(page.get_by_role("row", name=re.compile("^tiny"))).to_have_count(1)
        page.screenshot(path=folder / "usage-page.png")
    with Image.open(folder / "usage-page.png") as picture:
        picture.convert("RGB").quantize(192).save(folder / "usage-page.png", optimize=True)
