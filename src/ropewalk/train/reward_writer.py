"""Who writes completions to try rewards on: the base in an engine, held as the run holds it, or the run's vLLM server. No torch.

Either with the adapter that the run goes on from, where it names one.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ropewalk.config.run import Run
from ropewalk.config.vllm import by_server, server_url
from ropewalk.engine.client import EngineClient
from ropewalk.engine.lines import EngineSettings
from ropewalk.engine.request import Request, Sampling, Span
from ropewalk.errors import UpstreamFailed
from ropewalk.train.environment import Generated
from ropewalk.train.vllm_server import Refused, VllmServer

COME_UP_SECONDS = 240.0
ADAPTER = "adapter"


class Writer(Protocol):
    """Goes on from ids, in so many ways."""

    async def __call__(
        self, ids: Sequence[int], samples: int, most: int, sampling: Sampling, stop_ids: Sequence[int]
    ) -> list[Generated]: ...


@asynccontextmanager
async def writing(run: Run, base: Path, *, at_once: int) -> AsyncIterator[Writer]:
    """The writer of a run's completions; `at_once` prompts are asked for side by side."""
    trl = run.trl
    assert trl is not None
    adapter = Path(run.lora_model_dir) if run.lora_model_dir else None
    if by_server(run):
        server = VllmServer(server_url(run), at_once=at_once * trl.num_generations)
        try:
            await asyncio.to_thread(server.wait_until_well, trl.vllm_server_timeout or COME_UP_SECONDS)
            with _served(server, adapter) as model:
                yield _Server(server, model)
        finally:
            server.close()
        return
    settings = EngineSettings(str(base), weights=str(base), threads=run.num_threads, quantize=run.quantization)
    client = EngineClient(settings)
    try:
        await client.start()
        if adapter:
            await client.load_adapter(ADAPTER, adapter)
        yield _Engine(client, ADAPTER if adapter else None)
    finally:
        await client.stop()


class _Engine:
    """In a process of its own on this machine."""

    def __init__(self, client: EngineClient, adapter: str | None) -> None:
        self._client, self._adapter, self._asked = client, adapter, 0

    async def __call__(
        self, ids: Sequence[int], samples: int, most: int, sampling: Sampling, stop_ids: Sequence[int]
    ) -> list[Generated]:
        self._asked += 1
        request = Request(
            id=str(self._asked),
            prefix=(Span(tuple(ids[:-1])),) if len(ids) > 1 else (),
            tail=(ids[-1],),
            max_tokens=most,
            adapter=self._adapter,
            sampling=sampling,
            stop_ids=tuple(stop_ids),
            samples=samples,
        )
        found: list[list[int]] = [[] for _ in range(samples)]
        ended = [False] * samples
        async for event in self._client.generate(request):
            found[event.sample] += event.ids
            ended[event.sample] |= event.finish == "stop"
        return [_written(ids, end) for ids, end in zip(found, ended)]


class _Server:
    """By a vLLM server."""

    def __init__(self, server: VllmServer, model: str) -> None:
        self._server, self._model = server, model

    async def __call__(
        self, ids: Sequence[int], samples: int, most: int, sampling: Sampling, stop_ids: Sequence[int]
    ) -> list[Generated]:
        own = [replace(sampling, seed=None if sampling.seed is None else sampling.seed + sample) for sample in range(samples)]
        asked = [self._server.complete(self._model, ids, max_tokens=most, sampling=one, stop_ids=stop_ids) for one in own]
        try:
            found = await asyncio.gather(*map(asyncio.wrap_future, asked))
        except Refused as refused:
            raise UpstreamFailed(f"the vLLM server at {self._server.url} answers {refused.status}: {refused.said}") from None
        return [_written(one.ids, one.ended) for one in found]


@contextmanager
def _served(server: VllmServer, adapter: Path | None) -> Iterator[str]:
    """The name under which the server writes as the run begins."""
    if adapter is None:
        models = server.models()
        if not models:
            raise UpstreamFailed(f"the vLLM server at {server.url} serves nothing; start it with the base of this run")
        yield str(models[0]["id"])
        return
    name = f"ropewalk-check-{secrets.token_hex(5)}"
    asked = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    try:
        server.load_adapter(name, str(adapter.resolve()), experts=bool(asked.get("target_parameters")))
    except Refused as refused:
        raise UpstreamFailed(f"the vLLM server at {server.url} does not take the adapter {adapter}: {refused.said}") from None
    try:
        yield name
    finally:
        server.unload_adapter(name)


def _written(ids: list[int], ended: bool) -> Generated:
    return Generated(ids, [0.0] * len(ids), [0] * len(ids), ended)
