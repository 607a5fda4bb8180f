"""Completions to try rewards on: sampled from the base by the engine, or given in a file. No torch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from ropewalk.chat.template import Template
from ropewalk.config.run import Run
from ropewalk.engine.client import EngineClient
from ropewalk.engine.lines import EngineSettings
from ropewalk.engine.request import Request, Sampling, Span
from ropewalk.errors import BadInput, DataError
from ropewalk.train.prompts import Prompt, some_prompts
from ropewalk.train.reward_functions import Sample

AT_ONCE = 8  # prompts

Groups = list[list[Sample]]  # the completions of each prompt


def sampled(run: Run, base: Path, template: Template, count: int) -> Groups:
    """Completions of some prompts of the run's data by its base, and its adapter where it names one."""
    return asyncio.run(_sampled(run, base, template, some_prompts(run, count)))


def given(path: Path) -> Groups:
    """The rows of a JSONL file, each with the column `completions`, a list, or `completion`."""
    groups: Groups = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", path=path) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"malformed JSON: {error}", path=path, line=number) from None
        found = row.get("completions", [row["completion"]] if "completion" in row else None) if isinstance(row, dict) else None
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise DataError(
                "expected an object with 'completions', a list of texts, beside the columns of the row", path=path, line=number
            )
        asked = row.get("prompt", row.get("messages", ""))
        rest = {key: value for key, value in row.items() if key not in ("completion", "completions")}
        groups.append([Sample(text, asked, rest) for text in found])
    if not groups:
        raise DataError("holds no completion", path=path)
    return groups


async def _sampled(run: Run, base: Path, template: Template, prompts: Sequence[Prompt]) -> Groups:
    assert run.trl is not None
    client = EngineClient(EngineSettings(str(base), weights=str(base), threads=run.num_threads))
    turn = asyncio.Semaphore(AT_ONCE)
    try:
        await client.start()
        adapter = "adapter" if run.lora_model_dir else None
        if adapter:
            await client.load_adapter(adapter, Path(str(run.lora_model_dir)))

        async def group(number: int, prompt: Prompt) -> list[Sample]:
            async with turn:
                return await _group(client, run, template, prompt, number, adapter)

        return list(await asyncio.gather(*(group(number, prompt) for number, prompt in enumerate(prompts))))
    finally:
        await client.stop()


async def _group(
    client: EngineClient, run: Run, template: Template, prompt: Prompt, number: int, adapter: str | None
) -> list[Sample]:
    trl = run.trl
    assert trl is not None
    ids = prompt.ids(template)
    if not ids:
        raise BadInput(f"{prompt.path}:{prompt.line}: the prompt is empty")
    request = Request(
        id=str(number),
        prefix=(Span(tuple(ids[:-1])),) if len(ids) > 1 else (),
        tail=(ids[-1],),
        max_tokens=trl.max_completion_length,
        adapter=adapter,
        sampling=Sampling(trl.temperature, trl.top_p, trl.top_k, trl.min_p, run.seed + number),
        stop_ids=template.stop_ids,
        samples=trl.num_generations,
    )
    found: list[list[int]] = [[] for _ in range(trl.num_generations)]
    async for event in client.generate(request):
        found[event.sample] += event.ids
    return [Sample(template.decode(completion), prompt.asked, prompt.row, tuple(completion)) for completion in found]
