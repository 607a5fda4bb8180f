"""Many files, each asked about twice, with a tenth of the memory that they all need: what the disk holds is not read again.

    python benchmarks/many_files.py [--quick] [--json FILE] [--files N] [--tokens N]

A real `ropewalk serve` over a model of random weights shaped like Qwen3, in bfloat16. FILES files of TOKENS tokens are uploaded, and
a question is asked about each (cold), then another about each, in another order (again). The memory budget holds a tenth of the files,
the disk all. The server is then started anew with room for half of them on disk, and asked again.

    ttft_p50_*, ttft_p95_*   seconds to the first token, by the clock; cpu_*: CPU seconds of server and engine for the same request
    ratio_p95, ratio_cpu_p95 cold : again
    recomputed_tokens        of files asked about before, those that were read again although the disk held them
    engine_rss_mb            most that the engine had resident after the first file; engine_over_mb: above its memory budget and what
                             it had resident when it was loaded

Gates: recomputed_tokens is 0, each second question reads exactly what the first kept, engine_over_mb stays below MOST_OVER_MB, and the
disk budget is kept to.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from measure import PAGE, cpu_seconds, descendants, machine, table, write_json
from peers.file_servers import Server, ropewalk
from ropewalk.engine.answer import FOLDER
from ropewalk.models.base import make_base, text_at_hand

MODEL = "many-files"
IN_MEMORY = 10  # one file in so many fits in memory
QUICK_FILES = 40
HEAD, HEADS = 64, 2  # size and number of key-value heads
MOST_OVER_MB = 200.0  # of the engine above its budget: what one request being read needs, and what is being written
LOADING_SECONDS = 300.0


@dataclass(frozen=True)
class Shape:
    """How large the model is."""

    layers: int
    width: int

    def bytes_of(self, tokens: int) -> int:
        """Keys and values of so many tokens, in bfloat16."""
        return tokens * self.layers * 2 * HEADS * HEAD * 2


FULL, QUICK = Shape(8, 512), Shape(4, 256)


@dataclass
class Asked:
    """What the questions of one round showed."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)  # by file: tokens of the prompt that were read before
    read: dict[str, int] = field(default_factory=dict)  # by file: tokens that were read now, and kept


def main() -> int:
    arguments = _arguments()
    at_start = machine()
    shape = QUICK if arguments.quick else FULL
    one = shape.bytes_of(arguments.tokens) * 1.02  # a file, and what stands around it
    memory, disk = one * arguments.files / IN_MEMORY, one * arguments.files * 1.05
    with tempfile.TemporaryDirectory(prefix="ropewalk-many-") as folder:
        data, base = Path(folder) / "data", Path(folder) / "base"
        texts = _make(base, shape, arguments.files, arguments.tokens)
        with _served(data, base, memory, disk) as (server, client):
            files = [_upload(client, text) for text in texts]
            chance = random.Random(1)
            loaded = _engine_rss(server)
            cold = Asked()
            most = _round(server, client, files, cold, "What does it say first?")
            chance.shuffle(files)
            again = Asked()
            most = max(most, _round(server, client, files, again, "And what does it say at the end?"))
            on_disk = _disk_used(data)
        with _served(data, base, memory, disk / 2) as (server, client):
            few = files[-arguments.files // 4 :]  # asked about last
            restarted = Asked()
            _round(server, client, few, restarted, "What does it say first?")
            _round(server, client, [_upload(client, texts[0] + " again")], Asked(), "What does it say first?")
        trimmed = _disk_used(data)  # a server that has ended has written all
    whole = {id: cold.known[id] + cold.read[id] for id in files}
    lost = {id: whole[id] - found.known[id] for found in (again, restarted) for id in found.known}
    result: dict[str, Any] = {
        "benchmark": "many_files",
        "quick": arguments.quick,
        "machine": at_start,
        "files": arguments.files,
        "tokens_per_file": round(sum(whole.values()) / len(whole)),
    }
    for name, found in (("cold", cold), ("again", again), ("restart", restarted)):
        for kind, values in (("ttft", found.wall), ("cpu", found.cpu)):
            for share in (50, 95):
                result[f"{kind}_p{share}_{name}_s"] = round(_quantile(values, share / 100), 4)
    result |= {
        "ratio_p95": round(result["ttft_p95_cold_s"] / result["ttft_p95_again_s"], 1),
        "ratio_cpu_p95": round(result["cpu_p95_cold_s"] / result["cpu_p95_again_s"], 1),
        "ratio_cpu_p95_restart": round(result["cpu_p95_cold_s"] / result["cpu_p95_restart_s"], 1),
        "recomputed_tokens": sum(abs(value) for value in lost.values())
        + sum(again.read.values())
        + sum(restarted.read.values()),
        "memory_budget_mb": round(memory / 2**20, 1),
        "engine_rss_mb": round(most / 2**20, 1),
        "engine_over_mb": round((most - loaded - memory) / 2**20, 1),
        "disk_budget_mb": round(disk / 2**20, 1),
        "disk_mb": round(on_disk / 2**20, 1),
        "disk_mb_with_half_the_budget": round(trimmed / 2**20, 1),
    }
    faults = [
        *([f"{result['recomputed_tokens']} tokens were read again"] if result["recomputed_tokens"] else []),
        *([f"the engine takes {result['engine_over_mb']} MB above budget"] if result["engine_over_mb"] > MOST_OVER_MB else []),
        *(["the disk budget is not kept to"] if on_disk > disk or trimmed > disk / 2 else []),
        *(["less than nine tenths of the files are on disk"] if on_disk < 0.9 * one / 1.02 * arguments.files else []),
    ]
    result["correct"] = not faults
    print(table(("", ""), [[name, str(value)] for name, value in result.items() if name != "machine"]))
    for fault in faults:
        print(fault)
    write_json(arguments.json, result)
    return int(bool(faults))


def _make(base: Path, shape: Shape, files: int, tokens: int) -> list[str]:
    """A base of this shape, and texts of so many tokens each."""
    make_base(base, "qwen3", size="small", seed=1)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    made = json.loads((base / "config.json").read_text())
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=8,
        num_key_value_heads=HEADS,
        head_dim=HEAD,
        max_position_embeddings=max(8192, 2 * tokens),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=made["eos_token_id"],
        pad_token_id=made["pad_token_id"],
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    words, chance, texts = " ".join(text_at_hand()).split(), random.Random(2), []
    for _ in range(files):
        text = " ".join(chance.choices(words, k=tokens))
        texts.append(text[: tokenizer.encode(text).offsets[tokens - 1][1]])
    return texts


@contextmanager
def _served(data: Path, base: Path, memory: float, disk: float) -> Iterator[tuple[Server, httpx.Client]]:
    """A server whose model has answered once."""
    models = data.with_name("models.yml")
    options = f"memory_gb: {memory / 2**30:.6f}, disk_gb: {disk / 2**30:.6f}, dtype: bfloat16, threads: 1"
    models.write_text(f"engine: {{{options}}}\nmodels:\n  {MODEL}: {{base: {base}}}\n")
    with ropewalk(data, "--models", str(models)) as server:
        url = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=url, headers=server.headers, timeout=600) as client:
            late = time.monotonic() + LOADING_SECONDS
            while client.post("/v1/messages", json=_question("Hello")).status_code != 200:
                if time.monotonic() > late:
                    raise SystemExit("the model does not answer")
                time.sleep(0.5)
            yield server, client


def _round(server: Server, client: httpx.Client, files: Sequence[str], asked: Asked, question: str) -> int:
    """Asks about each file, one after the other; most that the engine had resident."""
    most = 0
    for id in files:
        content = [{"type": "document", "source": {"type": "file", "file_id": id}}, {"type": "text", "text": question}]
        before, begun = cpu_seconds(server.process.pid), time.perf_counter()
        with client.stream("POST", "/v1/messages", json={**_question(content), "stream": True}) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line[6:])
                if event["type"] == "message_start":
                    usage = event["message"]["usage"]
                    asked.known[id], asked.read[id] = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
                    asked.wall.append(time.perf_counter() - begun)  # it is sent with the first token
                elif event["type"] == "error":
                    raise SystemExit(f"a question was not answered: {event}")
        asked.cpu.append(cpu_seconds(server.process.pid) - before)
        most = max(most, _engine_rss(server))
    return most


def _question(content: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": content}]}


def _upload(client: httpx.Client, text: str) -> str:
    id: str = client.post("/v1/files", files={"file": ("file.txt", text, "text/plain")}).json()["id"]
    return id


def _engine_rss(server: Server) -> int:
    """Resident bytes of the engine's process."""
    for pid in descendants(server.process.pid):
        if b"ropewalk.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    raise SystemExit("the engine is not there any more")


def _disk_used(data: Path) -> int:
    return sum(path.stat().st_size for path in (data / FOLDER).rglob("*") if path.is_file())


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=None, help="default: 100, with --quick 40")
    parser.add_argument("--tokens", type=int, default=4096, help="of each file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer files and a smaller model; under three minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    arguments.files = arguments.files or (QUICK_FILES if arguments.quick else 100)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
