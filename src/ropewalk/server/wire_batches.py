"""The JSON of the Message Batches API: a body -> requests, a batch and its results -> what clients read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ropewalk.batches.ledger import Asked, Batch, Outcome, Page
from ropewalk.chat.messages import MessagesRequest
from ropewalk.database import timestamp
from ropewalk.server.entries import Entries
from ropewalk.server.node import Node
from ropewalk.server.wire import error_body, list_ends
from ropewalk.server.wire_messages import read_request

MAX_REQUESTS = 100_000
MAX_CHARACTERS = 32_000_000  # of one request: as by itself
CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class BatchReader:
    """What is asked, while it comes. The requests themselves are read when their turn comes, and what is wrong with one is its result."""

    def __init__(self) -> None:
        self._entries = Entries("requests", MAX_CHARACTERS)
        self._seen: set[str] = set()

    def feed(self, data: bytes, last: bool = False) -> list[Asked]:
        """The requests that these bytes of the body have made whole."""
        first = self._entries.count
        asked = [self._asked(Node(entry, f"requests.{n}")) for n, entry in enumerate(self._entries.feed(data, last), first)]
        found = Node([None] * self._entries.count, "requests")
        found.items(MAX_REQUESTS)
        if last:
            body = Node(self._entries.others)
            body.only({"requests", "betas"})
            body.need("requests").items()
            if not self._seen:
                raise found.fail("List should have at least 1 item")
        return asked

    def _asked(self, entry: Node) -> Asked:
        entry.only({"custom_id", "params"})
        id = entry.need("custom_id")
        if not CUSTOM_ID.fullmatch(id.text()):
            raise id.fail(f"String should match pattern '^{CUSTOM_ID.pattern}$'")
        if id.value in self._seen:
            raise id.fail(f"custom_id must be unique within a batch; '{id.value}' was there before")
        self._seen.add(id.value)
        return id.value, entry.need("params").record()


def read_item(params: Mapping[str, Any], version: str) -> MessagesRequest:
    """One request of a batch."""
    found = Node(params)
    if (speed := found.get("speed")) is not None:
        raise speed.fail("a batch has no speed; leave it out")
    asked = read_request(found, version)
    if asked.stream:
        raise Node(True, "stream").fail("a request of a batch is not streamed; its result is fetched with the others")
    if not asked.max_tokens:
        raise Node(0, "max_tokens").fail("Input should be greater than or equal to 1 in a batch")
    return asked


def batch_body(batch: Batch) -> dict[str, Any]:
    """What is told about a batch. Its counts are told when all of them are known."""
    ended = batch.ended_at is not None
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": "ended" if ended else "canceling" if batch.cancel_initiated_at is not None else "in_progress",
        "request_counts": {
            "processing": 0 if ended else batch.total,
            "succeeded": batch.succeeded if ended else 0,
            "errored": batch.errored if ended else 0,
            "canceled": batch.canceled if ended else 0,
            "expired": batch.expired if ended else 0,
        },
        "ended_at": _time(batch.ended_at),
        "created_at": timestamp(batch.created_at),
        "expires_at": timestamp(batch.expires_at),
        "archived_at": _time(batch.archived_at),
        "cancel_initiated_at": _time(batch.cancel_initiated_at),
        # Relative, so that it is of the origin that the client knows, whatever proxy stands between.
        "results_url": f"/v1/messages/batches/{batch.id}/results" if ended and batch.archived_at is None else None,
    }


def _time(moment: int | None) -> str | None:
    return None if moment is None else timestamp(moment)


def batch_list(page: Page) -> dict[str, Any]:
    """A page of batches."""
    return {"data": [batch_body(batch) for batch in page.batches]} | list_ends([batch.id for batch in page.batches], page.more)


def batch_deleted(id: str) -> dict[str, Any]:
    """What is told about a batch that is no more."""
    return {"id": id, "type": "message_batch_deleted"}


def succeeded(message: dict[str, Any]) -> dict[str, Any]:
    """The result of a request that was answered."""
    return {"type": "succeeded", "message": message | {"usage": message["usage"] | {"service_tier": "batch"}}}


def errored(error: BaseException, request_id: str) -> dict[str, Any]:
    """The result of a request that could not be: the envelope that it would have got by itself."""
    return {"type": "errored", "error": error_body(error, request_id)}


def result_line(custom_id: str, outcome: Outcome, result: dict[str, Any] | None) -> bytes:
    """A line of the results."""
    line = {"custom_id": custom_id, "result": {"type": outcome} if result is None else result}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"
