"""The pages of jobs in a real browser: the list, and a job whose loss, log and state are looked at again while it is open."""

import json
import secrets
from dataclasses import replace

import pytest
from sqlalchemy import update

from browser import violations, visit
from ropewalk.database import now
from ropewalk.jobs.ledger import Told
from ropewalk.jobs.tables import jobs
from ropewalk.tenants.caller import Caller

LOSSES = [3.0, 2.0, 1.5, 1.25]


@pytest.fixture
def waiting(asked):
    """A key, and a job in its workspace that nobody runs but this test."""
    runner = asked.app.state.jobs
    options, runner.options = runner.options, replace(runner.options, at_once=0)
    _, key = asked.workspace(f"pages of a job {secrets.token_hex(4)}")
    rows = json.dumps({"messages": [{"role": "user", "content": "Due?"}, {"role": "assistant", "content": "May"}]})
    with asked.http(key) as http:
        file = http.post("/v1/files", files={"file": ("lease.jsonl", rows + "\n")}).json()["id"]
        job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file}).json()["id"]
    yield key, job
    runner.options = options


async def trained(runner, id, upto):
    """As if a server had come so far with the job."""
    ledger = runner.ledger
    async with ledger.database.writing() as connection:
        held = {"state": "running", "holder": ledger.holder, "tries": 1, "lease_until": now() + 10**9, "steps": 4}
        await connection.execute(update(jobs).where(jobs.c.id == id).values(held))
        row = (await connection.execute(jobs.select().where(jobs.c.id == id))).one()
    job = await ledger.show(Caller(row.organization_id, row.workspace_id, None), id)
    told = [
        Told(f"step:{n}", f"Step {n}/4: training loss={loss}", "metrics", data={"step": n, "train_loss": loss})
        for n, loss in enumerate(LOSSES[:upto], 1)
    ]
    assert await ledger.tell(job, told, step=upto)
    await ledger.keep_log(job, "step 1/4  loss 3.0000\n")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_job_is_followed_and_cancelled_in_the_browser(asked, waiting, browser, scheme):
    key, id = waiting
    runner = asked.app.state.jobs
    asked.run(trained(runner, id, 2))
    with visit(browser, asked.url, viewport={"width": 360, "height": 740}, color_scheme=scheme) as seen:
        page = seen.page
        page.goto(asked.url + "/jobs")
        seen.sign_in(key)
        page.goto(asked.url + "/jobs")
        assert violations(page) == []
        page.get_by_role("link", name=id[-8:]).click()
        page.get_by_role("heading", level=1).get_by_text("running").wait_for()
        assert page.get_by_role("img", name="Loss by step, between 2 and 3, to step 4").count() == 1
        assert page.get_by_text("step 1/4 loss 3.0000").count() == 1
        assert page.get_by_role("link", name="lease.jsonl").count() == 1
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        asked.run(trained(runner, id, 4))
        page.get_by_text("3.000 to 1.250").wait_for()  # without a click
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("heading", level=1).get_by_text("being cancelled").wait_for()
        assert page.get_by_role("button", name="Cancel").count() == 0


def test_a_failed_job_is_resumed_or_given_up_in_the_browser(asked, waiting, browser):
    key, id = waiting
    runner = asked.app.state.jobs

    async def failed():
        async with runner.ledger.database.writing() as connection:
            values = {
                "state": "failed",
                "error_code": "training_failed",
                "kept_until": now() + 86_400_000_000,
                "finished_at": now(),
            }
            await connection.execute(update(jobs).where(jobs.c.id == id).values(values))

    asked.run(failed())
    with visit(browser, asked.url, viewport={"width": 360, "height": 740}) as seen:
        page = seen.page
        page.goto(asked.url + "/jobs")
        seen.sign_in(key)
        page.goto(f"{asked.url}/jobs/{id}")
        page.get_by_text("Its checkpoints go in 1 day").wait_for()
        assert '"sequence_len": 2048' in page.get_by_role("region", name="Configuration").inner_text()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("button", name="Resume").click()
        page.get_by_role("heading", level=1).get_by_text("queued").wait_for()
        asked.run(failed())
        page.goto(f"{asked.url}/jobs/{id}")
        page.get_by_role("button", name="Give up").click()
        page.get_by_role("heading", level=1).get_by_text("failed").wait_for()
        page.get_by_role("button", name="Resume").wait_for(state="detached")
