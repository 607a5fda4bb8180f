"""Whatever a model would say: a call that must be is one, and its input is of the tool's schema."""

import asyncio
import json
from dataclasses import replace
from functools import partial

import jsonschema
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ropewalk.chat.messages import (
    BlockEnded,
    BlockStarted,
    Delta,
    MessagesRequest,
    Text,
    Thinking,
    Tool,
    ToolChoice,
    ToolUse,
    Turn,
)
from ropewalk.chat.prompt import render
from ropewalk.chat.replies import TAIL, form_for, parser_for, stop_ids
from ropewalk.chat.template import Template
from ropewalk.engine.client import EngineClient
from ropewalk.engine.grammar import Grammars
from ropewalk.engine.lines import EngineSettings
from ropewalk.engine.request import Grammar, Request, Sampling
from ropewalk.models.base import make_base

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Kiel", "Ulm"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
        "exact": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
        "where": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False},
        "either": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
    },
    "required": ["city", "tags", "where"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "enum": ["a", "b"]}},
}
SMALL = {
    "type": "object",
    "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 30}, "note": {"type": "string", "maxLength": 6}},
    "required": ["days"],
    "additionalProperties": False,
}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = (Tool("weather", "", SCHEMA), Tool("time", "", NONE))
SCHEMAS = {tool.name: tool.schema for tool in TOOLS}
SOURCES = {
    "hermes": "{{ messages }}{% if tools %}<tool_call>{{ tools }} arguments{% endif %}",
    "tagged": "{{ messages }}{% if tools %}<tool_call><function=x>{{ tools }}{% endif %}",
    "gemma": "{{ messages }}{% if tools %}<|tool_call>call:{{ tools }}{% endif %}",
    "mistral": "{{ messages }}{% if tools %}[TOOL_CALLS][ARGS][THINK]{{ tools }}{% endif %}",
    "mistral list": "{{ messages }}{% if tools %}[TOOL_CALLS]{{ tools }}{% endif %}",
    "harmony": "<|start|><|channel|><|message|>{{ tools }}{{ messages }}<|start|>assistant",
    "llama": "{{ messages }}<|start_header_id|>{{ tools }} parameters",
    "told": "{{ messages }}",
}
CONTROLS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<|tool_call>",
        "<tool_call|>",
        '<|"|>',
        "<|channel>",
        "<channel|>",
    ),
    *("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"),
]


@pytest.fixture(scope="module")
def grammars(tmp_path_factory):
    """Grammars over bytes, and the tokenizer with every family's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in CONTROLS])
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    tokenizer.save(str(path))
    return Grammars(path, [tokenizer.token_to_id("</s>")]), tokenizer


def asked(kind="any", parallel=False, tools=TOOLS, **more):
    turns = (Turn("user", (Text("Go"),)),)
    return MessagesRequest("m", 10, turns, tools=tools, tool_choice=ToolChoice(kind, parallel=parallel), **more)


def walk(grammars, template, request, seed, opener=()):
    """The text of a model that says anything with equal chance, but a digit or letter now and then, after some ids."""
    follow, tokenizer = grammars
    form = form_for(template, request, "")
    constraint = follow.begin(Grammar(form.kind, form.text, form.after, form.again))
    random = torch.Generator().manual_seed(seed)
    end = tokenizer.token_to_id("</s>")
    ids = []
    for id in opener:
        assert not constraint.take(id)
        ids.append(id)
    for _ in range(3000):
        logits = torch.randn(tokenizer.get_vocab_size(), generator=random)
        logits[end] = 1.5  # or calls go on for ever
        constraint.mask(logits)
        assert logits.max() > float("-inf")
        id = int(logits.softmax(-1).multinomial(1, generator=random))
        if id == end:
            break
        ids.append(id)
        if constraint.take(id):
            break
    return tokenizer.decode(ids, skip_special_tokens=False)


def calls(template, request, text):
    """The calls of a reply, whatever else it says."""
    found = []
    for kept in (False, True):
        parser = parser_for(template, request, "<|start|>assistant" if "<|start|>" in template.needed.source else "", kept=kept)
        events = [*parser.feed(text), *parser.finish()]
        blocks = []
        for event in events:
            if isinstance(event, BlockStarted):
                blocks.append([event.block, ""])
            elif isinstance(event, Delta):
                blocks[-1][1] += event.text
        assert parser.called == any(isinstance(block, ToolUse) for block, _ in blocks)
        found.append([(block.name, json.loads(said)) for block, said in blocks if isinstance(block, ToolUse)])
    assert found[0] == found[1], text
    return found[0]


def check(called):
    for name, given in called:
        jsonschema.validate(given, SCHEMAS[name])


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_call_that_must_be_is_of_its_schema(grammars, family, parallel):
    template = Template(grammars[1], SOURCES[family], {"eos_token": "</s>"})
    for seed in range(10):
        text = walk(grammars, template, asked(parallel=parallel), seed)
        called = calls(template, asked(parallel=parallel), text)
        assert len(called) >= 1, text
        assert parallel or len(called) == 1
        check(called)


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_reply_of_a_schema_is_of_it_whatever_is_thought_before(grammars, family, thinking):
    template = Template(grammars[1], SOURCES[family], {"eos_token": "</s>"})
    schema = {**SMALL, "title": "reply"}
    request = replace(asked("auto", tools=()), schema=schema, thinking=thinking)
    for seed in range(5):
        text = walk(grammars, template, request, seed)
        parser = parser_for(template, request, "<|start|>assistant" if family == "harmony" else "")
        events = [*parser.feed(text), *parser.finish()]
        while isinstance(events[0].block, Thinking):
            events = events[events.index(BlockEnded()) + 1 :]
        assert isinstance(events[0].block, Text)
        jsonschema.validate(json.loads("".join(event.text for event in events if isinstance(event, Delta))), schema)


def test_only_the_tool_that_is_named_is_called(grammars):
    template = Template(grammars[1], SOURCES["hermes"], {"eos_token": "</s>"})
    request = replace(asked(), tool_choice=ToolChoice("tool", "time", parallel=False))
    for seed in range(5):
        assert calls(template, request, walk(grammars, template, request, seed)) == [("time", {})]


@pytest.mark.parametrize("family", ["hermes", "tagged", "gemma", "mistral", "mistral list"])
def test_calls_are_kept_to_their_form_each_time_that_one_is_begun(grammars, family):
    template = Template(grammars[1], SOURCES[family], {"eos_token": "</s>"})
    request = asked("auto", parallel=True)
    form = form_for(template, request, "")
    assert form.again
    for seed in range(5):
        constraint = grammars[0].begin(Grammar(form.kind, form.text, form.after, form.again))
        random = torch.Generator().manual_seed(seed)
        for _ in range(2):  # free words, an opener, and a call that is kept
            ids = [*grammars[1].encode("Well. ").ids, *form.after]
            assert not any(constraint.take(id) for id in ids)
            while constraint.active:
                logits = torch.randn(grammars[1].get_vocab_size(), generator=random)
                constraint.mask(logits)
                ids.append(int(logits.softmax(-1).multinomial(1, generator=random)))
                assert not constraint.take(ids[-1])
            called = calls(template, request, grammars[1].decode(ids, skip_special_tokens=False))
            assert len(called) == 1
            check(called)


def test_a_tool_that_must_not_be_called_has_no_opener(grammars):
    template = Template(grammars[1], SOURCES["hermes"], {"eos_token": "</s>"})
    form = form_for(template, asked("none"), "")
    constraint = grammars[0].begin(Grammar(form.kind, form.text, form.after))
    logits = torch.zeros(grammars[1].get_vocab_size())
    constraint.mask(logits)
    assert (logits == float("-inf")).nonzero().tolist() == [[grammars[1].token_to_id("<tool_call>")]]
    assert not constraint.take(0)
    assert calls(template, asked("none"), '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>') == []


def test_twenty_models_call_and_every_input_is_of_its_schema(tmp_path):
    base = tmp_path / "base"
    make_base(base, "qwen3", size="tiny", seed=3)
    template = Template.load(base)

    request = asked(tools=(Tool("weather", "", SMALL), TOOLS[1]))

    async def one(client, seed):
        prompt = await asyncio.to_thread(render, template, request, [])
        tail = template.decode(prompt.tail[-TAIL:], skip_special_tokens=False)
        form = form_for(template, request, tail)
        ids = [id for piece in prompt.prefix for id in piece.ids] + list(prompt.tail)
        sent = Request(
            f"{seed}", (), tuple(ids), 100, None, Sampling(seed=seed), stop_ids(template), Grammar(form.kind, form.text)
        )
        events = [event async for event in client.generate(sent)]
        assert events[-1].finish == "stop"
        said = template.decode([id for event in events for id in event.ids if id not in stop_ids(template)])
        return calls(template, request, said)

    async def whole():
        client = EngineClient(EngineSettings(str(base), threads=1))
        try:
            return await asyncio.gather(*map(partial(one, client), range(20)))
        finally:
            await client.stop()

    found = asyncio.run(whole())
    assert [len(called) for called in found] == [1] * 20
    assert {name for called in found for name, _ in called} == {"weather", "time"}
    for called in found:
        for name, given in called:
            jsonschema.validate(given, SMALL if name == "weather" else NONE)


@pytest.mark.parametrize(("family", "model"), [("hermes", "qwen3"), ("tagged", "qwen3_5"), ("gemma", "gemma4")])
def test_calls_read_as_transformers_reads_them(grammars, family, model):
    from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS, _normalize_tool_call
    from transformers.utils.chat_parsing.response_parser import parse_response

    theirs = next(found for models, found in _RESPONSE_TEMPLATE_FALLBACKS.items() if model in models)
    template = Template(grammars[1], SOURCES[family], {"eos_token": "</s>"})
    tools = [{"type": "function", "function": {"name": tool.name, "parameters": tool.schema}} for tool in TOOLS]
    for seed in range(10):
        text = walk(grammars, template, asked(parallel=True), seed)
        message = parse_response(text, theirs, prefix="", tools=tools)
        found = [_normalize_tool_call(call) for call in message["tool_calls"]]
        assert calls(template, asked(), text) == [(call.name, json.loads(call.arguments)) for call in found], text
