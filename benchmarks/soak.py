"""A mixed load on a real `ropewalk serve` for as long as it is told to: uploads, questions about them, and a training job after the other.

    python benchmarks/soak.py --minutes 10 [--quick] [--json FILE] [--seed S]

    lost            acknowledged files that are not there or not as they were sent, deleted ones that still are, and jobs that end
                    otherwise than as a model that answers, or lack a step of their loss curve
    errors_5xx      answers in the 500s but 529, errors of that kind in the middle of a stream, and connections that break
    rss_growth_mb   of the server and its engine together, without the training itself, from the end of the warm-up (a fifth of the
                    time) to the end
    p95             milliseconds of uploads, downloads, deletions, whole replies, and the first delta of a stream

Gates: lost, errors_5xx, and memory that grows by more than MOST_GROWTH_MB.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from measure import PAGE, descendants, machine, table, write_json
from peers.file_servers import Server, ropewalk
from ropewalk.models.base import make_base
from ropewalk.quickstart import facts
from ropewalk.registry import Registry

MODEL = "tiny"
MINUTES, QUICK_MINUTES = 10.0, 0.75
WARM_UP = 0.2
MOST_GROWTH_MB = 80.0
PATIENCE = 120.0
UPLOADERS, ASKERS = 2, 3
MOST_FILES = 40  # of one uploader, before it deletes; so the store's size is bounded too
SIZES = (200, 5_000, 80_000, 1_500_000)
PAUSE = 0.2  # seconds between two requests of one client, at most
STEPS = 40
OVERLOADED = (429, 529)
BOOK = "The lighthouse of {} was built in {}. Its light reaches twenty-five sea miles. "
ENGINE = "engine: {memory_gb: 0.1, disk_gb: 0.2, threads: 1}\n"  # budgets that are full before the warm-up ends


@dataclass
class Seen:
    """What all clients saw, and what they expect to find."""

    requests: Counter[str] = field(default_factory=Counter)
    took: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # id -> SHA-256
    deleted: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    overloaded: int = 0


def main() -> int:
    arguments = _arguments()
    seconds, seen, resident = arguments.minutes * 60, Seen(), list[float]()
    with tempfile.TemporaryDirectory(prefix="ropewalk-soak-") as folder:
        data, base, models = Path(folder) / "data", Path(folder) / "base", Path(folder) / "models.yml"
        make_base(base, "qwen3_moe", size="tiny", seed=1)
        models.write_text(ENGINE, encoding="utf-8")
        with ropewalk(data, "--models", str(models), OMP_NUM_THREADS="1") as server:
            Registry(data / "registry").publish_base(MODEL, base)
            asyncio.run(_soak(server, seen, resident, seconds, arguments.seed))
    after = resident[int(len(resident) * WARM_UP) :]
    growth = max(after[-3:]) - max(after[:3])
    result = {
        "minutes": arguments.minutes,
        "requests": dict(sorted(seen.requests.items())),
        "jobs": len(seen.jobs),
        "lost": len(seen.lost),
        "errors_5xx": len(seen.errors),
        "overloaded": seen.overloaded,
        "rss_growth_mb": round(growth, 1),
        "rss_mb": {"after warm-up": round(after[0], 1), "most": round(max(after), 1), "end": round(after[-1], 1)},
        "p50": {kind: _quantile(found, 0.5) for kind, found in sorted(seen.took.items())},
        "p95": {kind: _quantile(found, 0.95) for kind, found in sorted(seen.took.items())},
        "seed": arguments.seed,
        "machine": machine(),
    }
    rows = [[kind, len(found), result["p50"][kind], result["p95"][kind]] for kind, found in sorted(seen.took.items())]
    print(table(["", "requests", "p50 ms", "p95 ms"], rows), end="\n\n")
    shown = ("minutes", "jobs", "lost", "errors_5xx", "overloaded", "rss_growth_mb")
    print(table(shown, [[result[key] for key in shown]]))
    for line in (*seen.lost[:10], *seen.errors[:10]):
        print(line[:500])
    write_json(arguments.json, result)
    return int(bool(seen.lost or seen.errors or growth > MOST_GROWTH_MB))


async def _soak(server: Server, seen: Seen, resident: list[float], seconds: float, seed: int) -> None:
    url = f"http://127.0.0.1:{server.port}"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=dict(server.headers), timeout=PATIENCE, limits=limits) as http:
        books = [await _book(http, year) for year in range(1900, 1912)]
        end = time.monotonic() + seconds
        watching = asyncio.create_task(_watch(server.process.pid, resident, end))
        rng = random.Random(seed)
        clients: list[Callable[[httpx.AsyncClient, Seen, random.Random], Awaitable[None]]] = []
        clients += [_Uploader().one for _ in range(UPLOADERS)]
        clients += [_Asker(books).one for _ in range(ASKERS)]
        await asyncio.gather(
            _jobs(http, seen, end), *(_repeat(http, seen, random.Random(rng.random()), one, end) for one in clients)
        )
        await watching
        await _account(http, seen)


async def _repeat(
    http: httpx.AsyncClient,
    seen: Seen,
    rng: random.Random,
    one: Callable[[httpx.AsyncClient, Seen, random.Random], Awaitable[None]],
    end: float,
) -> None:
    while time.monotonic() < end:
        try:
            await one(http, seen, rng)
        except httpx.TransportError as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
        await asyncio.sleep(rng.random() * PAUSE)


class _Uploader:
    """Uploads, reads back and deletes."""

    def __init__(self) -> None:
        self.mine: list[str] = []

    async def one(self, http: httpx.AsyncClient, seen: Seen, rng: random.Random) -> None:
        content = rng.randbytes(rng.choice(SIZES))
        async with _timed(seen, "upload"):
            answer = await http.post("/v1/files", files={"file": ("a.bin", content, "application/octet-stream")})
        if not _well(seen, "upload", answer):
            return
        id = answer.json()["id"]
        seen.files[id] = hashlib.sha256(content).hexdigest()
        self.mine.append(id)
        other = rng.choice(self.mine)
        async with _timed(seen, "download"):
            answer = await http.get(f"/v1/files/{other}/content")
        if _well(seen, "download", answer) and hashlib.sha256(answer.content).hexdigest() != seen.files[other]:
            seen.lost.append(f"{other} is not what was sent")
        if len(self.mine) > MOST_FILES or rng.random() < 0.3:
            gone = self.mine.pop(rng.randrange(len(self.mine)))
            async with _timed(seen, "delete"):
                answer = await http.delete(f"/v1/files/{gone}")
            if _well(seen, "delete", answer):
                seen.files.pop(gone)
                seen.deleted.append(gone)


class _Asker:
    """Asks about stored files: whole replies and streams."""

    def __init__(self, books: list[str]) -> None:
        self.books = books

    async def one(self, http: httpx.AsyncClient, seen: Seen, rng: random.Random) -> None:
        body = _question(rng.choice(self.books), f"Question {rng.randrange(1000)}?", rng.choice((4, 16)))
        if rng.random() < 0.5:
            async with _timed(seen, "reply"):
                answer = await http.post("/v1/messages", json=body)
            _well(seen, "reply", answer)
            return
        begun = time.monotonic()
        async with http.stream("POST", "/v1/messages", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                await answer.aread()
                _well(seen, "stream", answer)
                return
            await _read_stream(seen, answer, begun)


async def _read_stream(seen: Seen, answer: httpx.Response, begun: float) -> None:
    kind, first = "", True
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            kind = line[7:]
            if kind == "content_block_delta" and first:
                first = False
                seen.took["first delta"].append(time.monotonic() - begun)
            if kind == "error":
                seen.errors.append("an error in a stream")
    seen.requests["stream 200"] += 1
    if kind != "message_stop":
        seen.errors.append(f"a stream ended after {kind or 'nothing'}")


async def _jobs(http: httpx.AsyncClient, seen: Seen, end: float) -> None:
    """One training after the other; the last is waited for."""
    made = facts.questions(facts.split()[0], 6)[:80]
    rows = [{"messages": [{"role": "user", "content": q.prompt}, {"role": "assistant", "content": q.answer}]} for q in made]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    file = (await http.post("/v1/files", files={"file": ("rows.jsonl", content)})).raise_for_status().json()["id"]
    seen.files[file] = hashlib.sha256(content.encode()).hexdigest()
    keys = {"max_steps": STEPS, "save_steps": 10, "sequence_len": 256, "lora_r": 2, "num_threads": 1, "bf16": False}
    while time.monotonic() < end:
        body = {"model": MODEL, "training_file": file, "ropewalk": keys}
        answer = await http.post("/v1/fine_tuning/jobs", json=body)
        if not _well(seen, "job", answer):
            await asyncio.sleep(5)
            continue
        id = answer.json()["id"]
        seen.jobs.append(id)
        begun = time.monotonic()
        while (job := (await http.get(f"/v1/fine_tuning/jobs/{id}")).json())["status"] not in (
            "succeeded",
            "failed",
            "cancelled",
        ):
            if time.monotonic() > begun + 5 * PATIENCE:
                break
            await asyncio.sleep(1)
        seen.took["job"].append(time.monotonic() - begun)
        await _judge(http, seen, job)


async def _judge(http: httpx.AsyncClient, seen: Seen, job: dict[str, Any]) -> None:
    if job["status"] != "succeeded":
        seen.lost.append(f"{job['id']}: {job['status']} {job.get('error')}")
        return
    told = (await http.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=1000")).json()["data"]
    steps = sorted(event["data"]["step"] for event in told if "train_loss" in (event["data"] or {}))
    if steps != list(range(1, STEPS + 1)):
        seen.lost.append(f"{job['id']}: its curve has the steps {steps}")
    asked = {"model": job["fine_tuned_model"], "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}
    for _ in range(30):
        answer = await http.post("/v1/messages", json=asked)
        if answer.status_code not in OVERLOADED:
            break
        await asyncio.sleep(1)
    if answer.status_code != 200:
        seen.lost.append(f"{job['fine_tuned_model']} does not answer: {answer.status_code}")


async def _account(http: httpx.AsyncClient, seen: Seen) -> None:
    """All that was acknowledged is looked at once more."""
    for id, digest in seen.files.items():
        answer = await http.get(f"/v1/files/{id}/content")
        if answer.status_code != 200 or hashlib.sha256(answer.content).hexdigest() != digest:
            seen.lost.append(f"{id}: {answer.status_code} at the end")
    for id in seen.deleted:
        if (answer := await http.get(f"/v1/files/{id}")).status_code != 404:
            seen.lost.append(f"{id} was deleted and answers {answer.status_code}")


async def _watch(pid: int, resident: list[float], end: float) -> None:
    while time.monotonic() < end:
        resident.append(await asyncio.to_thread(_resident, pid))
        await asyncio.sleep(1)


def _resident(root: int) -> float:
    """Megabytes of a server and its engine; what a training takes is its own."""
    left_out: set[int] = set()
    total = 0
    for pid in descendants(root):
        try:
            if pid in left_out or b"--granted" in Path(f"/proc/{pid}/cmdline").read_bytes():
                left_out |= set(descendants(pid))
                continue
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        except OSError:
            continue  # it ended between the listing and the reading
    return total / 2**20


async def _book(http: httpx.AsyncClient, year: int) -> str:
    text = BOOK.format(f"Pellworm {year}", year) * 6
    answer = await http.post("/v1/files", files={"file": ("book.txt", text, "text/plain")})
    id: str = answer.raise_for_status().json()["id"]
    for _ in range(100):  # the first question loads the model
        if (await http.post("/v1/messages", json=_question(id, "When?", 1))).status_code == 200:
            return id
        await asyncio.sleep(1)
    raise RuntimeError("the model does not answer")


def _question(file: str, text: str, most: int) -> dict[str, Any]:
    document = {"type": "document", "source": {"type": "file", "file_id": file}}
    return {
        "model": MODEL,
        "max_tokens": most,
        "messages": [{"role": "user", "content": [document, {"type": "text", "text": text}]}],
    }


def _well(seen: Seen, kind: str, answer: httpx.Response) -> bool:
    seen.requests[f"{kind} {answer.status_code}"] += 1
    if answer.status_code in OVERLOADED:
        seen.overloaded += 1
    elif answer.status_code >= 400:
        seen.errors.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
    return answer.status_code == 200


@asynccontextmanager
async def _timed(seen: Seen, kind: str) -> AsyncIterator[None]:
    begun = time.monotonic()
    yield
    seen.took[kind].append(time.monotonic() - begun)


def _quantile(values: list[float], part: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(len(values) * part))] * 1000, 1) if values else 0.0


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=None, metavar="N", help=f"default: {MINUTES:g}")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_MINUTES:g} of a minute; under three with start and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--seed", type=int, default=0, help="of the load (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.minutes = arguments.minutes or (QUICK_MINUTES if arguments.quick else MINUTES)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
