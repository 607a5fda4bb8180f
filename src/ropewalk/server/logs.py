"""Log lines: one JSON object each, with ids and numbers, and never a file's name or a byte of its content.

An exception is told by its class and the places it went through. What it says is left out: that may quote what a client sent.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("ropewalk")


def event(name: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Writes a line; fields that are None are left out."""
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields}, exc_info=error)


class Lines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
        }
        line |= {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}
        if record.exc_info and record.exc_info[1] is not None:
            line |= _told(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)


def configure(level: str = "info") -> None:
    """Log lines of the server, and of what it stands on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in ("ropewalk", "uvicorn", "uvicorn.error", "asyncio"):
        of = logging.getLogger(name)
        of.handlers, of.propagate = [], False
        of.setLevel(level.upper() if name == "ropewalk" else logging.WARNING)
    for name in ("ropewalk", "uvicorn", "asyncio"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("uvicorn.error").propagate = True
    # These quote the bytes that they could not read.
    for name in ("python_multipart", "python_multipart.multipart"):
        logging.getLogger(name).disabled = True


def _told(error: BaseException) -> dict[str, Any]:
    chain: list[dict[str, object]] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 5:
        frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(cause.__traceback__)[-12:]]
        chain.append({"class": f"{type(cause).__module__}.{type(cause).__qualname__}", "at": frames})
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return {"error": chain}
