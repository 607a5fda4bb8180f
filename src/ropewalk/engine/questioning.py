"""Questions and answers out of a stored file at the terminal: this machine's engine or a remote, its store, and no server."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from ropewalk.chat.messages import Delta, MessagesRequest, Text, Turn
from ropewalk.chat.questions import Passage, Rows, Wanted, asked, lineage, name_of, passages
from ropewalk.config.serving import Serving, read_serving
from ropewalk.engine.counted import Answers
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, Overloaded
from ropewalk.files.catalog import File
from ropewalk.files.documents import document
from ropewalk.files.incoming import Made
from ropewalk.files.questions import KIND
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.ids import new_id
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller

AT_ONCE = 4  # passages


async def write_questions(
    settings: Settings, registry: Registry, workspace: str, file_id: str, wanted: Wanted, served: Path | None = None
) -> File:
    """The file of rows that a model has written from a stored file, which it goes with."""
    store = await Store.open(settings)
    models = Models(store, registry, read_serving(served) if served is not None else Serving())
    try:
        caller = await store.local_caller(workspace)
        source = await store.show(caller, file_id)
        shown = passages(await document(store, caller, file_id), wanted)
        rows = await _written(models, caller, wanted, Rows(file_id), shown)
        if not rows.rows:
            raise BadInput(
                f"'{wanted.model}' has written no row whose quote stands in the file; ask a model that is better at it"
            )
        resolved = (await asyncio.to_thread(models.find, wanted.model)).shown
        writer = await asyncio.to_thread(models.name_behind, wanted.model)
        made = Made(KIND, f"rows of {new_id('qjob')}", (file_id,), lineage(wanted, writer, resolved, rows, shown))
        return await store.put(caller, rows.lines(), name_of(source.filename), purpose="fine-tune", made=made)
    finally:
        await models.close()
        await store.close()


async def _written(models: Models, caller: Caller, wanted: Wanted, rows: Rows, shown: list[Passage]) -> Rows:
    """All rows, in the order of the passages."""
    room, done = asyncio.Semaphore(AT_ONCE), 0

    async def ask(passage: Passage) -> str:
        nonlocal done
        async with room:
            said = await _said(await _loaded(models, wanted.model), caller, _request(passage, wanted))
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done} of {len(shown)} chunks", end="\n" if done == len(shown) else "", file=sys.stderr, flush=True)
        return said

    asking = [asyncio.create_task(ask(passage)) for passage in shown]
    try:
        for passage, task in zip(shown, asking, strict=True):
            rows.add(passage, await task)
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    return rows


def _request(passage: Passage, wanted: Wanted) -> MessagesRequest:
    """What `asked` says in JSON."""
    found = asked(passage, wanted)
    return MessagesRequest(
        wanted.model,
        found["max_tokens"],
        (Turn("user", (Text(found["messages"][0]["content"]),)),),
        (Text(found["system"]),),
        temperature=0.0,
        schema=found["output_config"]["format"]["schema"],
    )


async def _said(answers: Answers, caller: Caller, request: MessagesRequest) -> str:
    text = ""
    async with aclosing(answers.stream(caller, request)) as events:
        async for event in events:
            text += event.text if isinstance(event, Delta) else ""
    return text


async def _loaded(models: Models, name: str) -> Answers:
    while True:
        try:
            return await models.answerer(name)
        except Overloaded as error:
            print(error, file=sys.stderr)
