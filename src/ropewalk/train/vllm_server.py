"""A vLLM server over HTTP, as far as training by rewards needs it: completions of ids, and adapters by name. No torch.

What is relied on, from vLLM's sources (vllm/entrypoints/openai/completion/protocol.py and serve/lora/api_router.py, 2026):

    GET  /health                      200 when the engine is well
    GET  /v1/models                   data: [{id, root, max_model_len}, ...], the base first, then adapters
    POST /v1/completions              prompt: [ids], return_token_ids -> choices[].token_ids, finish_reason; logprobs: 0 ->
                                      choices[].logprobs.token_logprobs, of the sampled ids alone. Before temperature and truncation
                                      unless the server runs with --logprobs-mode processed_logprobs, then after both.
    POST /v1/load_lora_adapter        {lora_name, lora_path, is_3d_lora_weight}, and /v1/unload_lora_adapter {lora_name}: there only under --enable-lora and
                                      VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; the path is read by the server

Every wait has a bound. A server that is overloaded or cannot be reached is asked again, before the bound.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass
from typing import Any

import httpx

from ropewalk.engine.request import Sampling
from ropewalk.errors import Overloaded, UpstreamFailed, UpstreamTimedOut

CONNECT_SECONDS = 10.0
CONTROL_SECONDS = 120.0  # for an adapter to be read, or a list to be given
COMPLETION_SECONDS = 1800.0  # for one completion, waiting in the server's queue and all
PAUSE_SECONDS = 0.5  # before the second try, twice as long before each further one
TRIES = 6
AGAIN = frozenset({429, 502, 503, 504})
MOST_TOLD = 500  # characters of what the server says


@dataclass(frozen=True)
class Written:
    """One completion.  server -> generator"""

    ids: list[int]
    logprobs: list[float]
    ended: bool


class Refused(Exception):
    """The server's answer to a question that it will not do: its status and what it says."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


class VllmServer:
    """The server, with a loop of its own that asks it."""

    def __init__(self, url: str, *, at_once: int, completion_seconds: float = COMPLETION_SECONDS) -> None:
        self.url, self.completion_seconds = url.rstrip("/"), completion_seconds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._places = asyncio.Semaphore(at_once)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(completion_seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=at_once + 4),
        )

    def close(self) -> None:
        """Lets go of the server; what is being written there is broken off."""
        if self._loop.is_closed():
            return
        self._wait(self._shut(), CONTROL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONTROL_SECONDS)
        self._loop.close()

    # -- what is asked

    def wait_until_well(self, seconds: float) -> None:
        """Returns when the server answers that it is well."""
        end, said = time.monotonic() + seconds, "nothing answers there"
        while True:
            try:
                answer = self._wait(self._get("/health"), CONNECT_SECONDS * 2)
            except (httpx.HTTPError, TooLate) as error:
                said = f"{type(error).__name__}: {error}".rstrip(": ")
            else:
                if answer.status_code == 200:
                    return
                said = f"it answers {answer.status_code}"
            if time.monotonic() >= end:
                raise UpstreamTimedOut(
                    f"no vLLM server is well at {self.url} within {seconds:g} seconds ({said[:MOST_TOLD]}); start it, or see "
                    "trl.vllm_server_host, trl.vllm_server_port and trl.vllm_server_timeout"
                )
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def models(self) -> list[Mapping[str, Any]]:
        """The base and its adapters."""
        answer = self._wait(self._get("/v1/models"), CONTROL_SECONDS)
        found = self._object(answer).get("data")
        if answer.status_code != 200 or not isinstance(found, list):
            raise self._failed(f"answers {answer.status_code} when asked for its models")
        return found

    def load_adapter(self, name: str, path: str, *, experts: bool) -> None:
        """The server reads an adapter's folder; `Refused` where it will not. `experts`: it holds factors of stacks of experts."""
        self._control("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, "is_3d_lora_weight": experts})

    def unload_adapter(self, name: str) -> None:
        """Nothing where it is not there any more."""
        try:
            self._control("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as refused:
            if refused.status not in (400, 404):
                raise

    def complete(
        self,
        model: str,
        ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        stops: Sequence[str] = (),
    ) -> Future[Written]:
        """One completion, on its way; cancelling it breaks it off in the server too."""
        body = {
            "model": model,
            "prompt": list(ids),
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "seed": sampling.seed,
            # The base's generation_config.json would fill in what is left out.
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(stop_ids),
            "stop": list(stops),
            "ignore_eos": True,  # which ids end a completion is said by stop_token_ids alone
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        return asyncio.run_coroutine_threadsafe(self._complete(body), self._loop)

    # -- how

    async def _complete(self, body: Mapping[str, Any]) -> Written:
        async with self._places:
            try:
                async with asyncio.timeout(self.completion_seconds):
                    answer = await self._patiently("/v1/completions", body)
            except TimeoutError:
                raise UpstreamTimedOut(
                    f"the vLLM server at {self.url} has not written a completion of up to {body['max_tokens']} tokens within "
                    f"{self.completion_seconds:g} seconds; look at its log"
                ) from None
        return self._read(answer)

    def _read(self, answer: Mapping[str, Any]) -> Written:
        choice = (answer.get("choices") or [{}])[0]
        ids, said = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list):
            raise self._failed("gives no ids of what it writes (return_token_ids); vLLM does from 0.10.2 on")
        if not isinstance(said, list) or len(said) != len(ids) or any(value is None for value in said):
            raise self._failed("gives no log-probability for each id that it writes (logprobs)")
        if choice.get("finish_reason") not in ("stop", "length"):
            raise self._failed(f"broke a completion off: finish_reason is {choice.get('finish_reason')!r}")
        return Written([int(i) for i in ids], [float(value) for value in said], choice["finish_reason"] == "stop")

    async def _patiently(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Asks again where the server is overloaded or out of reach; the caller bounds the whole."""
        for number in range(1, TRIES + 1):
            said = ""
            try:
                answer = await self._http.post(path, json=body, headers=_headers())
                if answer.status_code == 200:
                    return self._object(answer)
                said = f"{answer.status_code}: {_message(answer)}"
                if answer.status_code not in AGAIN:
                    raise Refused(answer.status_code, _message(answer))
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}".rstrip(": ")
            if number < TRIES:
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (number - 1))
        if said[:3] in ("429", "503"):
            raise Overloaded(f"the vLLM server at {self.url} is overloaded, asked {TRIES} times ({said[:MOST_TOLD]})")
        raise self._failed(f"does not answer, asked {TRIES} times ({said[:MOST_TOLD]})")

    def _control(self, path: str, body: Mapping[str, Any]) -> None:
        async def ask() -> httpx.Response:
            return await self._http.post(path, json=body, headers=_headers(), timeout=CONTROL_SECONDS)

        try:
            answer = self._wait(ask(), CONTROL_SECONDS)
        except (httpx.HTTPError, TooLate) as error:
            raise self._failed(f"does not answer {path} ({type(error).__name__}: {error})") from error
        if answer.status_code != 200:
            raise Refused(answer.status_code, _message(answer))

    async def _get(self, path: str) -> httpx.Response:
        return await self._http.get(path, headers=_headers(), timeout=CONNECT_SECONDS)

    async def _shut(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def _wait(self, asked: Coroutine[Any, Any, Any], seconds: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(asked, self._loop)
        try:
            return future.result(seconds)
        except TooLate:
            future.cancel()
            raise

    def _object(self, answer: httpx.Response) -> Mapping[str, Any]:
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._failed(f"answers with what is no JSON object ({answer.status_code}); is it a vLLM server?")
        return found

    def _failed(self, what: str) -> UpstreamFailed:
        return UpstreamFailed(f"the vLLM server at {self.url} {what}")


def _headers() -> dict[str, str]:
    key = os.environ.get("VLLM_API_KEY", "")  # which a server that was started with --api-key wants
    return {"authorization": f"Bearer {key}"} if key else {}


def _message(answer: httpx.Response) -> str:
    """What an error says, in vLLM's shape or in FastAPI's."""
    try:
        found = answer.json()
    except ValueError:
        return answer.text[:MOST_TOLD]
    inner = found.get("error", found) if isinstance(found, dict) else found
    said = (inner.get("message") or inner.get("detail")) if isinstance(inner, dict) else inner
    return str(said)[:MOST_TOLD]
