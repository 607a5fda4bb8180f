"""The Models API: what is served, by name and by alias."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.engine.models import Listed
from ropewalk.errors import BadInput, NotFound
from ropewalk.server.auth import caller_of
from ropewalk.server.files import DEFAULT_LIMIT, MAX_LIMIT, limit_of
from ropewalk.server.openapi import STRING, named, operation, query
from ropewalk.server.wire import JSON, capabilities, dialect, model_info, model_list

LIFECYCLES = ("active", "deprecated", "retired")


@operation(
    "list models, newest first",
    {200: named("ModelList")},
    parameters=[
        query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}, "models of a page"),
        query("after_id", STRING, "only what stands after this one"),
        query("before_id", STRING, "only what stands before this one"),
        query("lifecycle[]", {"type": "array", "items": {"enum": list(LIFECYCLES)}}, "only models of these lifecycles"),
    ],
)
async def list_models(request: Request) -> JSON:
    """GET /v1/models"""
    dialect(request.headers)
    limit, asked = limit_of(request), request.query_params
    models = [_described(listed) for listed in await asyncio.to_thread(request.app.state.models.listed, caller_of(request))]
    wanted = {*asked.getlist("lifecycle[]"), *asked.getlist("lifecycle")}
    if unknown := wanted - {*LIFECYCLES}:
        raise BadInput(f"lifecycle[]: '{sorted(unknown)[0][:40]}' is none; expected {', '.join(LIFECYCLES)}")
    if wanted and "active" not in wanted:  # what is published is active
        models = []
    ids = [model["id"] for model in models]
    # A name may be withdrawn between two pages; what stood after it is then not known, and the list ends.
    start = 0 if "after_id" not in asked else ids.index(asked["after_id"]) + 1 if asked["after_id"] in ids else len(ids)
    end = len(ids) if "before_id" not in asked else ids.index(asked["before_id"]) if asked["before_id"] in ids else 0
    between = models[start:end]
    page = between[-limit:] if "before_id" in asked and "after_id" not in asked else between[:limit]
    return JSON(model_list(page, len(between) > limit))


@operation("what is known about a model", {200: named("Model")})
async def show_model(request: Request) -> JSON:
    """GET /v1/models/{model_id}"""
    dialect(request.headers)
    id = request.path_params["model_id"]
    try:
        return JSON(_described(await asyncio.to_thread(request.app.state.models.find, id, caller_of(request))))
    except NotFound:
        raise NotFound(f"Model `{id[:200]}` not found.") from None


def _described(listed: Listed) -> dict[str, Any]:
    can = None if listed.senses is None else capabilities(sees=listed.senses.sees, thinks=listed.senses.thinks)
    return model_info(listed.name, listed.shown, listed.created, listed.longest, can)


routes: list[BaseRoute] = [Route("/v1/models", list_models), Route("/v1/models/{model_id:path}", show_model)]
