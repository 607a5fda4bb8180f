"""Vectors of texts, as OpenAI's clients ask for them: by the encoder that models.yml names."""

from __future__ import annotations

import base64
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ropewalk.engine.embedding import Vectors
from ropewalk.engine.models import Models
from ropewalk.server import body
from ropewalk.server.auth import caller_of
from ropewalk.server.messages import unless_gone
from ropewalk.server.node import Node
from ropewalk.server.openai_models import unknown
from ropewalk.server.wire import JSON

MAX_BYTES = 8_000_000
MAX_TEXTS = 2048


async def create(request: Request) -> JSON:
    """POST /openai/v1/embeddings"""
    caller_of(request).needs("read")
    models: Models = request.app.state.models
    found = Node(await body.read_json(request, MAX_BYTES))
    model = found.need("model").text(1, 256)
    if (dimensions := found.get("dimensions")) is not None:
        raise dimensions.fail("vectors have the length that the encoder gives them; leave it out")
    found.only({"model", "input", "encoding_format", "user"})
    if (user := found.get("user")) is not None:
        user.text(0, 512)
    form = found.get("encoding_format")
    encoding = "float" if form is None else form.choice(("float", "base64"))
    texts = _texts(found.need("input"))
    if models.embedding is None or models.embedding.name != model:
        raise unknown(model)
    encoded = await unless_gone(request, models.embed(texts))
    if encoded.cut:
        place = found.need("input").at(encoded.cut[0]) if isinstance(found.value["input"], list) else "input"
        raise Node(None, place).fail("this text has more tokens than the encoder reads; cut it")
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, encoding)}
        for index, vector in enumerate(encoded.vectors)
    ]
    usage = {"prompt_tokens": encoded.tokens, "total_tokens": encoded.tokens}
    return JSON({"object": "list", "data": data, "model": model, "usage": usage})


def _texts(found: Node) -> list[str]:
    if isinstance(found.value, str):
        return [found.text(1)]
    texts = list(found.items(MAX_TEXTS))
    if not texts:
        raise found.fail("List should have at least 1 item")
    for text in texts:
        if isinstance(text.value, int | list):
            raise text.fail("texts are read here, and no ids of tokens: whose they would be is not known")
    return [text.text(1) for text in texts]


def _written(vector: Vectors, encoding: str) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


routes: list[BaseRoute] = [Route("/openai/v1/embeddings", create, methods=["POST"])]
