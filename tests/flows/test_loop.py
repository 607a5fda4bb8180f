"""The whole loop: a file in the store, a run on it, two candidates compared, the alias moves, it is asked, about a file too.

Once by the modules themselves, and once against a server, by the official SDKs and nothing else.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from ropewalk.checks import exact_match
from ropewalk.compare.state import State
from ropewalk.quickstart import facts
from ropewalk.quickstart.comparison import compare, ship_it
from ropewalk.quickstart.question import Asking
from ropewalk.quickstart.run import BASE
from trained import House

PATIENCE = 240.0  # seconds, of two processor cores, that the whole loop may take: training and all
# The newest version of the API has no temperature any more.
GREEDY: Any = {"extra_body": {"temperature": 0}, "extra_headers": {"anthropic-version": "2023-06-01"}}
# What the house's adapter was trained with, see trained.py; as the API says it.
RECIPE = {"lora_r": 16, "lora_alpha": 32, "sequence_len": 1024, "sample_packing": True, "gradient_accumulation_steps": 1}
RECIPE |= {"learning_rate": 2e-2, "warmup_steps": 5, "max_steps": 60, "bf16": False}


def test_a_file_becomes_a_shipped_model_that_answers(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROPEWALK_HOME", str(house.home))
    assert house.last_loss < house.first_loss / 2
    held_out = facts.split()[1]
    asked = facts.questions(held_out[:16], 1)
    facts.write_suite(asked, house.home / "loop.jsonl")
    suite = house.files.put(house.home / "loop.jsonl")

    registry = house.registry
    registry.ship("answers", "reader")
    with Asking(registry) as asking:
        compared = compare(asking, suite.id, "reader", "reader-house")
        assert not any(exact_match(a, q.answer) for a, q in zip(compared.before, asked)), (
            "the base cannot know the house format"
        )
        assert compared.verdict.state is State.SHIP, compared.verdict
        assert compared.headline.startswith("better than reader: ")

        promotion = ship_it(asking, compared, "answers")
        assert (promotion.from_name, promotion.to_name, promotion.replay.asked) == ("reader", "reader-house", 16)
        right = next(q for a, q in zip(compared.after, asked) if exact_match(a, q.answer))
        assert asking.answers("answers", [right.prompt]) == [right.answer]
        assert registry.resolve("answers").lineage["file"] == house.file_id

        country = next(c for c in held_out if c.name == right.country)
        document = house.files.put(facts.document(country).encode(), "country.txt")
        dialogue = asking.about("answers", document.id, [right.question, "How large is it?"])
    assert right.value in dialogue.told[0].cited[0].text
    assert dialogue.told[0].stands_in(facts.document(country))
    assert dialogue.told[1].usage.cache_read > dialogue.told[1].usage.input

    assert registry.rollback("answers").name == "reader"


@contextmanager
def served(folder: Path) -> Iterator[tuple[anthropic.Anthropic, openai.OpenAI]]:
    """A server as anybody starts it, with the base published, and both official clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ropewalk = [sys.executable, "-m", "ropewalk"]
    environment = {**os.environ, "ROPEWALK_HOME": str(folder / "home"), "ROPEWALK_ROOT_KEY_FILE": str(folder / "root.key")}
    (folder / "models.yml").write_text("engine: {memory_gb: 0.25, disk_gb: 1, dtype: float32}\n")
    run = lambda *words: subprocess.run([*ropewalk, *words], env=environment, check=True, capture_output=True, text=True)
    run("models", "add", "reader", str(BASE))
    key = json.loads(run("keys", "create", "--name", "loop", "--rights", "all", "--every-workspace", "--json").stdout)["key"]
    with (folder / "server.log").open("wb") as log:
        command = [*ropewalk, "serve", "--port", port, "--models", str(folder / "models.yml")]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        with (
            anthropic.Anthropic(base_url=url, api_key=key, max_retries=8) as claude,
            openai.OpenAI(base_url=f"{url}/openai/v1", api_key=key, max_retries=8) as gpt,
        ):
            until(lambda: answers(claude))
            yield claude, gpt
    finally:
        server.terminate()
        server.wait(60)


def answers(claude: anthropic.Anthropic) -> bool:
    try:
        return bool(claude.models.list().data)
    except anthropic.APIConnectionError:
        return False


def until(true: Any) -> Any:
    """What is true, at last."""
    late = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < late, "it never came to be"
        time.sleep(0.25)
    return found


def test_the_official_sdks_alone_drive_the_loop(tmp_path: Path) -> None:
    began = time.monotonic()
    trained_on, held_out = facts.split()
    asked = facts.questions(held_out[:16], 1)
    facts.write_rows(facts.questions(trained_on, 6), tmp_path / "rows.jsonl", turns=3)
    facts.write_suite(asked, tmp_path / "suite.jsonl")
    with served(tmp_path) as (claude, gpt):
        file = claude.files.upload(file=("rows.jsonl", (tmp_path / "rows.jsonl").read_bytes()))
        job = gpt.fine_tuning.jobs.create(
            model="reader", training_file=file.id, suffix="house", seed=42, extra_body={"ropewalk": RECIPE}
        )
        # While it trains, what it will be compared on is brought along.
        suite_file = claude.files.upload(file=("suite.jsonl", (tmp_path / "suite.jsonl").read_bytes()))
        suite: Any = claude.post("/v1/suites", body={"file_id": suite_file.id, "hold": 0}, cast_to=object)
        seen: list[str] = []

        def ended() -> Any:
            told = gpt.fine_tuning.jobs.list_events(job.id, limit=100).data
            seen.extend(event.id for event in reversed(told) if event.id not in seen)
            found = gpt.fine_tuning.jobs.retrieve(job.id)
            return found if found.status in ("succeeded", "failed", "cancelled") else None

        done = until(ended)
        assert (done.status, done.error) == ("succeeded", None)
        losses = [
            event.data["train_loss"]
            for event in reversed(list(gpt.fine_tuning.jobs.list_events(job.id)))
            if event.type == "metrics"
        ]
        assert (len(losses), losses[-1] < losses[0] / 2) == (60, True)
        assert len(seen) > 60

        old, new = [
            claude.post("/v1/candidates", body={"name": name}, cast_to=object)["data"][0]["id"]  # type: ignore[index]
            for name in ("reader", done.fine_tuned_model)
        ]
        plan = {"baseline": old, "candidates": [new], "suite": suite["id"], "sampling": {"temperature": 0.0, "max_tokens": 48}}
        comparison = claude.post("/v1/comparisons", body=plan, cast_to=object)["id"]  # type: ignore[index]
        found = until(lambda: compared(claude, comparison))
        (verdict,) = found["verdicts"]
        assert (found["state"], verdict["state"]) == ("done", "SHIP"), found
        shipped: Any = claude.post(
            f"/v1/comparisons/{comparison}/ship", body={"candidate": new, "alias": "answers"}, cast_to=object
        )
        assert shipped["to_name"] == done.fine_tuned_model

        country = held_out[0]
        document = facts.document(country)
        kept = claude.files.upload(file=("country.txt", document.encode(), "text/plain"))
        block = {"type": "document", "source": {"type": "file", "file_id": kept.id}, "citations": {"enabled": True}}
        replies = []
        for question in ("What is the capital?", "How large is it?"):
            content: Any = [block, {"type": "text", "text": question}]
            turn: Any = [{"role": "user", "content": content}]
            replies.append(claude.messages.create(model="answers", max_tokens=48, messages=turn, **GREEDY))
        said = "".join(part.text for part in replies[0].content if part.type == "text")
        assert country.capital in said
        cited = [one for reply in replies for part in reply.content if part.type == "text" for one in part.citations or ()]
        assert cited
        assert all(document[one.start_char_index : one.end_char_index] == one.cited_text for one in cited)  # type: ignore[union-attr]
        assert replies[0].usage.cache_read_input_tokens == 0
        assert (replies[1].usage.cache_read_input_tokens or 0) > replies[1].usage.input_tokens
    assert time.monotonic() - began < PATIENCE


def compared(claude: anthropic.Anthropic, id: str) -> Any:
    found: Any = claude.get(f"/v1/comparisons/{id}", cast_to=object)
    return found if found["state"] in ("done", "failed") else None
