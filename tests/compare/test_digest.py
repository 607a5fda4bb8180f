"""The weekly digest: what is in it, who gets it, that nobody gets it twice, and that it ends with one click."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.headerregistry import Address
from pathlib import Path

import pytest
import time_machine
from sqlalchemy import insert, select, update

from compare.smtp_server import mail_server
from compare.votable import votable
from ropewalk.compare.digest import Digest, Item, due, preview
from ropewalk.compare.digest_mail import html_of, subject_of, text_of
from ropewalk.compare.digest_sending import Sent, send_due
from ropewalk.compare.mail import Mailer, compose
from ropewalk.compare.records import save_verdicts
from ropewalk.compare.state import State
from ropewalk.compare.subscribers import confirm, list_subscribers, subscribe, unsubscribe
from ropewalk.compare.tables import digest_sendings, digests, promotions, subscribers
from ropewalk.compare.verdict import Interval, Verdict
from ropewalk.compare.voters import who
from ropewalk.compare.votes import cast, next_ticket
from ropewalk.config.mail import Mail, configured_mail, read_mail
from ropewalk.database import now
from ropewalk.errors import BadInput, ConfigError, MailFailed, NotFound, RateLimited
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.tenants.workspaces import create_workspace

URL = "https://ropewalk.test"
HEMP = Mail(sender="Ropewalk <digest@ropewalk.test>", url=URL, security="none", seconds=5.0)
WEDNESDAY = datetime(2026, 11, 18, 12, tzinfo=UTC)
MONDAY = datetime(2026, 11, 23, 7, 30, tzinfo=UTC)


def spooled(folder):
    """A mailer into a folder, and what lies there."""
    read = lambda path: message_from_bytes(path.read_bytes(), policy=policy.default)
    return Mailer(replace(HEMP, spool=str(folder))), lambda: [
        read(path) for path in sorted(folder.glob("*.eml"), key=os.path.getmtime)
    ]


@pytest.fixture
def here(tmp_path):
    """As `opened`, on SQLite alone: what it tests asks no question that databases answer differently."""
    return lambda body: asyncio.run(_whole(body, Settings(data=tmp_path / "data")))


async def _whole(body, settings):
    store = await Store.open(settings)
    try:
        await body(store, await store.local_caller())
    finally:
        await store.close()


def token_in(message):
    return re.search(r"token=([\w-]+)", message.get_body(("plain",)).get_content())[1]


async def subscribed(store, caller, mailer, mails, address):
    """An address that has asked and confirmed; the token of its confirmation."""
    await subscribe(store, caller, mailer, address)
    token = token_in(mails()[-1])
    await confirm(store, token)
    return token


def verdict(comparison, state=State.SHIP):
    (candidate,) = comparison.candidate_ids
    return Verdict(candidate, comparison.baseline_id, state, (), "1", Interval(0.068, 0.029, 0.107))


async def week_of_news(store, caller, title="support-bot"):
    """A comparison that was decided on Wednesday."""
    with time_machine.travel(WEDNESDAY, tick=True):
        comparison = await votable(store, caller, count=3, title=title)
        await save_verdicts(store, caller, comparison.id, [verdict(comparison)], b"evidence")
    return comparison


async def promoted(store, caller, comparison, **more):
    row = {"id": "promo_1", "workspace_id": caller.workspace_id, "alias": "answers", "from_name": "rope-seven"}
    row |= {
        "to_name": "hemp-nine",
        "to_digest": "",
        "comparison_id": comparison.id,
        "rule_version": "1",
        "by": "me",
        "replay": "{}",
    }
    async with store.database.writing() as connection:
        await connection.execute(insert(promotions).values(row | {"created_at": now(), **more}))


# -- what is in it


def test_a_digest_tells_verdicts_ships_rollbacks_changed_suites_and_votes_that_wait(opened):
    async def body(store, caller):
        comparison = await votable(store, caller, count=3, title="support-bot")
        assert (await preview(store, caller)).of("verdict") == []
        await save_verdicts(store, caller, comparison.id, [verdict(comparison, State.SKIP)], b"first")
        await save_verdicts(store, caller, comparison.id, [verdict(comparison)], b"second")
        await promoted(store, caller, comparison, rolled_back_at=now(), override_reason="the fair is tomorrow")
        await votable(store, caller, count=5, title="another")  # on a newer suite of the same name
        found = await preview(store, caller)
        said = {(item.kind, item.title): item.sentence for item in found.items}
        assert said["verdict", "support-bot"] == "SHIP: hemp-nine, +6.8 points (95 %: +2.9 to +10.7)"
        assert said["shipped", "answers"] == "answers now serves hemp-nine, against the verdict's leave: the fair is tomorrow"
        assert said["rolled_back", "answers"] == "answers was taken back from hemp-nine to rope-seven"
        assert said["changed", "support-bot"] == "decided on 3 prompts of support, which now has 5: run it again"
        assert {title for kind, title in said if kind == "vote"} == {"support-bot", "another"}
        assert found.news

    opened(body)


def test_a_reader_is_told_of_what_they_may_see_and_of_votes_they_have_not_cast(here):
    async def body(store, caller):
        ann, ben = replace(caller, user_id="ann"), replace(caller, user_id="ben")
        comparison = await votable(store, ann, count=2, title="ann's")
        assert [item.title for item in (await preview(store, ann)).of("vote")] == ["ann's"]
        assert (await preview(store, ben)).items == ()
        elsewhere = replace(caller, workspace_id=(await create_workspace(store.database, store.vault, "other")).id)
        assert (await preview(store, elsewhere)).items == ()
        while (ticket := await next_ticket(store, ann, comparison.id, who(ann))) is not None:
            await cast(store, ann, ticket.token, "same", 10)
        assert (await preview(store, ann)).items == ()
        assert len((await preview(store, caller)).of("vote")) == 1

    here(body)


def test_what_waits_for_a_vote_since_another_week_is_no_news():
    old = Item("vote", "cmp_1", "old", "waits", new=False)
    quiet = Digest("2026-W47", 0, 1, (old,))
    assert not quiet.news
    for told in (text_of(quiet, URL, ""), html_of(quiet, URL, "")):
        assert "nothing would be sent" in told
    assert Digest("2026-W47", 0, 1, (old, Item("verdict", "cmp_1", "new", "SHIP"))).news


@pytest.mark.parametrize(
    ("moment", "settings", "week", "since", "until"),
    [
        ("2026-11-23T06:59:59", (0, 7), "2026-W46", "2026-11-09", "2026-11-16"),
        ("2026-11-23T07:00:00", (0, 7), "2026-W47", "2026-11-16", "2026-11-23"),
        ("2026-11-29T23:59:59", (0, 7), "2026-W47", "2026-11-16", "2026-11-23"),
        ("2027-01-04T08:00:00", (0, 7), "2026-W53", "2026-12-28", "2027-01-04"),
        ("2026-11-23T07:00:00", (4, 0), "2026-W47", "2026-11-13", "2026-11-20"),
    ],
)
def test_a_week_is_due_once_its_day_and_hour_have_come(moment, settings, week, since, until):
    at = lambda text: int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6)
    assert due(at(moment), *settings) == (week, at(since), at(until))


def test_what_people_wrote_is_escaped_and_makes_no_lines_of_its_own():
    nasty = "<script>alert(1)</script>\r\nBcc: all@example.org"
    digest = Digest("2026-W47", 1_763_251_200_000_000, 1_763_856_000_000_000, (Item("verdict", "cmp_1", nasty, nasty),))
    html, text = html_of(digest, URL, f"{URL}/leave"), text_of(digest, URL, f"{URL}/leave")
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "* <script>alert(1)</script> Bcc: all@example.org\n" in text
    assert subject_of(digest) == "Ropewalk 2026-W47: 1 new verdict"
    assert "16 to 22 November 2025" in text
    message = compose(HEMP, "ann@example.org", subject_of(digest), text, html)
    assert "Bcc" not in message
    with pytest.raises(ValueError, match="linefeed"):
        compose(HEMP, "ann@example.org", nasty, text, html)


# -- who gets it


def test_nobody_gets_anything_who_has_not_confirmed(here, tmp_path):
    mailer, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        await week_of_news(store, caller)
        with time_machine.travel(WEDNESDAY, tick=True):
            await subscribe(store, caller, mailer, "Ann@Example.org")
            (question,) = mails()
            assert question["To"] == "Ann@example.org"
            assert "List-Unsubscribe" not in question
            assert (await list_subscribers(store, caller))[0].state == "pending"
        with time_machine.travel(MONDAY, tick=True):
            assert await send_due(store, mailer) == Sent()
            assert len(mails()) == 1

    here(body)


def test_who_confirmed_gets_one_mail_with_both_forms_and_a_way_out_in_its_head(opened, tmp_path):
    mailer, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        comparison = await week_of_news(store, caller, title="Is <b>it</b> better?")
        with time_machine.travel(WEDNESDAY, tick=True):
            token = await subscribed(store, caller, mailer, mails, "ann@example.org")
            await confirm(store, token)  # a second click
            await subscribe(store, caller, mailer, "ann@example.org")  # who gets it already is asked nothing
            assert len(mails()) == 1
        with time_machine.travel(MONDAY, tick=True):
            assert await send_due(store, mailer) == Sent(sent=1)
            assert await send_due(store, mailer) == Sent()
        _, digest = mails()
        assert digest["Subject"] == "Ropewalk 2026-W47: 1 new verdict, 1 waiting for your vote"
        assert digest["From"] == "Ropewalk <digest@ropewalk.test>"
        assert digest["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        leave = digest["List-Unsubscribe"]
        assert leave.startswith(f"<{URL}/digest/unsubscribe?token=")
        raw = max((tmp_path / "mail").glob("*.eml"), key=os.path.getmtime).read_bytes()
        assert f"\r\nList-Unsubscribe: {leave}\r\n".encode() in raw  # on one line, and not in code
        text, html = (digest.get_body((kind,)).get_content() for kind in ("plain", "html"))
        assert leave[1:-1] in text
        assert f"{URL}/compare/{comparison.id}/vote" in text
        assert "Is &lt;b&gt;it&lt;/b&gt; better?" in html
        async with store.database.reading() as connection:
            row = (await connection.execute(select(subscribers))).mappings().one()
        kept = b"".join(value if isinstance(value, bytes) else str(value).encode() for value in row.values())
        for secret in (token, leave.partition("token=")[2].rstrip(">"), "ann@example.org"):
            assert secret.encode() not in kept

    opened(body)


def test_where_nothing_changed_nothing_is_sent(here, tmp_path):
    mailer, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        with time_machine.travel(WEDNESDAY, tick=True):
            await subscribed(store, caller, mailer, mails, "ann@example.org")
        with time_machine.travel(MONDAY, tick=True):
            assert await send_due(store, mailer) == Sent(nothing=1)
            await week_of_news(store, caller)  # told late, and not of this digest any more
            assert await send_due(store, mailer) == Sent()
        assert len(mails()) == 1

    here(body)


def test_one_click_ends_it_and_erases_the_address(here, tmp_path):
    mailer, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        await week_of_news(store, caller)
        with time_machine.travel(WEDNESDAY, tick=True):
            asked = await subscribed(store, caller, mailer, mails, "ann@example.org")
        with time_machine.travel(MONDAY, tick=True):
            await send_due(store, mailer)
            token = token_in(mails()[-1])
            for _ in range(2):
                await unsubscribe(store, token)
            for wrong in ("", "nothing", asked):
                with pytest.raises(NotFound):
                    await unsubscribe(store, wrong)
            with pytest.raises(NotFound):
                await confirm(store, asked)
            async with store.database.reading() as connection:
                row = (await connection.execute(select(subscribers))).one()
            assert (row.state, row.sealed_mail) == ("gone", None)
            assert await list_subscribers(store, caller) == []
        with time_machine.travel(MONDAY.replace(day=30), tick=True):
            assert await send_due(store, mailer) == Sent()
            await subscribed(store, caller, mailer, mails, "ann@example.org")  # who comes back is welcome
            await unsubscribe(store, token)  # and the link of an old mail works

    here(body)


def test_a_confirmation_that_comes_too_late_is_none(here, tmp_path):
    mailer, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        with time_machine.travel(WEDNESDAY, tick=True):
            await subscribe(store, caller, mailer, "ann@example.org")
            with pytest.raises(RateLimited):
                await subscribe(store, caller, mailer, "ANN@example.org")
        with time_machine.travel(MONDAY, tick=True):
            with pytest.raises(NotFound):
                await confirm(store, token_in(mails()[0]))
            await send_due(store, mailer)
            assert await list_subscribers(store, caller) == []

    here(body)


@pytest.mark.parametrize(
    "address", ["", "ann", "ann@", "@example.org", "a b@example.org", "ann@example.org\nBcc: x@y.z", "<ann@example.org>", "ann@exa_mple.org",
                "ann@example.org,ben@example.org", "é@example.org", f"{'a' * 300}@example.org"]
)  # fmt: skip
def test_what_is_no_address_is_asked_nothing(here, tmp_path, address):
    mailer, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        with pytest.raises(BadInput, match="no mail address"):
            await subscribe(store, caller, mailer, address)
        with pytest.raises(BadInput, match="sends no mail"):
            await subscribe(store, caller, None, "ann@example.org")
        assert mails() == []

    here(body)


def test_strangers_are_not_flooded(here, tmp_path, monkeypatch):
    mailer, mails = spooled(tmp_path / "mail")
    monkeypatch.setattr("ropewalk.compare.subscribers.MOST_PENDING", 3)

    async def body(store, caller):
        for number in range(3):
            await subscribe(store, caller, mailer, f"stranger{number}@example.org")
        with pytest.raises(RateLimited):
            await subscribe(store, caller, mailer, "stranger@example.org")
        assert len(mails()) == 3

    here(body)


# -- a mail server


def with_server(body):
    with mail_server() as server:
        asyncio.run(body(server, Mailer(replace(HEMP, host="127.0.0.1", port=server.port))))


def letter(to="ann@example.org"):
    return compose(HEMP, to, "Subject", "Text.\n.\n..dots\n", "<p>é</p>", f"{URL}/leave?token=x")


def test_a_mail_server_takes_a_mail_as_it_was_written():
    async def body(server, mailer):
        await mailer.send(letter())
        (taken,) = server.taken
        assert server.to == ["ann@example.org"]
        assert taken["To"].addresses == (Address(addr_spec="ann@example.org"),)
        assert taken.get_body(("plain",)).get_content().splitlines() == ["Text.", ".", "..dots"]
        assert taken.get_body(("html",)).get_content().strip() == "<p>é</p>"
        assert taken["List-Unsubscribe"] == f"<{URL}/leave?token=x>"
        assert taken["Auto-Submitted"] == "auto-generated"
        assert taken["Message-ID"].endswith("@ropewalk.test>")

    with_server(body)


@pytest.mark.parametrize(
    ("command", "answer", "again"),
    [
        ("MAIL", b"451 later", True),
        ("RCPT", b"450 busy", True),
        ("RCPT", b"550 nobody", False),
        ("DATA", b"452 full", True),
        ("END", b"451 later", True),
        ("END", b"554 spam", False),
        ("MAIL", b"", True),  # it hung up before it had anything
        ("END", b"", False),  # it hung up and may have taken it
    ],
)
def test_whether_a_mail_that_was_not_taken_is_tried_again(command, answer, again):
    async def body(server, mailer):
        server.answers[command] = [answer]
        with pytest.raises(MailFailed) as caught:
            await mailer.send(letter())
        assert caught.value.again is again
        assert f"127.0.0.1:{server.port}" in str(caught.value)

    with_server(body)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate and its key, in files."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_password_goes_under_tls_to_a_server_that_is_who_it_says(certificate, monkeypatch, security):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    monkeypatch.setenv("SMTP_WORD", "s3cret")
    with mail_server(context, from_the_first_byte=security == "tls") as server:
        own = {"host": "127.0.0.1", "port": server.port, "security": security, "user": "me", "password_env": "SMTP_WORD"}
        mailer = Mailer(replace(HEMP, **own))
        with pytest.raises(MailFailed, match="certificate") as caught:
            asyncio.run(mailer.send(letter()))
        assert caught.value.again
        assert server.credentials == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        asyncio.run(mailer.send(letter()))
        assert server.credentials == ["\0me\0s3cret"]
        assert server.to == ["ann@example.org"]
        server.answers["AUTH"] = [b"535 wrong"]
        with pytest.raises(MailFailed, match="535 wrong") as caught:
            asyncio.run(mailer.send(letter()))
        assert "s3cret" not in str(caught.value)


def test_a_mail_server_that_is_not_there_is_asked_again_and_one_without_tls_is_told_nothing():
    async def body(server, mailer):
        with pytest.raises(MailFailed, match="cannot be reached"):
            await Mailer(replace(mailer.settings, port=1)).send(letter())
        with pytest.raises(MailFailed, match="STARTTLS") as caught:
            await Mailer(replace(mailer.settings, security="starttls")).send(letter())
        assert caught.value.again
        assert "MAIL" not in server.commands

    with_server(body)


def test_a_mail_that_failed_is_sent_an_hour_later_and_to_nobody_twice(opened, tmp_path):
    spool, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        with mail_server() as server:
            mailer = Mailer(replace(HEMP, host="127.0.0.1", port=server.port))
            await week_of_news(store, caller)
            with time_machine.travel(WEDNESDAY, tick=True):
                for name in ("ann", "ben", "cat"):
                    await subscribed(store, caller, spool, mails, f"{name}@example.org")
            server.answers["RCPT"] = [b"250 fine", b"451 later", b"550 nobody"]
            with time_machine.travel(MONDAY, tick=True):
                assert await send_due(store, mailer) == Sent(sent=1, failed=1, refused=1)
                assert await send_due(store, mailer) == Sent()
            with time_machine.travel(MONDAY.replace(hour=8, minute=31), tick=True):
                assert await send_due(store, mailer) == Sent(sent=1)
                assert await send_due(store, mailer) == Sent()
            assert len(server.to) == len(set(server.to)) == 2
            async with store.database.reading() as connection:
                rows = (await connection.execute(select(digest_sendings.c.state, digest_sendings.c.tries))).all()
                assert sorted(tuple(row) for row in rows) == [("refused", 1), ("sent", 1), ("sent", 2)]
                assert (await connection.execute(select(digests.c.sent_at))).scalar_one() is not None

    opened(body)


def test_a_mail_server_that_is_away_is_left_in_peace_for_an_hour(here, tmp_path):
    spool, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        with mail_server() as server:
            mailer = Mailer(replace(HEMP, host="127.0.0.1", port=server.port))
            await week_of_news(store, caller)
            with time_machine.travel(WEDNESDAY, tick=True):
                for number in range(5):
                    await subscribed(store, caller, spool, mails, f"reader{number}@example.org")
            server.answers["MAIL"] = [b"421 away"] * 3
            with time_machine.travel(MONDAY, tick=True):
                assert await send_due(store, mailer) == Sent(failed=3)
                assert await send_due(store, mailer) == Sent()
            with time_machine.travel(MONDAY.replace(hour=9), tick=True):
                assert await send_due(store, mailer) == Sent(sent=5)
            assert len(set(server.to)) == 5

    here(body)


SENDER = """
import asyncio, sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
import time_machine
from ropewalk.compare.digest_sending import send_due
from ropewalk.compare.mail import Mailer
from ropewalk.config.mail import Mail
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store

async def main():
    store = await Store.open(Settings(data=Path(sys.argv[1]), database_url=sys.argv[3] or None))
    mail = Mail(sender="digest@ropewalk.test", url="https://ropewalk.test", host="127.0.0.1", port=int(sys.argv[2]), security="none")
    with time_machine.travel(datetime(2026, 11, 23, 7, 30, tzinfo=UTC), tick=True):
        print("ready", flush=True)
        sys.stdin.readline()
        print((await send_due(store, Mailer(mail))).sent)
    await store.close()

asyncio.run(main())
"""


def test_of_two_processes_one_sends(opened, settings, tmp_path):
    spool, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        await week_of_news(store, caller)
        with time_machine.travel(WEDNESDAY, tick=True):
            for number in range(4):
                await subscribed(store, caller, spool, mails, f"reader{number}@example.org")

    opened(body)
    with mail_server() as server:
        arguments = [sys.executable, "-c", SENDER, str(settings.data), str(server.port), settings.database_url or ""]
        begin = lambda: subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes = [begin(), begin()]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        sent = [process.communicate(timeout=60)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes)
        assert sorted(map(int, sent)) == [0, 4]
        assert sorted(server.to) == [f"reader{number}@example.org" for number in range(4)]


def test_a_process_that_died_with_a_mail_in_its_hand_leaves_the_others_to_the_next(here, tmp_path):
    spool, mails = spooled(tmp_path / "mail")

    async def body(store, caller):
        await week_of_news(store, caller)
        with time_machine.travel(WEDNESDAY, tick=True):
            for number in range(3):
                await subscribed(store, caller, spool, mails, f"reader{number}@example.org")

    here(body)
    with mail_server() as server:
        arguments = [sys.executable, "-c", SENDER, str(tmp_path / "data"), str(server.port), ""]
        dying = dict(os.environ, ROPEWALK_FAILPOINT="digest.sent:2")
        done = subprocess.run(arguments, input="\n", capture_output=True, text=True, env=dying, timeout=60)
        assert done.returncode == -9
        assert len(server.to) == 2

        async def go_on(store, caller):
            with time_machine.travel(MONDAY, tick=True):
                mailer = Mailer(replace(HEMP, host="127.0.0.1", port=server.port))
                assert await send_due(store, mailer) == Sent()  # the dead one's lease still holds
                async with store.database.writing() as connection:
                    await connection.execute(update(digests).values(lease_until=0))
                assert await send_due(store, mailer) == Sent(sent=1)

        here(go_on)
        assert len(set(server.to)) == 3
        assert len(server.to) == 3


# -- how the server is told


GOOD = {"from": "Ropewalk <digest@example.org>", "url": "https://ropewalk.example.org/", "host": "smtp.example.org"}


def written(tmp_path, **values):
    path = tmp_path / "mail.yml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in values.items() if value is not None), encoding="utf-8")
    return path


def test_the_file_in_the_docs_can_be_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "votes.md").read_text(encoding="utf-8")
    (tmp_path / "mail.yml").write_text(text.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    mail = read_mail(tmp_path / "mail.yml")
    assert (mail.host, mail.digest_hour, mail.password_env) == ("smtp.example.org", 7, "SMTP_PASSWORD")


def test_the_file_says_how_mail_is_sent(tmp_path, monkeypatch):
    mail = read_mail(written(tmp_path, **GOOD))
    assert (mail.host, mail.port, mail.security, mail.url) == (
        "smtp.example.org",
        587,
        "starttls",
        "https://ropewalk.example.org",
    )
    assert mail.address == Address("Ropewalk", addr_spec="digest@example.org")
    assert read_mail(written(tmp_path, **GOOD, security="tls")).port == 465
    spool = read_mail(written(tmp_path, **GOOD | {"host": None, "spool": "out", "digest_day": "friday"}))
    assert (spool.spool, spool.weekday) == (str(tmp_path / "out"), 4)
    assert configured_mail() is None
    monkeypatch.setenv("ROPEWALK_MAIL", str(written(tmp_path, **GOOD)))
    assert configured_mail() == mail
    with pytest.raises(BadInput, match="SMTP_WORD"):
        Mailer(replace(mail, user="me", password_env="SMTP_WORD"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"from": "nobody"}, "from is 'nobody'"),
        ({"from": None}, "from is ''"),
        ({"sender": "a@b.c"}, "did you mean 'from'"),
        ({"url": "ropewalk.example.org"}, "url is"),
        ({"host": None}, "one of host"),
        ({"spool": "out"}, "one of host"),
        ({"security": "ssl"}, "starttls, tls, none"),
        ({"port": 70_000}, "1 to 65535"),
        ({"port": "x"}, "a whole number"),
        ({"user": "me"}, "together"),
        ({"user": "me", "password_env": "p w"}, "no name of an environment variable"),
        ({"user": "me", "password_env": "P", "security": "none"}, "in the clear"),
        ({"digest_day": "someday"}, "monday"),
        ({"digest_hour": 24}, "0 to 23"),
        ({"seconds": 0}, "seconds is 0"),
        ({"hosts": "x"}, "did you mean 'host'"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_with_its_line(tmp_path, change, told):
    with pytest.raises(ConfigError, match=told):
        read_mail(written(tmp_path, **GOOD | change))
