"""The judges of jobs: models of the asker's workspace that give marks to what a training writes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from ropewalk.chat.messages import Delta, MessagesRequest, Text, Turn
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, NotFound
from ropewalk.jobs.judge_desk import Asks
from ropewalk.tenants.caller import Caller

MARK_TOKENS = 200


async def check(models: Models, caller: Caller, judges: Sequence[str], *, takes_turns: bool) -> None:
    """BadInput for a judge that the caller could not ask, or that could not answer while the job runs."""
    for name in judges:
        try:
            await asyncio.to_thread(models.find, name, caller)
        except NotFound:
            raise BadInput(
                f"ropewalk.trl.reward_funcs: the judge '{name[:100]}' is no model that is served here; GET /v1/models lists those that are"
            ) from None
        if takes_turns and await asyncio.to_thread(models.is_here, name):
            raise BadInput(
                f"ropewalk.trl.reward_funcs: the judge '{name[:100]}' is a model of this machine's engine, which makes room for the job on "
                "its GPU; name one that another server answers for, or a vLLM server"
            )


def asks(models: Models) -> Asks:
    """How a judge is asked: as anybody in its workspace asks a model, counted alike, and held to the form of a mark."""

    async def ask(caller: Caller, name: str, words: str, least: float, most: float) -> str:
        whole = least.is_integer() and most.is_integer()
        bounds = {"minimum": int(least), "maximum": int(most)} if whole else {"minimum": least, "maximum": most}
        mark = {"type": "integer" if whole else "number", **bounds}
        schema = {"type": "object", "properties": {"mark": mark}, "required": ["mark"], "additionalProperties": False}
        request = MessagesRequest(name, MARK_TOKENS, (Turn("user", (Text(words),)),), temperature=0.0, schema=schema)
        answers = await models.answerer(name, caller)
        said = ""
        async with aclosing(answers.stream(caller, request)) as events:
            async for event in events:
                said += event.text if isinstance(event, Delta) else ""
        return said

    return ask
