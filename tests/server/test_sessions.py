"""Sessions and forms of the pages, byte by byte: cookies, tokens, origins, policies, and whose files are shown."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import Response

from ropewalk.database import now
from ropewalk.server import pages, sessions, visitors, words
from ropewalk.tenants.keys import authenticate, revoke_key
from ropewalk.tenants.quotas import set_limit
from ropewalk.tenants.tables import audit

STATIC = Path(pages.__file__).parent / "static"
TEMPLATES = Path(pages.__file__).parent / "templates"


class Browser(httpx.Client):
    """A client that says what a browser says of where a form comes from."""

    def token(self, path: str = "/login") -> str:
        return re.search(r'name="csrf" value="([^"]+)"', self.get(path).text)[1]

    def send_form(
        self, path: str, token: str | None = None, headers: dict[str, str] | None = None, **fields: str
    ) -> httpx.Response:
        own = {"origin": str(self.base_url).rstrip("/"), "sec-fetch-site": "same-origin"}
        fields = fields if token is None else {"csrf": token, **fields}
        return self.post(path, data=fields, headers={**own, **(headers or {})})

    def sign_in(self, key: str) -> Browser:
        answer = self.send_form("/login", self.token(), key=key)
        assert (answer.status_code, answer.headers["location"]) == (303, "/"), answer.text
        return self


@contextmanager
def browsing(server, key: str | None = None):
    with Browser(base_url=server.url, timeout=30) as http:
        yield http.sign_in(key) if key else http


def upload(server, key: str, name: str = "a.txt", content: bytes = b"some words") -> str:
    with server.http(key) as http:
        return http.post("/v1/files", files={"file": (name, content)}).json()["id"]


def request_over(scheme: str, **headers: str) -> Request:
    raw = [(name.encode(), value.encode()) for name, value in {"host": "files.example", **headers}.items()]
    return Request({"type": "http", "method": "POST", "scheme": scheme, "path": "/", "query_string": b"", "headers": raw})


# -- cookies


def test_the_cookie_is_sealed_bounded_and_out_of_reach_of_scripts_and_other_sites(server):
    _, key = server.workspace("sessions cookie")
    with browsing(server) as http:
        answer = http.send_form("/login", http.token(), key=key)
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert 0 < int(re.search(r"Max-Age=(\d+)", cookie)[1]) <= sessions.HOURS * 3600
        assert key not in cookie
        assert b"key_" not in cookie.encode()


@pytest.mark.parametrize(
    ("scheme", "headers", "name"),
    [
        ("http", {}, "ropewalk"),
        ("https", {}, "__Host-ropewalk"),
        ("http", {"origin": "https://files.example"}, "__Host-ropewalk"),  # a proxy ends TLS
    ],
)
def test_over_tls_the_cookie_is_secure(server, scheme, headers, name):
    response = Response()
    sessions.write(response, request_over(scheme, **headers), server.store.vault, sessions.begin("key_x"))
    cookie = response.headers["set-cookie"]
    assert cookie.startswith(f"{name}=")
    assert ("Secure" in cookie) == (name != "ropewalk")


def test_a_session_is_read_as_it_was_written_and_not_after_its_hours(server):
    vault = server.store.vault
    for session, there in (
        (sessions.begin("key_x", "wrkspc_y"), True),
        (replace(sessions.begin("key_x"), ends_at=now() - 1), False),
    ):
        response = Response()
        sessions.write(response, request_over("http"), vault, session)
        cookie = response.headers["set-cookie"].partition(";")[0]
        found = sessions.read(request_over("http", cookie=cookie), vault)
        assert found == (session if there else None)


def test_a_cookie_with_one_byte_changed_is_none(server):
    _, key = server.workspace("sessions forged")
    with browsing(server, key) as http:
        good = http.cookies["ropewalk"]
        for place in (0, len(good) // 2, len(good) - 2):
            bad = good[:place] + ("A" if good[place] != "A" else "B") + good[place + 1 :]
            answer = httpx.get(server.url + "/files", cookies={"ropewalk": bad})
            assert answer.headers["location"].startswith("/login")
        for bad in ("", "x", "é", "====", "A" * 4000):
            assert httpx.get(server.url + "/files", headers={"cookie": f"ropewalk={bad}".encode()}).status_code == 303


def test_revoking_the_key_ends_its_sessions_at_once(server):
    _, key = server.workspace("sessions revoked")
    file = upload(server, key)
    with browsing(server, key) as http:
        assert http.get(f"/files/{file}").status_code == 200

        async def revoke() -> None:
            async with server.store.database.reading() as connection:
                found = await authenticate(connection, server.store.pepper, key)
            await revoke_key(server.store.database, found.id)

        server.run(revoke())
        for path in ("/files", f"/files/{file}", f"/files/{file}/content", f"/files/{file}/delete"):
            assert http.get(path).headers["location"].startswith("/login"), path
        assert http.get("/files", headers={"accept": "application/json"}).status_code == 401
        answer = http.get("/files", headers={"hx-request": "true"})
        assert (answer.status_code, answer.headers["hx-redirect"]) == (204, "/login")


def test_the_api_takes_no_cookie(server):
    _, key = server.workspace("sessions api")
    with browsing(server, key) as http:
        assert http.get("/v1/files").status_code == 401


def test_signing_in_gives_a_new_session_and_signing_out_takes_it_back(server):
    _, key = server.workspace("sessions new")
    with browsing(server) as http:
        before = http.token()
        http.sign_in(key)
        after = http.token("/files")
        assert before != after
        assert http.get("/login").headers["location"] == "/"
        assert http.send_form("/logout", after).headers["location"] == "/login"
        assert "ropewalk" not in http.cookies
        assert http.get("/files").status_code == 303


def test_a_link_cannot_lead_from_the_sign_in_to_another_site(server):
    _, key = server.workspace("sessions redirect")
    for target in ("https://evil.example/", "//evil.example", "/\\evil.example", "evil", "/a\r\nb: c"):
        with browsing(server) as http:
            assert http.send_form("/login", http.token(), key=key, next=target).headers["location"] == "/"
    with browsing(server) as http:
        answer = http.send_form("/login", http.token(), key=key, next="/files/file_1?from=2")
        assert answer.headers["location"] == "/files/file_1?from=2"


# -- forms of other sites

FORGED = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://["},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none"},
]


def forms(file: str) -> list[str]:
    """Every address that takes a form."""
    taken = [route.path for route in pages.routes if "POST" in (getattr(route, "methods", None) or ())]
    assert len(taken) == 5
    return [path.replace("{id:str}", file) for path in taken]


def test_no_form_is_taken_without_token_or_from_elsewhere(server):
    workspace, key = server.workspace("sessions csrf")
    file = upload(server, key)
    with browsing(server, key) as http, browsing(server, key) as other:
        good, foreign = http.token("/files"), other.token("/files")
        for path in forms(file):
            fields = {"key": key, "workspace_id": workspace.id}
            for wrong in (None, "", "x", foreign, good[:-1], "é"):
                assert http.send_form(path, wrong, **fields).status_code in (400, 403), (path, wrong)
            for headers in FORGED:
                assert http.send_form(path, good, headers=headers, **fields).status_code == 403, (path, headers)
            nothing = http.post(path, data={"csrf": good, **fields})
            assert nothing.status_code == 403, path
        assert http.get(f"/files/{file}").status_code == 200


def test_uploads_show_their_token_before_their_bytes(server):
    _, key = server.workspace("sessions upload")
    with browsing(server, key) as http, browsing(server, key) as other:
        good, foreign = http.token("/files"), other.token("/files")
        headers = {"origin": server.url, "accept": "application/json"}
        file = {"file": ("a.txt", b"text")}
        tries = [
            ({}, {}, 403),
            ({}, {"csrf": foreign}, 403),
            ({"x-csrf-token": foreign}, {"csrf": good}, 403),
            ({"x-csrf-token": good, "origin": "https://evil.example"}, {}, 403),
            ({"x-csrf-token": good}, {}, 200),
            ({}, {"csrf": good}, 200),
        ]
        for more, fields, status in tries:
            assert http.post("/files", headers=headers | more, data=fields, files=file).status_code == status
        late = [("file", ("a.txt", b"text")), ("csrf", (None, good))]
        assert http.post("/files", headers=headers, files=late).status_code == 403
        with server.http(key) as api:
            assert len(api.get("/v1/files").json()["data"]) == 2


# -- what surrounds a page


def test_every_answer_has_the_policy_and_is_not_kept_by_browsers(server):
    _, key = server.workspace("sessions headers")
    file = upload(server, key)
    with browsing(server, key) as http:
        for path in ("/", "/login", "/files", f"/files/{file}", f"/files/{file}/delete", "/files/file_none", "/files?page=x"):
            answer = http.get(path)
            for name, value in visitors.HEADERS.items():
                assert answer.headers[name] == value, (path, name)
        with httpx.Client(base_url=server.url) as stranger:
            assert stranger.get("/login").headers["content-security-policy"] == visitors.HEADERS["content-security-policy"]
        download = http.get(f"/files/{file}/content")
        assert download.content == b"some words"
        assert "sandbox" in download.headers["content-security-policy"]
        assert download.headers["content-disposition"].startswith("attachment")
        assert download.headers["x-content-type-options"] == "nosniff"


def test_templates_hold_no_script_no_style_and_no_address_of_others():
    for path in [*TEMPLATES.glob("*.html"), STATIC / "ropewalk.css", STATIC / "upload.js", STATIC / "mark.svg"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<script(?! src=\"/static/)|<style|\sstyle=|\son[a-z]+=|javascript:|hx-on|hx-vals|\bjs:", text), (
            path.name
        )
        assert "| safe" not in text
        addresses = re.findall(r"(?:https?:)?//[\w.]+", text.replace("http://www.w3.org/2000/svg", ""))
        assert path.suffix == ".js" or not addresses, (path.name, addresses)
    assert "Zero-Clause BSD" in (STATIC / "htmx-LICENSE.txt").read_text(encoding="utf-8")


def test_static_files_are_served_to_everybody_and_nothing_beside_them(server):
    for path in STATIC.iterdir():
        assert httpx.get(f"{server.url}/static/{path.name}").content == path.read_bytes()
    for path in ("/static/../pages.py", "/static/%2e%2e/pages.py", "/static/", "/static/none.js"):
        assert httpx.get(server.url + path).status_code == 404


# -- whose files


def test_a_file_of_another_workspace_is_as_one_that_never_was(server):
    _, mine = server.workspace("sessions mine")
    _, theirs = server.workspace("sessions theirs")
    foreign, missing = upload(server, theirs), "file_" + "0" * 24
    with browsing(server, mine) as http:
        token = http.token("/files")
        for path in ("", "?from=0", "/content", "/delete", "/pages/1", "/receipt/1", "/receipt/1/json"):
            answers = [http.get(f"/files/{id}{path}") for id in (foreign, missing)]
            assert [answer.status_code for answer in answers] == [404, 404], path
            assert answers[0].text.replace(foreign, missing) == answers[1].text, path
        answers = [http.send_form(f"/files/{id}/delete", token) for id in (foreign, missing)]
        assert answers[0].text.replace(foreign, missing) == answers[1].text
    with server.http(theirs) as http:
        assert http.get(f"/v1/files/{foreign}").status_code == 200


def test_a_receipt_is_shown_to_its_workspace_and_to_who_knows_the_file(server):
    _, mine = server.workspace("sessions receipt")
    file, kept = upload(server, mine), upload(server, mine, content=b"other words")
    with browsing(server, mine) as http:
        answer = http.send_form(f"/files/{file}/delete", http.token("/files"))
        place = answer.headers["location"]
        assert http.get(place).status_code == 200
        assert http.get(f"{place}/json").json()["type"] == "deletion_receipt"
        assert http.get(place.replace(file, kept)).status_code == 404
        assert http.get(f"/files/{file}").status_code == 404
    _, theirs = server.workspace("sessions receipt of others")
    with browsing(server, theirs) as http:
        assert http.get(place).status_code == 404


def test_a_page_offers_and_allows_what_the_key_may_do(server):
    workspace, key = server.workspace("sessions rights")
    file = upload(server, key)
    reader = server.new_key(workspace.id, rights={"read"})
    with browsing(server, reader) as http:
        assert 'id="upload"' not in http.get("/files").text
        page = http.get(f"/files/{file}").text
        assert "/delete" not in page
        assert "/content" not in page
        token = re.search(r'name="csrf" value="([^"]+)"', page)[1]
        assert http.get(f"/files/{file}/delete").status_code == 403
        assert http.send_form(f"/files/{file}/delete", token).status_code == 403
        assert http.get(f"/files/{file}/content").status_code == 403
        headers = {"origin": server.url, "x-csrf-token": token}
        assert http.post("/files", headers=headers, files={"file": ("a.txt", b"text")}).status_code == 403


def test_a_key_of_one_user_shows_that_users_files_and_quota(server):
    workspace, key = server.workspace("sessions users")
    upload(server, key, "everybody.txt", b"x" * 5000)
    of_ann = server.new_key(workspace.id, user_id="ann")
    upload(server, of_ann, "of-ann.txt", b"x" * 70)
    with browsing(server, of_ann) as http:
        page = http.get("/files").text
        assert "of-ann.txt" in page
        assert "everybody.txt" not in page
        assert "<b>70 B</b>" in page


def test_an_admin_looks_at_one_workspace_after_the_other(server):
    workspace, key = server.workspace("sessions switched")
    upload(server, key, "only-here.txt")
    with browsing(server, server.key) as http:
        assert "only-here.txt" not in http.get("/files").text
        answer = http.send_form("/workspace", http.token("/files"), workspace_id=workspace.id)
        assert answer.headers["location"] == "/files"
        assert "only-here.txt" in http.get("/files").text
        assert http.send_form("/workspace", http.token("/files"), workspace_id="wrkspc_none").status_code == 404
    with browsing(server, key) as http:
        other, _ = server.workspace("sessions not switched")
        assert http.send_form("/workspace", http.token("/files"), workspace_id=other.id).status_code == 403


# -- uploads by form


def send(http: Browser, server, files, **fields: str) -> httpx.Response:
    parts = [("csrf", (None, http.token("/files"))), *((name, (None, value)) for name, value in fields.items()), *files]
    return http.post("/files", headers={"origin": server.url}, files=parts)


def test_a_form_brings_several_files_with_one_time_to_live(server):
    _, key = server.workspace("sessions form")
    with browsing(server, key) as http:
        answer = send(
            http, server, [("file", ("a.txt", b"1")), ("file", ("b.txt", b"")), ("file", ("", b""))], expires_in_seconds="3600"
        )
        assert answer.status_code == 303
        page = http.get(answer.headers["location"]).text
        assert re.search(r"a\.txt.*, .*b\.txt.* are stored\.", page)
    with server.http(key) as api:
        found = api.get("/v1/files").json()["data"]
    assert [file["filename"] for file in found] == ["b.txt", "a.txt"]
    assert all(file["expires_at"] for file in found)


@pytest.mark.parametrize(
    ("files", "fields", "status", "said"),
    [
        ([("file", ("", b""))], {}, 400, "No file was chosen: choose one"),
        ([], {}, 400, "No file was chosen: choose one"),
        ([("file", ("a.txt", b"x"))], {"expires_in_seconds": "1"}, 400, "not between 3600"),
        ([("file", ("a.txt", b"x"))], {"expires_in_seconds": "soon"}, 400, "not a whole number"),
        ([("file", ("a.txt", b"x"))], {"more": "x" * 2000}, 400, "has more than 1,024 bytes"),
        ([("file", ("good.txt", b"x")), ("file", ("a:b", b"x"))], {}, 400, "is not allowed; names have none of"),
        ([("file", ("good.txt", b"x")), ("file", ("a:b", b"x"))], {}, 400, "(the file before it is stored)"),
        ([("file", ("a.txt", b"x" * 200_000))], {}, 400, "Storage quota exceeded"),
    ],
)
def test_what_a_form_brings_wrong_is_said_in_a_sentence(server, files, fields, status, said):
    workspace, key = server.workspace(f"sessions wrong {time.monotonic_ns()}")

    async def limit() -> None:
        async with server.store.database.writing() as connection:
            await set_limit(connection, "workspace", workspace.id, 100_000, None)

    server.run(limit())
    with browsing(server, key) as http:
        answer = send(http, server, files, **fields)
        assert answer.status_code == status
        assert said in answer.text.replace("&gt;", ">").replace("&lt;", "<")


def test_a_page_that_is_asked_wrongly_says_so(server):
    _, key = server.workspace("sessions asked")
    file = upload(server, key)
    with browsing(server, key) as http:
        for path in (
            "/files?page=page_x",
            "/files?before=x",
            f"/files/{file}?from=-1",
            f"/files/{file}?from=x",
            f"/files/{file}/pages/1",
            f"/files/{file}/pages/{'9' * 5000}",
            f"/files/{file}/receipt/{'9' * 19}",
            f"/files/{file}/receipt/-1/json",
        ):
            answer = http.get(path)
            assert answer.status_code == 400, path
            assert "Bad Request" in answer.text
        for path in ("/files?name=%00&name=%ff", "/files?stored=%00&stored=x", f"/files/{file}?from={'9' * 18}"):
            assert http.get(path).status_code == 200, path
        assert http.get(f"/files/{file}/receipt/{'9' * 18}").status_code == 404
        answer = http.post("/logout", headers={"origin": server.url}, content=b"{}")
        assert answer.status_code == 400
        long = http.post(
            "/logout",
            headers={"origin": server.url, "content-type": "application/x-www-form-urlencoded"},
            content=b"csrf=" + b"x" * 20_000,
        )
        assert long.status_code == 413


def test_refusals_are_in_the_audit_log(server):
    _, key = server.workspace("sessions denied")

    async def entries() -> list[tuple[str, str]]:
        async with server.store.database.reading() as connection:
            query = select(audit.c.subject, audit.c.outcome).where(audit.c.action == "denied").order_by(audit.c.seq.desc())
            return [tuple(row) for row in await connection.execute(query.limit(3))]

    with browsing(server, key) as http:
        assert http.get("/files/file_none").status_code == 404
        assert http.send_form("/workspace", http.token("/files"), workspace_id="wrkspc_other").status_code == 403
    with browsing(server) as http:
        assert http.send_form("/login", http.token(), key="rw-key-wrong").status_code == 401
    wanted = [("/login", "wrong_key"), ("/workspace", "missing_right"), ("file_none", "no_such_id")]
    for _ in range(100):  # they are written once the answer is out
        if (found := server.run(entries())) == wanted:
            break
        time.sleep(0.05)
    assert found == wanted


def test_a_damaged_file_is_said_so_and_the_list_stays(server):
    _, key = server.workspace("sessions damaged")
    file = upload(server, key, "damaged.txt", b"these bytes will change " * 100)
    stored = server.run(server.store.show(server.run(server.store.local_caller("sessions damaged")), file))
    place = next((server.data / "files").rglob(stored.blob_id))
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    with browsing(server, key) as http:
        assert "damaged.txt" in http.get("/files?read=1").text
        page = http.get(f"/files/{file}?from=0")
        assert (page.status_code, "What is stored of this file is damaged" in page.text) == (200, True)
        assert http.get(f"/files/{file}/content").status_code == 500


def test_requests_are_counted_against_the_limit_of_the_workspace(server):
    _, key = server.workspace("sessions limited", requests_per_minute=2)
    with browsing(server, key) as http:
        assert [http.get("/files").status_code for _ in range(3)] == [200, 200, 429]
        assert int(http.get("/files").headers["retry-after"]) > 0


# -- words


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (48_211, "48.2 kB"),
        (999_499, "999 kB"),
        (999_949, "1.0 MB"),
        (500_000_000, "500 MB"),
        (5 * 10**12, "5.0 TB"),
    ],
)
def test_sizes(count, said):
    assert words.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "just now"), (-89, "1 minute ago"), (-7300, "2 hours ago"), (-86_400 * 3, "3 days ago"), (40, "in 1 minute"),
        (20, "in less than a minute"), (604_795, "in 7 days"), (3599, "in 1 hour"),
    ],
)  # fmt: skip
def test_moments(seconds, said):
    assert words.moment(now() + int(seconds * 1_000_000)).words == said


def test_a_moment_long_past_is_a_date():
    assert words.moment(1_700_000_000_000_000).words == "14 Nov 2023"
    assert words.moment(1_700_000_000_000_000).exact == "2023-11-14 22:13 UTC"


def test_what_hides_in_a_name_is_spelt_out():
    spelt = [(part.text, part.unseen) for part in words.parts("a\u202ebخ\u200dد👩\u200d🔬\u2066")]
    assert spelt == [("a", False), ("U+202E", True), ("bخ\u200dد👩\u200d🔬", False), ("U+2066", True)]


@pytest.mark.parametrize(
    ("mime", "badge", "kind"),
    [
        ("application/pdf", "PDF", "PDF"), ("text/plain; charset=utf-8", "TXT", "Plain text"), ("text/x-python", "PY", "Python source"),
        ("application/x-thing.more", "FILE", "application/x-thing.more"), ("weird", "FILE", "weird"),
    ],
)  # fmt: skip
def test_kinds(mime, badge, kind):
    assert words.kind_of(mime) == (badge, kind)


@pytest.mark.parametrize(
    ("tokens", "said"), [(None, None), (0, "~0"), (999, "~999"), (5000, "~5.0 k"), (320_000, "~320 k"), (2_500_000, "~2.5 M")]
)
def test_estimates(tokens, said):
    assert words.estimate(tokens) == said
