"""64 clients with a real `ropewalk serve` over a tiny base: streams, whole answers, cancels and disconnects, about a few files.

    python benchmarks/load_messages.py --seconds 300 [--clients 64] [--quick] [--json FILE]

    errors_5xx      answers in the 500s but 529, and errors of that kind in the middle of a stream
    stuck           requests without an end after a minute, or which the engine still holds when all clients have gone
    rss_growth_mb   of the server and its engine together, from the end of the warm-up (a fifth of the time) to the end
    ttft_p50, _p95  seconds to the first delta of a stream; tokens_per_s: of all answers that came to their end

Gates: errors_5xx, stuck, and memory that grows by more than MOST_GROWTH_MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from flood import memory
from measure import table, write_json
from peers.file_servers import ropewalk
from ropewalk.models.base import make_base
from ropewalk.registry import Registry

MODEL, CLIENTS, QUICK_SECONDS = "tiny", 64, 40
PATIENCE = 60.0
WARM_UP = 0.2
MOST_GROWTH_MB = 60.0
OVERLOADED = (429, 529)
BOOK = "The lighthouse of {} was built in {}. Its light reaches twenty-five sea miles. "
PLACES = ("Pellworm", "Amrum", "Sylt", "Helgoland", "Norderney")
WAYS = ("stream", "stream", "stream", "whole", "whole", "cancel", "leave")  # leave: before the first byte of the answer


@dataclass
class Seen:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    stuck: int = 0


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="ropewalk-load-") as folder:
        data, base = Path(folder) / "data", Path(folder) / "base"
        make_base(base, "qwen3_moe", size="tiny", seed=1)
        with ropewalk(data) as server:
            Registry(data / "registry").publish_base(MODEL, base)
            url = f"http://127.0.0.1:{server.port}"
            with httpx.Client(base_url=url, headers=server.headers, timeout=120) as client:
                files = [_upload(client, place, year) for year, place in enumerate(PLACES, 1907)]
                asyncio.run(_load(url, server.headers, files, arguments.clients, arguments.seconds * WARM_UP))
                before = memory(server.process.pid)
                begun = time.monotonic()
                seen = asyncio.run(_load(url, server.headers, files, arguments.clients, arguments.seconds * (1 - WARM_UP)))
                seconds = time.monotonic() - begun
                seen.stuck += _still_held(client)
                growth = (memory(server.process.pid) - before) / 2**20
    result = {
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "requests": seen.statuses.total(),
        "errors_5xx": len(seen.errors),
        "stuck": seen.stuck,
        "rss_growth_mb": round(growth, 1),
        "rss_mb": round(before / 2**20 + growth, 1),
        "ttft_p50": _quantile(seen.first, 0.5),
        "ttft_p95": _quantile(seen.first, 0.95),
        "tokens_per_s": round(seen.tokens / seconds, 1),
        "statuses": dict(sorted(seen.statuses.items())),
    }
    print(table(("", ""), [[name, str(value)] for name, value in result.items()]))
    for line in seen.errors[:10]:
        print(line[:1_000])
    write_json(arguments.json, result)
    return int(bool(seen.errors or seen.stuck or growth > MOST_GROWTH_MB))


def _upload(client: httpx.Client, place: str, year: int) -> str:
    text = BOOK.format(place, year) * 3
    id: str = client.post("/v1/files", files={"file": ("book.txt", text, "text/plain")}).json()["id"]
    for _ in range(100):  # the first question loads the model
        asked = {"model": MODEL, "max_tokens": 1, "messages": [_about(id, "When?")]}
        if client.post("/v1/messages", json=asked).status_code == 200:
            return id
        time.sleep(1)
    raise RuntimeError("the model does not answer")


async def _load(url: str, headers: Any, files: list[str], clients: int, seconds: float) -> Seen:
    seen, end = Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE, limits=limits) as client:
        await asyncio.gather(*(_client(client, seen, files, random.Random(n), end) for n in range(clients)))
    return seen


async def _client(client: httpx.AsyncClient, seen: Seen, files: list[str], chance: random.Random, end: float) -> None:
    while time.monotonic() < end:
        way = chance.choice(WAYS)
        content = _about(chance.choice(files), f"Question {chance.randrange(1000)}?")
        asked = {"model": MODEL, "max_tokens": chance.choice((1, 8, 32)), "messages": [content], "stream": way != "whole"}
        try:
            async with asyncio.timeout(PATIENCE):
                await _ask(client, seen, asked, way, chance)
        except TimeoutError:
            if way != "leave":
                seen.stuck += 1
        except httpx.TransportError as error:
            seen.errors.append(f"{way}: {type(error).__name__}")
        await asyncio.sleep(chance.random() * 0.05)


async def _ask(client: httpx.AsyncClient, seen: Seen, asked: dict[str, Any], way: str, chance: random.Random) -> None:
    begun = time.monotonic()
    if way == "leave":
        try:
            async with asyncio.timeout(chance.random() * 0.2):
                await client.post("/v1/messages", json=asked)
        except TimeoutError:
            seen.statuses["left"] += 1
        return
    async with client.stream("POST", "/v1/messages", json=asked) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode()
            seen.statuses[str(answer.status_code)] += 1
            if answer.status_code >= 500 and answer.status_code not in OVERLOADED:
                seen.errors.append(f"{way}: {answer.status_code} {text}")
            if answer.status_code in OVERLOADED:
                await asyncio.sleep(chance.random())
            return
        if way == "whole":
            seen.tokens += json.loads(await answer.aread())["usage"]["output_tokens"]
            seen.statuses["200"] += 1
            return
        await _read(seen, answer, way, begun)


async def _read(seen: Seen, answer: httpx.Response, way: str, begun: float) -> None:
    first, kind, tokens = True, "", 0
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: ") and kind == "content_block_delta" and first:
            seen.first.append(time.monotonic() - begun)
            first = False
            if way == "cancel":
                seen.statuses["cancelled"] += 1
                return
        elif line.startswith("data: ") and kind == "message_delta":
            tokens = json.loads(line[6:])["usage"]["output_tokens"]
        elif line.startswith("data: ") and kind == "error":
            kind_of = json.loads(line[6:])["error"]["type"]
            seen.statuses[kind_of] += 1
            if kind_of not in ("overloaded_error", "rate_limit_error"):
                seen.errors.append(f"{way}: in the stream: {line}")
            return
    if kind != "message_stop":
        seen.errors.append(f"{way}: the stream ended after {kind or 'nothing'}")
        return
    seen.tokens += tokens
    seen.statuses["200"] += 1


def _about(file: str, text: str) -> dict[str, Any]:
    document = {"type": "document", "source": {"type": "file", "file_id": file}}
    return {"role": "user", "content": [document, {"type": "text", "text": text}]}


def _still_held(client: httpx.Client) -> int:
    """Requests that the server still works on though nobody waits for them."""
    for _ in range(20):
        found = re.search(r"^ropewalk_requests_in_progress (\S+)$", client.get("/metrics").text, re.MULTILINE)
        assert found is not None, "/metrics does not tell what is in progress"
        held = int(float(found[1])) - 1  # this one
        if held <= 0:
            return 0
        time.sleep(0.5)
    return held


def _quantile(values: list[float], part: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(len(values) * part))], 4) if values else 0.0


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = min(arguments.seconds, QUICK_SECONDS)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
