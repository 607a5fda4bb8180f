"""Hostile requests against a real `ropewalk serve`: no answer may be in the 500s, and the server's memory stays where it is.

    python benchmarks/fuzz_files.py --requests 20000 [--quick] [--seed N] [--json FILE]

Of the requests, two fifths are made by schemathesis from our own OpenAPI document, with an admin's key; two fifths are uploads whose
form, length or pieces are wrong; one fifth has odd paths, queries, headers and JSON, some of it with a signed-in browser's cookie; and
one in a hundred is a hostile document, which is then read as a page shows it. The seed is printed: the same seed makes the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

import hostile
from flood import ANSWER_SECONDS, Flood, Tally, memory, raw, stall
from hostile_documents import Document, documents
from measure import table, write_json
from peers.file_servers import KEY, ROOT_KEY, Server, ropewalk

WARM_UP = 0.4  # of the requests: afterwards caches, pools and code are in memory, and growth is a leak
MOST_GROWTH_MB = 60  # what is above is a leak, whatever the caches of the database and of the allocator do
SHOWN = 12
STALLED = 3  # uploads that stop half-way and stay connected


def main() -> int:
    arguments = _arguments()
    warnings.simplefilter("ignore")  # hypothesis and schemathesis speak to whoever writes tests
    schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="ropewalk-fuzz-") as folder, ropewalk(Path(folder) / "data") as server:
        flood = Flood(server.port, arguments.seed)
        targets = Targets(server, asyncio.run(_admin(Path(folder) / "data")))
        stalled = [
            threading.Thread(target=stall, args=(flood, KEY.encode())) for _ in range(STALLED * (arguments.requests >= 1000))
        ]
        for thread in stalled:
            thread.start()
        first = int(arguments.requests * WARM_UP)
        _round(flood, targets, first)
        before = memory(server.process.pid)
        _round(flood, targets, arguments.requests - first)
        for thread in stalled:
            thread.join()
        growth = (memory(server.process.pid) - before) / 2**20
        alive = server.process.poll() is None and httpx.get(f"{targets.url}/ready").status_code == 200
    tally = flood.tally
    result = {
        "requests": tally.requests,
        "server_errors": len(tally.errors),
        "rss_growth_mb": round(growth, 1),
        "rss_mb": round(before / 2**20 + growth, 1),
        "unanswered": tally.unanswered.total(),
        "hung": len(tally.hung),
        "untrue": sum(tally.untrue.values()),
        "alive": alive,
        "seed": arguments.seed,
        "statuses": {f"{kind} {status}": count for (kind, status), count in sorted(tally.statuses.items())},
    }
    _report(result, tally)
    write_json(arguments.json, result)
    return int(bool(tally.errors or tally.hung or tally.untrue or not alive or growth > MOST_GROWTH_MB))


class Targets:
    """What there is to shoot at: routes, keys, ids that exist."""

    def __init__(self, server: Server, admin: str) -> None:
        self.url, self.admin = f"http://127.0.0.1:{server.port}", admin
        self.document = httpx.get(f"{self.url}/openapi.json").json()
        self.routes = [(method, path) for path, methods in self.document["paths"].items() for method in methods]
        pages = "/ /login /files /files/{id} /files/{id}/content /files/{id}/pages/{number} /files/{id}/delete /files/{id}/receipt/{number}"
        self.routes += [
            ("get", page) for page in f"{pages} /files/{{id}}/receipt/{{number}}/json /static/{{id}} /{{id}}".split()
        ]
        self.routes += [("post", page) for page in "/login /logout /workspace /files /files/{id}/delete".split()]
        self.client = httpx.Client(base_url=self.url, headers={"x-api-key": KEY}, timeout=120)
        self.browser = httpx.Client(base_url=self.url, timeout=120, follow_redirects=True)
        form = re.search(r'name="csrf" value="([^"]+)"', self.browser.get("/login").text)
        assert form is not None, "the page for signing in has no form"
        signed_in = self.browser.post("/login", data={"key": KEY, "csrf": form[1]}, headers={"origin": self.url})
        assert signed_in.url.path == "/", signed_in.text[:1000]
        cookie = "; ".join(f"{name}={value}" for name, value in self.browser.cookies.items())
        token = re.search(r'name="csrf" value="([^"]+)"', signed_in.text)
        assert token is not None, "the page of files has no form"
        signed = f"cookie: {cookie}\r\nx-csrf-token: {token[1]}\r\norigin: http://localhost"
        keys = [f"x-api-key: {KEY}", f"x-api-key: {admin}", signed, f"authorization: Bearer {KEY}", "x-api-key: wrong"]
        self.credentials = [key.encode() for key in keys]
        self.doors = [(b"/v1/files", self.credentials[0]), (b"/files", signed.encode())]

    def known(self) -> dict[str, list[str]]:
        """Ids that are really there, by the placeholder they stand in for; the workspace and key are made to be shot at."""
        admin = {"x-api-key": self.admin}
        name = f"target {random.getrandbits(64)}"
        place = self.client.post("/v1/organizations/workspaces", json={"name": name}, headers=admin).json()["id"]
        key = self.client.post(
            "/v1/organizations/api_keys", json={"name": "target", "workspace_id": place}, headers=admin
        ).json()
        files = [self.client.post("/v1/files", files={"file": (f"{n}.txt", b"words " * n)}).json()["id"] for n in (0, 5, 900)]
        tus = {"tus-resumable": "1.0.0", "upload-length": "5", "upload-metadata": "filename YS50eHQ="}
        upload = self.client.post("/v1/files/resumable", headers=tus).headers["location"].rpartition("/")[2]
        return {
            "file_id": files,
            "id": files,
            "workspace_id": [place],
            "api_key_id": [key["id"]],
            "upload_id": [upload],
            "number": ["1", "2"],
        }

    def restore(self) -> None:
        """Takes away the limits that the last round may have set, so that the next is not turned away at the door."""
        everywhere = {"limit_bytes": None, "limit_files": None}
        for scope in ("organization", "new_workspaces"):
            self.client.post("/v1/organizations/limits", json={"scope": scope, **everywhere}, headers={"x-api-key": self.admin})


def _round(flood: Flood, targets: Targets, count: int) -> None:
    """So many requests of all kinds."""
    known = targets.known()
    papers = -(-count // 100)
    from_document, odd = (count - 2 * papers) * 2 // 5, (count - 2 * papers) // 5
    flood.pour(hostile.uploads(targets.doors), count - 2 * papers - from_document - odd, raw("upload"))
    flood.pour(hostile.requests(targets.routes, targets.credentials, known), odd, raw("request"))
    flood.pour(documents(), papers, lambda flood, document: _read(flood, targets, document))
    operations = [found.ok() for found in schemathesis.openapi.from_dict(targets.document).get_all_operations()]
    for index, operation in enumerate(operations):
        share = from_document // len(operations) + (index < from_document % len(operations))
        for mode, most in ((GenerationMode.NEGATIVE, share // 2), (GenerationMode.POSITIVE, share)):
            cases = st.tuples(operation.as_strategy(generation_mode=mode), st.integers(0, 2**32).map(random.Random))
            share -= flood.pour(cases, min(share, most), lambda flood, pair: _send(flood, targets, *pair, known))
    targets.restore()


def _read(flood: Flood, targets: Targets, document: Document) -> None:
    """Uploads a document and looks at it in a browser: two requests."""
    name, content = document
    made = targets.client.post("/v1/files", files={"file": (name, content)})
    flood.count("document", made.status_code, (name, content[:300]))
    assert made.status_code == 200, made.text
    id = made.json()["id"]
    flood.count("preview", targets.browser.get(f"/files/{id}").status_code, (name, len(content), content[:300]))
    targets.client.delete(f"/v1/files/{id}")


def _send(flood: Flood, targets: Targets, case: Any, chance: random.Random, known: Mapping[str, list[str]]) -> None:
    """Sends what schemathesis made, half of it to ids that are there, and holds the answer against the document."""
    for name in case.path_parameters or {}:
        if name in known and chance.random() < 0.5:
            case.path_parameters[name] = chance.choice(known[name])
    try:
        response = case.call(base_url=targets.url, headers={"x-api-key": targets.admin}, timeout=ANSWER_SECONDS)
    except (requests.RequestException, ValueError) as error:  # what the client itself cannot send was never a request
        flood.count("schema", None, error)
        return
    flood.count("schema", response.status_code, f"{case.method} {case.formatted_path} {case.query} {str(case.body)[:300]}")
    try:
        case.validate_response(
            response, checks=[response_schema_conformance, content_type_conformance, status_code_conformance]
        )
    except FailureGroup as group:
        for failure in group.exceptions:
            flood.disagree(f"{case.method} {case.operation.path} {response.status_code}: {failure.title} {str(failure)[:400]}")


async def _admin(data: Path) -> str:
    """A key that may do everything."""
    from ropewalk.database import Database
    from ropewalk.files.settings import Settings
    from ropewalk.tenants.caller import RIGHTS
    from ropewalk.tenants.keys import create_key
    from ropewalk.vault import Vault

    database = await Database.open(Settings(data=data).database)
    _, secret = await create_key(database, Vault(base64.b64decode(ROOT_KEY)), None, "fuzz", rights=RIGHTS)
    await database.close()
    return secret


def _report(result: Mapping[str, Any], tally: Tally) -> None:
    kinds = sorted({kind for kind, _ in tally.statuses} | set(tally.unanswered))
    classes = (200, 300, 400, 500)
    rows = [
        [
            kind,
            *(sum(n for (k, s), n in tally.statuses.items() if k == kind and c <= s < c + 100) for c in classes),
            tally.unanswered[kind],
        ]
        for kind in kinds
    ]
    print(table(["kind", "2xx", "3xx", "4xx", "5xx", "closed"], rows))
    for line in [
        *tally.errors[:SHOWN],
        *tally.hung[:SHOWN],
        *(f"{count}x {what}" for what, count in tally.untrue.most_common(SHOWN)),
    ]:
        print("  " + line)
    print(
        f"{result['requests']} requests, {result['server_errors']} in the 500s, {result['hung']} without an answer, {result['untrue']} not as "
        f"the document says; resident memory {result['rss_mb']} MB, {result['rss_growth_mb']:+} MB since the warm-up"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="how many (default: 20000; with --quick 2000)")
    parser.add_argument("--quick", action="store_true", help="under three minutes")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.requests = arguments.requests or (2000 if arguments.quick else 20_000)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
