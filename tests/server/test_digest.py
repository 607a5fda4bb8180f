"""The links of the digest's mails: opening one changes nothing, the form behind it does, and a mail program's click needs no key."""

from __future__ import annotations

import re
import time
from email import message_from_bytes, policy

import httpx
import pytest
from sqlalchemy import delete, update

from compare.votable import votable
from ropewalk.cli import main
from ropewalk.compare.digest import due
from ropewalk.compare.records import save_verdicts
from ropewalk.compare.state import State
from ropewalk.compare.subscribers import leave_token, list_subscribers, subscribe
from ropewalk.compare.tables import digest_sendings, digests, subscribers, verdicts
from ropewalk.compare.verdict import Verdict
from ropewalk.config.mail import Mail
from ropewalk.database import now
from ropewalk.server.settings import ServerSettings
from server.conftest import wait_until

URL = "https://ropewalk.test"


@pytest.fixture
def posting(start, tmp_path):
    """A server that writes its mails into a folder."""
    mail = Mail(sender="digest@ropewalk.test", url=URL, spool=str(tmp_path / "mail"))
    with start(ServerSettings(mail=mail, digest_seconds=0.2)) as server:
        yield server


def asked(server, folder):
    """An address that was asked; the token that it was sent."""
    caller = server.run(server.store.local_caller())
    server.run(subscribe(server.store, caller, server.app.state.mailer, "ann@example.org"))
    (path,) = folder.glob("*.eml")
    text = message_from_bytes(path.read_bytes(), policy=policy.default).get_body(("plain",)).get_content()
    return caller, re.search(rf"{URL}(/digest/confirm\?token=[\w-]+)", text)[1]


def state(server, caller):
    return [(one.id, one.state) for one in server.run(list_subscribers(server.store, caller))]


def test_links_ask_and_forms_do_without_a_key(posting, tmp_path):
    caller, link = asked(posting, tmp_path / "mail")
    with httpx.Client(base_url=posting.url) as client:
        shown = client.get(link)
        assert shown.status_code == 200
        assert 'method="post"' in shown.text
        assert f'action="{link}"' in shown.text.replace("&#39;", "'")
        assert "set-cookie" not in shown.headers
        assert shown.headers["referrer-policy"] == "same-origin"
        ((id, now),) = state(posting, caller)
        assert now == "pending"
        done = client.post(link)
        assert "You will get the digest" in done.text
        assert state(posting, caller) == [(id, "active")]
        leave = f"/digest/unsubscribe?token={leave_token(posting.store, id)}"
        assert "Unsubscribe" in client.get(leave).text
        assert state(posting, caller) == [(id, "active")]
        # As RFC 8058 has mail programs do it: from nowhere, without cookies, in a form of either kind, and with no redirect.
        one_click = {"List-Unsubscribe": "One-Click"}
        for form in ({"data": one_click}, {"files": {name: (None, value) for name, value in one_click.items()}}):
            done = client.post(leave, **form)
            assert (done.status_code, "You are unsubscribed" in done.text) == (200, True)
        assert state(posting, caller) == []


def test_a_token_that_is_none_is_told_so_and_nothing_more(posting, tmp_path):
    _, link = asked(posting, tmp_path / "mail")
    with httpx.Client(base_url=posting.url) as client:
        for path in ("/digest/confirm", "/digest/unsubscribe"):
            told = {
                (answer.status_code, re.sub("[0-9a-f]{32}", "", answer.text))
                for token in ("", "x", "é", "x" * 5000, "<script>", "\0", link.partition("=")[2][:-1])
                for answer in [client.post(path, params={"token": token})]
            }
            assert len(told) == 1
            assert told.pop()[0] == 404
            assert "<script>x" not in client.get(path, params={"token": '"><script>x'}).text
        assert client.post("/digest/confirm", content=b"x" * 20_000).status_code == 413


def test_without_a_way_to_send_mail_the_server_sends_none(server):
    assert server.app.state.mailer is None
    assert httpx.post(f"{server.url}/digest/confirm?token=x").status_code == 404


def test_the_server_sends_the_digest_by_itself_once(posting, tmp_path):
    folder = tmp_path / "mail"
    caller, link = asked(posting, folder)
    httpx.post(posting.url + link)

    async def last_week():
        comparison = await votable(posting.store, caller, count=2, title="support-bot")
        (candidate,) = comparison.candidate_ids
        given = Verdict(candidate, comparison.baseline_id, State.TIE, (), "1")
        await save_verdicts(posting.store, caller, comparison.id, [given], b"evidence")
        _, since, _ = due(now())
        async with posting.store.database.writing() as connection:
            await connection.execute(delete(digest_sendings))
            await connection.execute(delete(digests))  # a round may have been faster than this test
            await connection.execute(update(verdicts).values(created_at=since))
            await connection.execute(update(subscribers).values(confirmed_at=since))

    posting.run(last_week())
    wait_until(lambda: len(list(folder.glob("*.eml"))) == 2)
    time.sleep(0.7)  # three more rounds
    newest = max(folder.glob("*.eml"), key=lambda path: path.stat().st_mtime_ns)
    assert len(list(folder.glob("*.eml"))) == 2
    assert b"TIE: hemp-nine" in newest.read_bytes()


def test_a_file_that_says_wrongly_how_mail_is_sent_stops_the_server_before_it_listens(tmp_path, capsys, monkeypatch):
    (tmp_path / "mail.yml").write_text("from: digest@ropewalk.test\nurl: nowhere\nspool: mail\n", encoding="utf-8")
    assert main(["serve", "--mail", str(tmp_path / "mail.yml")]) == 2
    assert "mail.yml:2: url is 'nowhere'" in capsys.readouterr().err
    monkeypatch.setenv("ROPEWALK_MAIL", str(tmp_path / "none.yml"))
    assert main(["serve"]) == 2
    assert "none.yml" in capsys.readouterr().err
