"""What is served, as OpenAI's clients list it: models and aliases, and the model of embeddings if one is configured."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.engine.models import Listed, Models
from ropewalk.errors import NotFound
from ropewalk.server.auth import caller_of
from ropewalk.server.wire import JSON

OWNER = "ropewalk"


async def list_models(request: Request) -> JSON:
    """GET /openai/v1/models"""
    models: Models = request.app.state.models
    found = [_model(listed) for listed in await asyncio.to_thread(models.listed, caller_of(request))]
    embedding = models.embedding
    return JSON({"object": "list", "data": found + ([] if embedding is None else [_model(embedding)])})


async def show_model(request: Request) -> JSON:
    """GET /openai/v1/models/{model_id}"""
    models: Models = request.app.state.models
    id = request.path_params["model_id"]
    if models.embedding is not None and models.embedding.name == id:
        return JSON(_model(models.embedding))
    try:
        return JSON(_model(await asyncio.to_thread(models.find, id, caller_of(request))))
    except NotFound:
        raise unknown(id) from None


def unknown(name: str) -> NotFound:
    """The error of a model that is not served here."""
    error = NotFound(f"The model `{name[:200]}` does not exist here; GET /openai/v1/models lists those that do.")
    error.error_code, error.param = "model_not_found", "model"
    return error


def _model(listed: Listed) -> dict[str, Any]:
    created = int(datetime.fromisoformat(listed.created).timestamp())
    return {"id": listed.name, "object": "model", "created": created, "owned_by": OWNER} | (
        {"max_model_len": listed.longest} if listed.longest is not None else {}
    )


routes: list[BaseRoute] = [
    Route("/openai/v1/models", list_models),
    Route("/openai/v1/models/{model_id:path}", show_model),
]
