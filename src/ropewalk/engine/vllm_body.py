"""Completions of ids by a vLLM server: a request of ours as its JSON, the chunks of its answer as ids.

What is relied on, from vLLM's sources (entrypoints/openai/completion, v1/structured_output; 2026):

    prompt: [ids], return_token_ids -> choices[].token_ids of each chunk, the id that ends a completion among them
    logprobs: n with return_tokens_as_token_ids -> token_logprobs, and top_logprobs by "token_id:7"; before temperature and truncation
    stop_reason: the id of stop_token_ids that ended it; null where it was the tokenizer's own end
    usage of the last chunk: prompt_tokens_details.cached_tokens, under --enable-prompt-tokens-details
    structured_outputs: {json | regex | grammar}; a grammar in llguidance's Lark needs the backend `guidance`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.engine.request import Grammar, Request

PATH = "completions"
NEVER_CHOSEN = -100.0  # the least that a logit may be shifted by
JSON = dict[str, Any]
Top = tuple[tuple[int, float], ...]


def body(
    request: Request,
    model: str,
    ids: Sequence[int],
    salt: str,
    *,
    sample: int,
    left: int,
    opener: int | None,
    held: Grammar | None,
) -> JSON:
    """One completion, to be streamed. `opener`: an id to stop at, since a grammar may begin there; `held`: the one in force."""
    sampling, without = request.sampling, request.grammar is not None and request.grammar.kind == "without"
    stops = [*request.stop_ids, *([] if opener is None else [opener])]
    found: JSON = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": left,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        # The base's generation_config.json would fill in what is left out.
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": stops,
        # A form that is complete is told by the tokenizer's own end; otherwise stop_token_ids alone say what ends a reply.
        "ignore_eos": held is None and bool(request.stop_ids),
        "skip_special_tokens": False,
        "return_token_ids": True,
    }
    if salt:
        found["cache_salt"] = salt
    if sampling.seed is not None:
        found["seed"] = (sampling.seed + sample) % (1 << 63)
    if request.logprobs:
        found |= {"logprobs": request.top_logprobs, "return_tokens_as_token_ids": True}
    if without:
        assert request.grammar is not None
        found["logit_bias"] = {str(id): NEVER_CHOSEN for id in request.grammar.after}
    if held is not None:
        found["structured_outputs"] = _form(held)
    return found


def _form(grammar: Grammar) -> JSON:
    match grammar.kind:
        case "json_schema":
            return {"json": json.loads(grammar.text)}
        case "regex":
            return {"regex": grammar.text}
        case _:
            return {"grammar": grammar.text}


@dataclass(frozen=True)
class Written:
    """What a chunk brings."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    finish: str = ""  # stop or length
    stopped_at: int | None = None  # the id of stop_token_ids
    cached: int | None = None  # ids of the prompt that were found


def read_chunk(event: Mapping[str, Any], request: Request) -> Written:
    """A chunk; KeyError, TypeError or ValueError for one that is none."""
    usage = event.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    choices = event.get("choices") or []
    if not choices:
        return Written(cached=cached)
    choice = choices[0]
    finish = choice.get("finish_reason") or ""
    if finish not in ("", "stop", "length"):
        raise ValueError(f"finish_reason {finish}")
    ids = tuple(int(id) for id in choice["token_ids"] or ())
    stop = choice.get("stop_reason")
    logprobs: tuple[float, ...] = ()
    top: tuple[Top, ...] = ()
    if request.logprobs and ids:
        said = choice["logprobs"]
        logprobs = tuple(float(value) for value in said["token_logprobs"])
        if request.top_logprobs:
            top = tuple(_likeliest(place, request.top_logprobs) for place in said["top_logprobs"])
        if len(logprobs) != len(ids):
            raise ValueError("as many log-probabilities as ids")
    return Written(ids, logprobs, top, finish, stop if isinstance(stop, int) else None, cached)


def _likeliest(place: Mapping[str, float], count: int) -> Top:
    """The likeliest ids of a place, of which the chosen one is told too where it is none of them."""
    found = [(int(name.removeprefix("token_id:")), float(value)) for name, value in place.items()]
    return tuple(sorted(found, key=lambda one: -one[1])[:count])
