"""Chat completions and completions over a model while it is trained: environments that speak OpenAI's protocol drive it by HTTP.

The shapes are those of /openai/v1, with ids, log-probabilities (at the sampling temperature, untruncated) and the version of the
adapter that sampled each id. It serves one run, at an address of its own, for as long as the run lasts: anybody who has the run's key,
beside the training; or the run's own rollouts, each with a key of its own, which samples as the run does and is learnt from.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ropewalk.chat.messages import MessagesRequest, Started, Usage
from ropewalk.chat.prompt import raw_ids, render
from ropewalk.chat.replies import TAIL, parser_for, stop_ids
from ropewalk.chat.template import Template
from ropewalk.engine.replying import Plain, Reply, Stops
from ropewalk.engine.request import Event, Sampling
from ropewalk.errors import AuthenticationFailed, BadInput, RopewalkError
from ropewalk.ids import new_id
from ropewalk.server.auth import secret_of
from ropewalk.server.body import read_json
from ropewalk.server.live_policy import Asked, LivePolicy
from ropewalk.server.messages import MAX_BYTES, begun, unless_gone
from ropewalk.server.node import Node
from ropewalk.server.openai_chat import Indexed, together
from ropewalk.server.openai_errors import refusal
from ropewalk.server.openai_models import OWNER, unknown
from ropewalk.server.openai_replies import DONE, ChatWriter, CompletionWriter, Writer, sent_error
from ropewalk.server.openai_wire import read_chat, read_completion
from ropewalk.server.settings import ServerSettings
from ropewalk.server.streaming import Streamed
from ropewalk.server.wire import JSON, Failure, failure

KEY_ENV = "ROPEWALK_ENDPOINT_KEY"
STOP_SECONDS = 5.0
ROLLOUTS_WAITING = 4096  # requests of a run's own rollouts, which it bounds itself


class Session(Protocol):
    """One rollout of the run, whose calls are learnt from."""

    @property
    def asked(self) -> Sampling:
        """The run's sampling, which a call may say again."""

    @property
    def most(self) -> int:
        """Ids of one reply."""

    def next_sampling(self) -> Sampling:
        """That of one more call."""

    def align(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A prompt's ids, with those that were sampled instead of others that read the same."""

    def ends(self, ids: Sequence[int]) -> Sequence[int]:
        """Where they are cut, so that nothing is read twice."""

    def add(self, ids: Sequence[int], generated: Any, text: str) -> None:
        """What was sampled behind them."""


class Sessions(Protocol):
    """The rollouts under way."""

    def find(self, key: str) -> Session | None:
        """That which a key opens."""


@dataclass(frozen=True)
class Policy:
    """The model that is asked."""

    name: str
    template: Template
    longest: int  # ids of prompt and reply
    live: LivePolicy
    version: Callable[[], int]  # of its adapter, now

    def replies(self, asked: MessagesRequest, first: int = 0, session: Session | None = None) -> AsyncGenerator[Indexed, None]:
        """All replies of one request, numbered from `first`; BadInput for what is not done while a model is trained."""
        if asked.model != self.name:
            raise unknown(asked.model)
        refused = {
            "top_logprobs": asked.top,
            "messages": asked.documents() or asked.images(),
            "response_format": asked.schema,
            "tool_choice": asked.tool_choice.kind in ("any", "tool"),
            "reasoning_effort": asked.effort not in ("", "max"),
        }
        for name, given in refused.items():
            if given:
                what = "no files and no pictures are shown" if name == "messages" else "it is not followed"
                raise Node(None, name).fail(f"{what} by a model under training, whose ids are to be its own alone")
        ids = raw_ids(self.template, asked.raw) if asked.raw is not None else render(self.template, asked, []).ids
        if session is not None and not isinstance(asked.raw, tuple):  # ids are meant as they are
            ids = session.align(ids)
        room = self.longest - len(ids)
        if room < 1:
            raise BadInput(f"prompt is too long: {len(ids):,} tokens > {self.longest - 1:,} maximum of this run")
        return self._replies(asked, ids, room, first, session)

    async def _replies(
        self, asked: MessagesRequest, ids: Sequence[int], room: int, first: int, session: Session | None
    ) -> AsyncGenerator[Indexed, None]:
        usage = Usage(input=len(ids))
        own = Sampling(asked.temperature, asked.top_p, asked.top_k, asked.min_p, asked.seed)
        stops = Stops(self.template, asked.stop_sequences, asked.raw is not None) if asked.stop_sequences else None
        written = self.live.write(
            Asked(
                ids,
                asked.samples,
                min(asked.max_tokens, room, session.most if session else room),
                session.next_sampling() if session else own,
                stop_ids(self.template),
                stops,
                session.ends(ids) if session else (),
            )
        )
        tail = self.template.decode(ids[-TAIL:], skip_special_tokens=False)
        started = False
        async with aclosing(written) as samples:
            async for sample, found in samples:
                if session is not None:
                    session.add(ids, found, self.template.decode(found.ids))
                if not started:
                    started = True
                    yield first, Started(usage, tuple(ids) if asked.tokens else ())
                parser = Plain() if asked.raw is not None else parser_for(self.template, asked, tail)
                reply = Reply(self.template, asked, parser, cut_short=room < asked.max_tokens)
                event = Event("", sample, tuple(found.ids), tuple(found.logprobs), finish="stop" if found.ended else "length")
                for said in [*reply.feed(event, found.versions), *reply.finish(usage)]:
                    yield first + sample, said


def policy_app(policy: Policy, key: str = "", sessions: Sessions | None = None) -> Starlette:
    """The endpoint; with a key, or the keys of sessions, one is asked for as `Authorization: Bearer`."""

    async def answered(request: Request, asked: Sequence[MessagesRequest], writer: Writer, session: Session | None) -> Response:
        events = together([policy.replies(one, number * one.samples, session) for number, one in enumerate(asked)])
        if not writer.told.stream:

            async def whole() -> None:
                async with aclosing(events) as opened:
                    async for found in opened:
                        writer.take(*found)

            await unless_gone(request, whole())
            return JSON(writer.whole())
        reply = Streamed(events, lambda found: writer.chunks(*found), sent_error, writer.id, last=DONE)
        await begun(request, reply)
        return reply

    async def chat(request: Request) -> Response:
        session, body = await read(request)
        asked, told = read_chat(body)
        return await answered(request, [asked], ChatWriter(new_id("chatcmpl"), asked.model, told, asked.samples), session)

    async def completions(request: Request) -> Response:
        session, body = await read(request)
        asked = read_completion(body)
        samples, count = asked.requests[0].samples, len(asked.requests)
        writer = CompletionWriter(new_id("cmpl"), asked.requests[0].model, asked.told, samples, count)
        return await answered(request, asked.requests, writer, session)

    async def models(request: Request) -> Response:
        admit(request)
        shown = {"id": policy.name, "object": "model", "created": 0, "owned_by": OWNER}
        return JSON({"object": "list", "data": [{**shown, "version": policy.version(), "max_model_len": policy.longest}]})

    async def health(request: Request) -> Response:
        return JSON({"status": "ok", "version": policy.version()})

    def admit(request: Request) -> Session | None:
        if sessions is not None:
            if (session := sessions.find(secret_of(request.headers))) is None:
                raise AuthenticationFailed("this key opens nothing here; a rollout's own does, until the rollout is over")
            return session
        if key and not hmac.compare_digest(secret_of(request.headers).encode(), key.encode()):
            raise AuthenticationFailed(f"this key opens nothing here; it is the one of {KEY_ENV}, where the run was started")
        return None

    async def read(request: Request) -> tuple[Session | None, Node]:
        session = admit(request)
        found = Node(await read_json(request, MAX_BYTES))
        if session is not None:
            as_the_run(found, session.asked)
        return session, found

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return refusal(Failure(error.status_code, "not_found_error", error.detail), error, {})
        wait = getattr(error, "retry_after", None)
        return refusal(failure(error), error, {} if wait is None else {"retry-after": str(math.ceil(wait))})

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refused, RopewalkError: refused, Exception: refused})
    app.state.settings = ServerSettings()
    return app


def as_the_run(body: Node, run: Sampling) -> None:
    """BadInput where a rollout wants to sample otherwise than the run does: the log-probabilities would not be the trainer's."""
    for name in ("temperature", "top_p", "top_k", "min_p"):
        found, own = body.get(name), getattr(run, name)
        if found is not None and found.value != own and not (name == "top_k" and own == 0 and found.value == -1):
            raise found.fail(f"{str(found.value)[:40]} is not the run's trl.{name}, {own:g}; leave it out, or change it there")
    if (seed := body.get("seed")) is not None:
        raise seed.fail("the run gives every call a seed, so that the rollouts of a group differ; leave it out")


class PolicyServer:
    """The endpoint at an address, in a thread of its own."""

    def __init__(
        self, policy: Policy, host: str, port: int, *, key: str | None = None, sessions: Sessions | None = None
    ) -> None:
        """`key` None: that of the environment, if there is one; without any, only this machine is let in."""
        key = os.environ.get(KEY_ENV, "").strip() if key is None else key
        if not key and not _is_loopback(host):
            raise BadInput(
                f"trl.endpoint: {host} is an address that others reach, and nothing keeps them out; "
                f"set {KEY_ENV} to a secret of your own, or open it at 127.0.0.1"
            )
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadInput(f"trl.endpoint: cannot listen on {host} port {port}: {reason}; choose another") from error
        app = policy_app(policy, key, sessions)
        self._server = uvicorn.Server(
            uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, server_header=False, ws="none")
        )
        self._thread = threading.Thread(target=self._run, name="endpoint", daemon=True)
        self._policy = policy

    @property
    def url(self) -> str:
        """What clients take for their base_url."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def start(self) -> None:
        """Begins to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Ends what is being answered, and the server."""
        self._policy.live.close()
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


@dataclass(frozen=True)
class Opened:
    """An address at which a run's model is asked.  server -> trainer"""

    asked: LivePolicy
    server: PolicyServer

    @property
    def url(self) -> str:
        return self.server.url

    def stop(self) -> None:
        self.server.stop()


def open_policy(
    address: str,
    *,
    name: str,
    template: Template,
    longest: int,
    version: Callable[[], int],
    sessions: Sessions | None = None,
) -> Opened:
    """Begins to listen at host:port; what is asked there waits for whoever drives the generator."""
    host, port = address_of(address)
    live = LivePolicy() if sessions is None else LivePolicy(waiting=ROLLOUTS_WAITING)
    server = PolicyServer(
        Policy(name, template, longest, live, version), host, port, key=None if sessions is None else "", sessions=sessions
    )
    server.start()
    return Opened(live, server)


def address_of(text: str) -> tuple[str, int]:
    """A host and a port, of `trl.endpoint`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BadInput(f"trl.endpoint: '{text[:100]}' is no host:port; expected one such as 127.0.0.1:8001")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
