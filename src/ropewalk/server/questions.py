"""Questions and answers out of a file, as data to train on: asked for here, written by a served model in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.batches.ledger import Asked
from ropewalk.chat.questions import Wanted, asked, passages
from ropewalk.database import timestamp
from ropewalk.errors import DocumentError
from ropewalk.files import questions
from ropewalk.files.documents import document
from ropewalk.files.questions import QuestionJob
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.messages import version_of
from ropewalk.server.node import Node
from ropewalk.server.openapi import STRING, TIME, nullable, operation, record
from ropewalk.server.question_runs import custom_id
from ropewalk.server.wire import FIRST_VERSION, JSON

PORTION = 100  # requests that are made at a time
MOST_EACH, FEWEST_CHARACTERS, MOST_CHARACTERS, MOST_CHUNKS = 10, 300, 20_000, 5_000
JOB = record(
    {
        "id": STRING,
        "type": {"const": "question_job"},
        "status": {"enum": ["in_progress", "succeeded", "failed"]},
        "file_id": STRING,
        "output_file_id": nullable(STRING),
        "model": STRING,
        "batch_id": STRING,
        "chunks": {"type": "integer"},
        "rows": {"type": "integer"},
        "dropped": {"type": "integer"},
        "error": nullable(STRING),
        "created_at": TIME,
        "ended_at": nullable(TIME),
    }
)


@operation(
    "have a model write questions and answers from a file, in the background; they become a new file, to train on",
    {200: JOB},
    body=record(
        {
            "model": {"type": "string", "description": "a served model"},
            "questions_per_chunk": {"type": "integer", "minimum": 1, "maximum": MOST_EACH, "default": 3},
            "chunk_characters": {"type": "integer", "minimum": FEWEST_CHARACTERS, "maximum": MOST_CHARACTERS, "default": 3000},
            "max_chunks": {"type": "integer", "minimum": 1, "maximum": MOST_CHUNKS, "default": 500},
        },
        optional=["questions_per_chunk", "chunk_characters", "max_chunks"],
    ),
)
async def create(request: Request) -> JSON:
    """POST /v1/files/{file_id}/questions"""
    version_of(request)
    state, caller, id = request.app.state, caller_of(request), request.path_params["file_id"]
    caller.needs("write")
    wanted = _wanted(Node(await body.read_json(request)))
    await state.store.show(caller, id)
    await asyncio.to_thread(state.models.find, wanted.model, caller)
    shown = await asyncio.to_thread(passages, await document(state.store, caller, id), wanted)
    if not shown:
        raise DocumentError(
            f"File `{id}` holds no text that could be read; what is only a picture of text is not recognised here",
            "document_without_text",
        )
    job = await questions.create(state.store, caller, id, asdict(wanted), len(shown))

    async def requests() -> AsyncIterator[list[Asked]]:
        for begin in range(0, len(shown), PORTION):
            yield [(custom_id(passage.number), asked(passage, wanted)) for passage in shown[begin : begin + PORTION]]

    await state.batches.ledger.create(caller, FIRST_VERSION, requests(), job.batch_id)
    state.batches.look()
    state.questions.look()
    return JSON(_body(job))


@operation("how far a question job is", {200: JOB})
async def show(request: Request) -> JSON:
    """GET /v1/files/{file_id}/questions/{job_id}"""
    version_of(request)
    path = request.path_params
    return JSON(_body(await questions.show(request.app.state.store, caller_of(request), path["file_id"], path["job_id"])))


@operation("the question jobs of a file, newest first", {200: record({"data": {"type": "array", "items": JOB}})})
async def list_jobs(request: Request) -> JSON:
    """GET /v1/files/{file_id}/questions"""
    version_of(request)
    found = await questions.of_file(request.app.state.store, caller_of(request), request.path_params["file_id"])
    return JSON({"data": [_body(job) for job in found]})


def _wanted(found: Node) -> Wanted:
    found.only({"model", "questions_per_chunk", "chunk_characters", "max_chunks"})
    bounds = {
        "questions_per_chunk": (1, MOST_EACH, Wanted.each),
        "chunk_characters": (FEWEST_CHARACTERS, MOST_CHARACTERS, Wanted.size),
        "max_chunks": (1, MOST_CHUNKS, Wanted.most),
    }
    told = [
        default if (value := found.get(name)) is None else value.integer(least, most)
        for name, (least, most, default) in bounds.items()
    ]
    return Wanted(found.need("model").text(1, 256), *told)


def _body(job: QuestionJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "type": "question_job",
        "status": job.state,
        "file_id": job.file_id,
        "output_file_id": job.output_file_id,
        "model": job.wanted["model"],
        "batch_id": job.batch_id,
        "chunks": job.chunks,
        "rows": job.rows,
        "dropped": job.dropped,
        "error": job.error,
        "created_at": timestamp(job.created_at),
        "ended_at": None if job.ended_at is None else timestamp(job.ended_at),
    }


routes: list[BaseRoute] = [
    Route("/v1/files/{file_id}/questions", create, methods=["POST"]),
    Route("/v1/files/{file_id}/questions", list_jobs),
    Route("/v1/files/{file_id}/questions/{job_id}", show),
]
