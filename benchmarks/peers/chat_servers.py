"""Chat servers to compare: each in a process of its own with one thread, asked over HTTP in its own protocol, its CPU time read.

The CPU time is the operating system's clock of the server's processes, to the nanosecond, and that of children it has waited for.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from measure import TICK, descendants
from peers.environments import OFFLINE, TRANSFORMERS_SERVE
from peers.file_servers import ropewalk as started
from peers.file_servers import running
from peers.lean_http import free_port
from peers.llama_cpp import SOURCE, ensure

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
QUIET_SHARE, QUIET_SECONDS = 0.05, 0.5  # a server is idle when it uses less of one core than this


class Broken(Exception):
    """A server that died or refused; the message is the first line of what it said."""


@dataclass(frozen=True)
class Answered:
    """One answer, and what the server spent until its first piece."""

    first_cpu_s: float
    text: str
    tokens: int
    read: int  # tokens that the server says it had read before


@dataclass
class ChatServer:
    """A server that runs, and how to ask it about a document."""

    title: str
    version: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # documents that were uploaded -> their ids
    shares: bool = False  # whether many requests at once read what one has read

    def cpu_seconds(self, pids: Sequence[int] | None = None) -> float:
        """CPU seconds of the server so far."""
        total = 0.0
        for pid in pids or descendants(self.process.pid):
            try:
                total += time.clock_gettime(~pid << 3 | 2)  # CLOCK_PROCESS_CPUTIME_ID of another process
                waited = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[13:15]
                total += sum(int(ticks) for ticks in waited) / TICK
            except OSError:
                continue  # it ended, and its parent has waited for it
        return total

    def idle(self, most: float = 60.0) -> None:
        """Returns when the server has nothing left to do, such as writing down what it read."""
        end = time.monotonic() + most
        while time.monotonic() < end:
            before = self.cpu_seconds()
            time.sleep(QUIET_SECONDS)
            if self.cpu_seconds() - before < QUIET_SHARE * QUIET_SECONDS:
                return

    async def ask(self, client: httpx.AsyncClient, document: str, question: str, most: int) -> Answered:
        """Streams an answer about a document ('': about nothing)."""
        ours = self.headers.get("anthropic-version") is not None
        path, body = self._messages(document, question, most) if ours else self._completion(document, question, most)
        pids = descendants(self.process.pid)
        before, first, pieces, usage = self.cpu_seconds(pids), 0.0, list[str](), dict[str, Any]()
        async with client.stream("POST", self.url + path, json=body, headers=dict(self.headers)) as response:
            if response.status_code != 200:
                raise Broken(_sentence(await response.aread()))
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if event.get("error"):
                    raise Broken(_sentence(line[6:].encode()))
                piece, told = _of_messages(event) if ours else _of_completion(event)
                usage |= {name: count for name, count in told.items() if count is not None}
                if piece:
                    first = first or self.cpu_seconds(pids) - before
                    pieces.append(piece)
        if not pieces:
            raise Broken("answered without a word")
        tokens = usage.get("output_tokens") or usage.get("completion_tokens") or len(pieces)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answered(first, "".join(pieces), tokens, usage.get("cache_read_input_tokens") or cached or 0)

    def _messages(self, document: str, question: str, most: int) -> tuple[str, dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if document:
            if document not in self.files:
                sent = {"file": ("document.txt", document.encode(), "text/plain")}
                answer = httpx.post(self.url + "/v1/files", files=sent, headers=self.headers, timeout=60)
                self.files[document] = answer.raise_for_status().json()["id"]
            source = {"type": "file", "file_id": self.files[document]}
            content.insert(0, {"type": "document", "source": source})
        turn = {"role": "user", "content": content}
        return "/v1/messages", _body(self.model, most) | {"messages": [turn]}

    def _completion(self, document: str, question: str, most: int) -> tuple[str, dict[str, Any]]:
        turn = {"role": "user", "content": f"{document}\n{question}" if document else question}
        asked = _body(self.model, most) | {"messages": [turn], "stream_options": {"include_usage": True}}
        return "/v1/chat/completions", asked


def _body(model: str, most: int) -> dict[str, Any]:
    return {"model": model, "max_tokens": most, "temperature": 0, "stream": True}


def _of_messages(event: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    delta = event.get("delta") or {}
    return delta.get("text") or "", event.get("usage") or (event.get("message") or {}).get("usage") or {}


def _of_completion(event: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content") or "", event.get("usage") or {}


def _sentence(said: bytes) -> str:
    text = said.decode(errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error") or found.get("detail") or found
        text = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return next((line for line in text.splitlines() if line.strip()), "an error without a word")[:200]


# -- the servers


@contextmanager
def ropewalk(model: Path, folder: Path, *, install: bool) -> Iterator[ChatServer]:
    """`ropewalk serve` with a model in its models.yml."""
    from importlib.metadata import version

    folder.mkdir(parents=True)
    models, data = folder / "models.yml", folder / "data"
    models.write_text(f"engine: {{threads: 1, memory_gb: 4, disk_gb: 8}}\nmodels: {{bench: {{base: {model}}}}}\n")
    with started(data, "--models", str(models), **ONE_THREAD) as server:
        url, log = f"http://127.0.0.1:{server.port}", data.with_suffix(".log")
        yield ChatServer("ropewalk serve", version("ropewalk"), server.process, log, url, "bench", server.headers, shares=True)


@contextmanager
def transformers(model: Path, folder: Path, *, install: bool, batching: bool = False) -> Iterator[ChatServer]:
    """`transformers serve`, with or without its continuous batching."""
    found = TRANSFORMERS_SERVE.ensure(install=install)["transformers"]
    folder.mkdir(parents=True)
    port = free_port()
    command = [TRANSFORMERS_SERVE.program("transformers"), "serve", str(model), "--device", "cpu", "--port", str(port)]
    # Without a GPU it cannot tell how much memory there is: room for 16 times 16k tokens that have a document in common.
    batches = ["--continuous-batching", "--cb-block-size", "64", "--cb-num-blocks", "600", "--cb-max-batch-tokens", "1024"]
    command += ["--host", "127.0.0.1", *(batches if batching else [])]
    title = "transformers serve" + (" --continuous-batching" if batching else "")
    with _running(command, folder, port, TRANSFORMERS_SERVE.variables | OFFLINE) as (process, log):
        yield ChatServer(title, found, process, log, f"http://127.0.0.1:{port}", str(model), shares=batching)


@contextmanager
def llama(model: Path, folder: Path, *, install: bool) -> Iterator[ChatServer]:
    """llama.cpp's server over the same weights as GGUF, its prompt cache as it comes."""
    program, found = ensure(install=install)
    TRANSFORMERS_SERVE.ensure(install=install)  # the converter needs torch and transformers
    folder.mkdir(parents=True)
    converter = Path(__file__).parent / "to_gguf.py"
    converted = folder / "model.gguf"
    command = [TRANSFORMERS_SERVE.program("python"), str(converter), str(SOURCE), str(model), str(converted)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | OFFLINE | ONE_THREAD, check=False)
    if done.returncode:
        raise Broken(f"the converter: {done.stderr.strip().splitlines()[-1][:200]}")
    port = free_port()
    # One slot would answer one after the other; four share one cache of keys and values.
    served = [str(program), "-m", str(converted), "-t", "1", "-tb", "1", "-c", "72000", "-np", "4", "--kv-unified"]
    served += ["--host", "127.0.0.1", "--port", str(port), "--alias", "bench", "--no-webui"]
    with _running(served, folder, port, {}) as (process, log):
        yield ChatServer("llama-server", found, process, log, f"http://127.0.0.1:{port}", "bench")


@contextmanager
def _running(command: list[str], folder: Path, port: int, variables: Mapping[str, str]) -> Iterator[tuple[Any, Path]]:
    with running(command, folder, ONE_THREAD | {"PYTHONWARNINGS": "ignore"} | dict(variables)) as (process, log):
        _wait(process, port, log)
        yield process, log


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Broken(last_error(log) or f"ended with {process.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise Broken(f"was not ready after {seconds:.0f} seconds")


def last_error(log: Path) -> str:
    """The last line of a log that names an error; '' where none does."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    named = [line for line in lines if "Error" in line or "error:" in line or "failed" in line]
    return named[-1][:200] if named else ""
