"""Chat servers side by side: CPU seconds of the server, from a question about a document to the first piece of the answer.

    python benchmarks/serve_peers.py [--quick] [--only ARCHITECTURE] [--servers NAME ...] [--json FILE]

For the models of serve.py, each server in a process of its own, with one thread, over HTTP: ropewalk serve (the document by its file
id), transformers serve without and with continuous batching, llama.cpp's server over the same weights as GGUF. For documents of 4,096
and 16,384 tokens:

    first_4k, second_4k    CPU seconds to the first piece of the answer to the first question about a document, and to another question
                           (the least of three; of one where the server begins anew); ratio_4k: the one by the other
    users_ms_per_token     CPU milliseconds of the server for each token of `users` answers of 48 tokens (with --quick 16) at once, about
                           the longest document, asked before: what is read for them included. 16 users, or 2 where a server
                           reads the document anew for each and 16 would cost minutes
    same_text              whether the first question, asked again, is answered with the same text

Where a server dies or refuses, its error is the entry. Gates, of ours: same_text, and a second question that reads the document from
the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from measure import machine, table, write_json
from peers.chat_assets import document, save_model
from peers.chat_servers import Broken, ChatServer, last_error, llama, ropewalk, transformers
from peers.environments import NotInstalled
from serve import ARCHITECTURES, build

SERVERS: dict[str, Callable[..., AbstractContextManager[ChatServer]]] = {
    "ropewalk": ropewalk,
    "transformers": transformers,
    "transformers_batching": partial(transformers, batching=True),
    "llama_cpp": llama,
}
QUESTIONS = tuple(
    " ".join(["tell me about", *words.split(), "in the document above"]) for words in ("abc def", "ghi jkl", "mno pqr")
)
NEW, USERS_NEW, USERS_NEW_QUICK, USERS, FEW = 8, 48, 16, 16, 2
REREADS = 4  # a second question that costs more than a fourth of the first
PATIENCE = 900.0


def peers(quick: bool, only: str | None, servers: Collection[str] = tuple(SERVERS)) -> dict[str, dict[str, Any]]:
    """architecture -> server -> figures, or {"error": why there are none}."""
    found: dict[str, dict[str, Any]] = {}
    names = [only] if only else ["qwen3"] if quick else list(ARCHITECTURES)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="ropewalk-peers-") as temporary:
            folder = Path(temporary)
            save_model(build(name, quick), folder / "model")
            found[name] = {}
            for server in servers:
                begun = time.monotonic()
                found[name][server] = _measured(SERVERS[server], folder, server, quick)
                seconds = time.monotonic() - begun
                print(f"{name} {server} ({seconds:.0f} s): {json.dumps(found[name][server])}", file=sys.stderr, flush=True)
    return found


def _measured(start: Callable[..., AbstractContextManager[ChatServer]], folder: Path, name: str, quick: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    try:
        with start(folder / "model", folder / name, install=not quick) as running:
            figures |= {"title": running.title, "version": running.version}
            try:
                asyncio.run(_questions(running, quick, figures))
            except (Broken, httpx.HTTPError) as error:
                time.sleep(1)  # until it has written down why
                said = "Internal Server Error" not in str(error) and isinstance(error, Broken)
                figures["error"] = str(error) if said else last_error(running.log) or f"{type(error).__name__}: {error}"[:200]
    except (Broken, NotInstalled, RuntimeError) as error:
        figures["error"] = str(error)[:200]
    return figures


async def _questions(server: ChatServer, quick: bool, figures: dict[str, Any]) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as client:
        await _loaded(server, client)
        for name, tokens in (("4k", 4096), *([] if quick else [("16k", 16_384)])):
            text = document(tokens, seed=tokens)
            first = await _asked(server, client, text, QUESTIONS[0], NEW)
            second = await _asked(server, client, text, QUESTIONS[1], NEW)
            figures |= {f"first_{name}": first.first_cpu_s, f"second_{name}": second.first_cpu_s}
            again = await _asked(server, client, text, QUESTIONS[0], NEW)
            least = second.first_cpu_s
            rereads = least > first.first_cpu_s / REREADS
            for _ in range(0 if rereads else 2):
                least = min(least, (await _asked(server, client, text, QUESTIONS[2], NEW)).first_cpu_s)
            same = figures.get("same_text", True) and again.text == first.text
            figures |= {f"second_{name}": least, f"ratio_{name}": first.first_cpu_s / least, "same_text": same}
            figures["read"] = second.read
        users = USERS if server.shares and not rereads else FEW
        server.idle()
        before = server.cpu_seconds()
        texts = [f"{QUESTIONS[0]}, user {number}" for number in range(users)]
        most = USERS_NEW_QUICK if quick else USERS_NEW
        answers = await asyncio.gather(*(server.ask(client, text, question, most) for question in texts))
        tokens = sum(answer.tokens for answer in answers)
        figures |= {"users": users, "users_ms_per_token": (server.cpu_seconds() - before) / tokens * 1e3}


async def _asked(server: ChatServer, client: httpx.AsyncClient, text: str, question: str, most: int) -> Any:
    await asyncio.to_thread(server.idle)
    return await server.ask(client, text, question, most)


async def _loaded(server: ChatServer, client: httpx.AsyncClient) -> None:
    """Asks about nothing until the model is there."""
    end = time.monotonic() + 180
    while True:
        try:
            await server.ask(client, "", QUESTIONS[0], 2)
            return
        except Broken as error:
            if "being loaded" not in str(error) or time.monotonic() > end:
                raise
        await asyncio.sleep(2)


def gates(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What must hold for ours, by architecture."""
    ours = {name: servers["ropewalk"] for name, servers in found.items() if "ropewalk" in servers}
    return {
        f"{name}: {gate}": passed
        for name, figures in ours.items()
        for gate, passed in (
            ("answers", "error" not in figures),
            ("the same text the second time", figures.get("same_text", False)),
            ("the second question reads from the cache", figures.get("read", 0) > 4000),
        )
    }


def report(found: dict[str, dict[str, Any]]) -> str:
    """One row for each architecture and server."""
    keys = (
        "first_4k",
        "second_4k",
        "ratio_4k",
        "first_16k",
        "second_16k",
        "ratio_16k",
        "users",
        "users_ms_per_token",
        "same_text",
    )
    rows = [
        [architecture, figures.get("title", server), *(figures.get(key) for key in keys), figures.get("error", "")[:80]]
        for architecture, servers in found.items()
        for server, figures in servers.items()
    ]
    return table(["model", "server", *(key.replace("_", " ") for key in keys), "error"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller Qwen3, 4,096 tokens, servers already installed")
    parser.add_argument("--only", choices=sorted(ARCHITECTURES), help="one architecture")
    parser.add_argument("--servers", nargs="+", choices=sorted(SERVERS), default=list(SERVERS), help="which servers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    at_start = machine()
    found = peers(arguments.quick, arguments.only, arguments.servers)
    passed = gates(found)
    print(report(found))
    for name, held in passed.items():
        print(f"gate {name}: {'passed' if held else 'FAILED'}")
    write_json(arguments.json, {"machine": at_start, "quick": arguments.quick, "gates": passed, "peers": found})
    return int(not all(passed.values()))


if __name__ == "__main__":
    sys.exit(main())
