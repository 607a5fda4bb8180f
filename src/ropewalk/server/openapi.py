"""Our own OpenAPI document: each handler carries what it takes and answers, and /openapi.json gathers it from the route table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.compare.state import EXIT_CODES
from ropewalk.server.wire import EXTENSIONS, FILES_BETA, JSON, VERSIONS

Schema = Mapping[str, Any]
Handler = TypeVar("Handler", bound=Callable[..., Any])

STRING: Schema = {"type": "string"}
TIME: Schema = {"type": "string", "format": "date-time"}


def nullable(schema: Schema) -> Schema:
    """This, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def record(properties: Mapping[str, Schema], optional: Sequence[str] = ()) -> Schema:
    """An object with these keys, all there but the optional ones."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
    }


def named(name: str) -> Schema:
    """A schema of COMPONENTS, by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


COMPONENTS: dict[str, Schema] = {
    "Error": record(
        {
            "type": {"const": "error"},
            "error": record(
                {"type": STRING, "message": STRING, "details": record({"error_code": STRING})},
                optional=["details"],
            ),
            "request_id": STRING,
        }
    ),
    "File": record(
        {
            "id": STRING,
            "type": {"const": "file"},
            "filename": STRING,
            "mime_type": STRING,
            "size_bytes": {"type": "integer", "minimum": 0},
            "created_at": TIME,
            "downloadable": {"type": "boolean"},
            "expires_at": {**nullable(TIME), "description": f"not there under anthropic-beta: {FILES_BETA}"},
            "sha256": {"type": "string", "description": f"with {EXTENSIONS}: true"},
            "tags": {"type": "array", "items": STRING, "description": f"with {EXTENSIONS}: true"},
            "user_id": {**nullable(STRING), "description": f"with {EXTENSIONS}: true"},
            "expired": {"type": "boolean", "description": f"with {EXTENSIONS}: true"},
        },
        optional=["expires_at", "sha256", "tags", "user_id", "expired"],
    ),
    "FileList": record(
        {
            "data": {"type": "array", "items": named("File")},
            "next_page": nullable(STRING),
            "has_more": {"type": "boolean"},
            "first_id": nullable(STRING),
            "last_id": nullable(STRING),
        },
        optional=["next_page", "has_more", "first_id", "last_id"],
    ),
    "DeletedFile": record(
        {
            "id": STRING,
            "type": {"const": "file_deleted"},
            "receipt": {"type": "object", "description": f"with {EXTENSIONS}: true"},
        },
        optional=["receipt"],
    ),
    "Model": record(
        {
            "id": STRING,
            "type": {"const": "model"},
            "display_name": STRING,
            "created_at": TIME,
            "lifecycle": {"enum": ["active", "deprecated", "retired"]},
        }
    ),
    "MessageRequest": {
        **record(
            {
                "model": STRING,
                "messages": {"type": "array", "items": record({"role": STRING, "content": {}})},
                "max_tokens": {"type": "integer", "minimum": 0, "description": "not for count_tokens"},
                "system": {"description": "a text, or text blocks"},
                "stream": {"type": "boolean"},
                "tools": {"type": "array", "items": {"type": "object"}},
                "tool_choice": {"type": "object"},
                "thinking": {"type": "object"},
                "output_config": {"type": "object"},
                "stop_sequences": {"type": "array", "items": STRING},
                "temperature": {"type": "number", "minimum": 0, "maximum": 1},
                "top_p": {"type": "number", "minimum": 0, "maximum": 1},
                "top_k": {"type": "integer", "minimum": 0},
                "metadata": {"type": "object"},
            },
            optional="max_tokens system stream tools tool_choice thinking output_config stop_sequences temperature top_p top_k metadata".split(),
        ),
        "description": "as the Messages API of Anthropic takes it; docs/messages.md lists what differs",
    },
    "Message": record(
        {
            "id": STRING,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": STRING,
            "content": {"type": "array", "items": record({"type": STRING})},
            "stop_reason": nullable(STRING),
            "stop_sequence": nullable(STRING),
            "usage": record(
                {
                    "input_tokens": {"type": "integer"},
                    "cache_creation_input_tokens": {"type": "integer"},
                    "cache_read_input_tokens": {"type": "integer"},
                    "output_tokens": {"type": "integer"},
                }
            ),
        }
    ),
    "Batch": record(
        {
            "id": STRING,
            "type": {"const": "message_batch"},
            "processing_status": {"enum": ["in_progress", "canceling", "ended"]},
            "request_counts": record(
                {name: {"type": "integer"} for name in ("processing", "succeeded", "errored", "canceled", "expired")}
            ),
            "created_at": TIME,
            "expires_at": TIME,
            "ended_at": nullable(TIME),
            "cancel_initiated_at": nullable(TIME),
            "archived_at": nullable(TIME),
            "results_url": nullable(STRING),
        }
    ),
    "BatchList": record(
        {
            "data": {"type": "array", "items": named("Batch")},
            "has_more": {"type": "boolean"},
            "first_id": nullable(STRING),
            "last_id": nullable(STRING),
        }
    ),
    "Candidate": record(
        {"id": STRING, "type": {"const": "candidate"}, "kind": STRING, "name": STRING, "lineage": {"type": "object"}}
    ),
    "Suite": record({"id": STRING, "type": {"const": "suite"}, "name": STRING, "n_prompts": {"type": "integer"}}),
    "Comparison": record(
        {
            "id": STRING,
            "type": {"const": "comparison"},
            "title": STRING,
            "state": {"enum": ["new", "running", "done", "failed"]},
            "baseline": STRING,
            "candidates": {"type": "array", "items": {"type": "object"}},
            "verdicts": {"type": "array", "items": named("Verdict")},
        }
    ),
    "Verdict": record(
        {
            "id": STRING,
            "type": {"const": "verdict"},
            "candidate": STRING,
            "state": {"enum": list(EXIT_CODES)},
            "effect": nullable({"type": "number", "description": "a share: 0.05 is five points"}),
            "low": nullable({"type": "number"}),
            "high": nullable({"type": "number"}),
            "reasons": {"type": "array", "items": {"type": "object"}},
            "exit_code": {"type": "integer"},
        }
    ),
    "Promotion": record({"id": STRING, "alias": STRING, "to_name": STRING, "override_reason": nullable(STRING)}),
    "Ticket": record({"type": {"const": "vote_ticket"}, "ticket": STRING, "prompt": STRING, "left": STRING, "right": STRING}),
    "Vote": record({"type": {"const": "vote"}, "choice": STRING, "left": STRING, "right": STRING}),
    "CompareList": record(
        {
            "data": {"type": "array", "items": {"type": "object"}},
            "has_more": {"type": "boolean"},
            "first_id": nullable(STRING),
            "last_id": nullable(STRING),
        }
    ),
    "ModelList": record(
        {
            "data": {"type": "array", "items": named("Model")},
            "has_more": {"type": "boolean"},
            "first_id": nullable(STRING),
            "last_id": nullable(STRING),
        }
    ),
}


@dataclass(frozen=True)
class Operation:
    """What a handler takes and answers."""

    summary: str
    answers: Mapping[int, Schema | None]  # status -> schema of its JSON, or None where it has none
    parameters: Sequence[Schema] = ()
    body: Schema | None = None  # schema of a JSON body
    media: Mapping[str, Schema] = field(default_factory=dict)  # media type -> schema, of a body that is not JSON
    answer_media: str = "application/json"
    public: bool = False  # needs no key


def operation(
    summary: str,
    answers: Mapping[int, Schema | None],
    *,
    parameters: Sequence[Schema] = (),
    body: Schema | None = None,
    media: Mapping[str, Schema] | None = None,
    answer_media: str = "application/json",
    public: bool = False,
) -> Callable[[Handler], Handler]:
    """Says of a handler what it takes and answers."""
    described = Operation(summary, answers, parameters, body, media or {}, answer_media, public)

    def describe(handler: Handler) -> Handler:
        handler.operation = described  # type: ignore[attr-defined]
        return handler

    return describe


def query(name: str, schema: Schema, description: str) -> Schema:
    """A parameter of the query."""
    return {"name": name, "in": "query", "schema": schema, "description": description}


def header(name: str, schema: Schema, description: str) -> Schema:
    """A header of the request."""
    return {"name": name, "in": "header", "schema": schema, "description": description}


EVERYWHERE = [
    header("anthropic-version", {"type": "string", "enum": list(VERSIONS)}, "the version of the API; may be left out"),
    header("anthropic-workspace-id", STRING, "the workspace, for a key that opens several; else that of the key"),
    header("anthropic-user-id", STRING, "the user of the workspace that this is done for, if the key's rights allow it"),
]


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """The document of these routes."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        described: Operation | None = getattr(getattr(route, "endpoint", None), "operation", None)
        if isinstance(route, Route) and described is not None:
            for method in sorted((route.methods or {"GET"}) - {"HEAD"} or {"HEAD"}):
                paths.setdefault(route.path_format, {})[method.lower()] = _operation(route, described, method)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Ropewalk",
            "version": version("ropewalk"),
            "description": "The Claude Files, Messages and Models API, self-hosted, and what goes beyond it.",
        },
        "paths": paths,
        "components": {
            "schemas": COMPONENTS,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(route: Route, described: Operation, method: str) -> dict[str, Any]:
    in_path = [{"name": name, "in": "path", "required": True, "schema": STRING} for name in route.param_convertors]
    found: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *re.findall(r"[A-Za-z0-9]+", route.path_format)]),
        "summary": described.summary,
        "parameters": [*in_path, *described.parameters, *([] if described.public else EVERYWHERE)],
        "responses": {str(status): _answer(status, schema, described) for status, schema in described.answers.items()},
        "security": [] if described.public else [{"key": []}, {"bearer": []}],
    }
    found["responses"]["default"] = {
        "description": "an error",
        "content": {"application/json": {"schema": named("Error")}},
    }
    if described.body is not None:
        found["requestBody"] = {"content": {"application/json": {"schema": described.body}}}
    if described.media:
        found["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": schema} for kind, schema in described.media.items()},
        }
    return found


def _answer(status: int, schema: Schema | None, described: Operation) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": "done" if status < 300 else "not changed" if status == 304 else "an error"}
    if schema is not None:
        answer["content"] = {described.answer_media: {"schema": schema}}
    return answer


@operation("this document", {200: {"type": "object"}}, public=True)
async def openapi(request: Request) -> JSON:
    """GET /openapi.json"""
    return JSON(document(request.app.routes))


routes: list[BaseRoute] = [Route("/openapi.json", openapi)]
