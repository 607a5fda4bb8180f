"""What the engine's process and its client say to each other, as JSON. No torch."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, fields
from typing import Any

from ropewalk.engine.request import Event, Grammar, Keep, Picture, Request, Sampling, Span


@dataclass(frozen=True)
class EngineSettings:
    """One base, and what its process may use."""

    base: str  # folder
    weights: str = ""  # names the weights' content
    dtype: str = "auto"  # auto: the checkpoint's own on a GPU, float32 on CPU
    device: str = "auto"
    quantize: str | None = None  # nf4, int4 or int8: the base is held so, as a run that trains over it does
    memory_bytes: int = 2 << 30  # of segments in memory
    disk_bytes: int = 20 << 30  # of segments on disk
    folder: str | None = None  # where they lie
    int8_on_disk: bool = False
    running: int = 64
    waiting: int = 256
    chunk: int = 512
    longest: int | None = None
    threads: int | None = None


def write_request(request: Request) -> dict[str, Any]:
    """A request as JSON."""
    # Field by field: `asdict` would copy every id of the prompt.
    found = {part.name: getattr(request, part.name) for part in fields(request)}
    prefix = [
        {"ids": s.ids, "keep": s.keep and _written(s.keep)} | ({"picture": _drawn(s.picture)} if s.picture else {})
        for s in request.prefix
    ]
    return found | {
        "prefix": prefix,
        "sampling": asdict(request.sampling),
        "grammar": request.grammar and asdict(request.grammar),
    }


def _written(keep: Keep) -> dict[str, str]:
    return {"path": keep.path, "key": base64.b64encode(keep.key).decode()}


def _drawn(picture: Picture) -> dict[str, Any]:
    pixels = None if picture.pixels is None else base64.b64encode(picture.pixels).decode()
    return {"digest": picture.digest, "width": picture.width, "height": picture.height, "pixels": pixels}


def _seen(found: dict[str, Any]) -> Picture:
    pixels = None if found["pixels"] is None else base64.b64decode(found["pixels"])
    return Picture(found["digest"], found["width"], found["height"], pixels)


def read_request(found: dict[str, Any]) -> Request:
    """The request that `write_request` was given."""
    spans = tuple(
        Span(
            tuple(s["ids"]),
            Keep(s["keep"]["path"], base64.b64decode(s["keep"]["key"])) if s["keep"] else None,
            _seen(s["picture"]) if "picture" in s else None,
        )
        for s in found["prefix"]
    )
    grammar = found["grammar"]
    values = found | {
        "prefix": spans,
        "tail": tuple(found["tail"]),
        "stop_ids": tuple(found["stop_ids"]),
        "sampling": Sampling(**found["sampling"]),
        "grammar": Grammar(**grammar | {"after": tuple(grammar["after"])}) if grammar else None,
    }
    return Request(**values)


def write_event(event: Event) -> dict[str, Any]:
    """An event as JSON, without what is as usual."""
    usual = asdict(Event(event.id, 0))
    return {name: value for name, value in asdict(event).items() if name == "id" or value != usual[name]}


def read_event(found: dict[str, Any]) -> Event:
    """The event that `write_event` was given."""
    values = {"sample": 0, **found}
    top = tuple(tuple((id, logprob) for id, logprob in place) for place in values.get("top", ()))
    return Event(**values | {name: tuple(values.get(name, ())) for name in ("ids", "logprobs")} | {"top": top})
