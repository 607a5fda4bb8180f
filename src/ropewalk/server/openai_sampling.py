"""What chat completions and completions have in common on their way in: how replies are sampled, and what is told of them.

A parameter that has no effect here is refused, unless its value asks for nothing: none is passed over in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.chat.messages import UNBOUNDED
from ropewalk.server.node import Node

MAX_SAMPLES = 64
MAX_STOPS, MAX_STOP = 256, 1_000

# Parameters of OpenAI's and vLLM's that are not followed here: the values that ask for nothing, and why others are refused.
NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), "tokens are not penalised here"),
    "presence_penalty": ((0,), "tokens are not penalised here"),
    "repetition_penalty": ((1,), "tokens are not penalised here"),
    "length_penalty": ((1,), "there is no beam search here"),
    "use_beam_search": ((False,), "there is no beam search here"),
    "best_of": ((1,), "ask for n replies and choose among them by their logprobs"),
    "logit_bias": (({},), "single tokens cannot be biased here; use response_format to steer a reply"),
    "modalities": ((["text"],), "replies are text here"),
    "audio": ((), "replies are text here"),
    "prediction": ((), "replies are not predicted here"),
    "web_search_options": ((), "this server searches nothing; give the model a tool of your own"),
    "moderation": ((), "replies are not moderated here"),
    "functions": (([],), "use tools"),
    "function_call": ((), "use tool_choice"),
    "store": ((False,), "replies are not kept here"),
    "service_tier": (("auto", "default"), "all requests are served alike"),
    "verbosity": (("medium",), "say in the prompt how much the reply is to say"),
    "prompt_cache_options": ((), "what was read once is found again by itself"),
    "prompt_cache_retention": ((), "what was read once is found again by itself"),
    "prompt_logprobs": ((), "log-probabilities are told of replies alone"),
    "echo": ((False,), "a prompt is not sent back"),
    "suffix": (("",), "text is not filled in between here"),
    "min_tokens": ((0,), "a reply ends when the model ends it"),
    "ignore_eos": ((False,), "a reply ends when the model ends it"),
    "stop_token_ids": (([],), "give stop sequences as text"),
    "include_stop_str_in_output": ((False,), "a reply ends before its stop sequence"),
    "skip_special_tokens": ((True,), "ask for return_token_ids to see every token"),
    "spaces_between_special_tokens": ((True,), "ask for return_token_ids to see every token"),
    "priority": ((0,), "all requests are served alike"),
}
# Names of the client's own, of no effect on a reply: looked at, and not kept.
NAMES = {"user", "safety_identifier", "prompt_cache_key"}
KEYS = {
    *NEUTRAL,
    *NAMES,
    *(
        "model",
        "metadata",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "n",
        "stop",
        "stream",
        "stream_options",
    ),
    *("return_token_ids", "return_tokens_as_token_ids"),
}


@dataclass(frozen=True)
class Told:
    """What is told beside the text of a reply."""

    stream: bool = False
    usage: bool = False  # at the end of a stream
    logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False  # `token_id:17` for the text of a token

    @property
    def tokens(self) -> bool:
        """Whether the engine has to be asked for ids."""
        return self.logprobs or self.token_ids


def sampling_of(body: Node) -> dict[str, Any]:
    """How replies are sampled, as MessagesRequest names it."""
    temperature, top_p, min_p = (body.get(name) for name in ("temperature", "top_p", "min_p"))
    top_k, seed, n = (body.get(name) for name in ("top_k", "seed", "n"))
    return {
        "model": body.need("model").text(1, 256),
        "temperature": 1.0 if temperature is None else temperature.number(0, 2),
        "top_p": 1.0 if top_p is None else top_p.number(0, 1),
        "top_k": 0 if top_k is None else max(0, top_k.integer(-1)),  # vLLM's clients say -1 for all
        "min_p": 0.0 if min_p is None else min_p.number(0, 1),
        "seed": None if seed is None else seed.integer(-(1 << 63), (1 << 63) - 1),
        "samples": 1 if n is None else n.integer(1, MAX_SAMPLES),
        "stop_sequences": _stops(body.get("stop")),
    }


def told_of(body: Node, logprobs: bool) -> Told:
    """What is to be told of a reply."""
    options, found = body.get("stream_options"), body.get("stream")
    stream = found is not None and found.boolean()
    usage = False
    if options is not None:
        if not stream:
            raise options.fail("it is only allowed when stream is true")
        options.only({"include_usage", "include_obfuscation"})
        if (hidden := options.get("include_obfuscation")) is not None and hidden.boolean():
            raise hidden.fail("events are not padded here; leave it out")
        usage = (wanted := options.get("include_usage")) is not None and wanted.boolean()
    ids, as_ids = body.get("return_token_ids"), body.get("return_tokens_as_token_ids")
    return Told(stream, usage, logprobs, ids is not None and ids.boolean(), as_ids is not None and as_ids.boolean())


def most_of(body: Node, *names: str) -> int:
    """The most tokens of a reply; UNBOUNDED where no number is named."""
    found = {name: value.integer(1, UNBOUNDED) for name in names if (value := body.get(name)) is not None}
    if len({*found.values()}) > 1:
        raise body.need(names[0]).fail(f"{' and '.join(found)} differ; give one of them")
    return next(iter(found.values()), UNBOUNDED)


def refuse_others(body: Node, keys: set[str]) -> None:
    """Refuses whatever would have no effect."""
    for name, (neutral, why) in NEUTRAL.items():
        if (found := body.get(name)) is not None and found.value not in neutral:
            shown = json.dumps(found.value, ensure_ascii=True)[:60]
            raise found.fail(f"{shown} is not supported: {why}")
    for name in NAMES:
        if (found := body.get(name)) is not None:
            found.text(0, 512)
    if (metadata := body.get("metadata")) is not None:
        metadata.mapping()
    body.only(KEYS | keys)


def _stops(found: Node | None) -> tuple[str, ...]:
    if found is None:
        return ()
    if isinstance(found.value, str):
        return (found.text(1, MAX_STOP),)
    return tuple(stop.text(1, MAX_STOP) for stop in found.items(MAX_STOPS))
