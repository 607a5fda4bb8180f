"""Replies become blocks, family by family, however they are cut, and whatever is written in them."""

import json
import string
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.chat.calls import JsonObject, is_object
from ropewalk.chat.dialects.gemma import Gemma
from ropewalk.chat.dialects.harmony import Harmony
from ropewalk.chat.dialects.hermes import Hermes
from ropewalk.chat.dialects.known import DIALECTS, dialect_of
from ropewalk.chat.dialects.llama import Llama
from ropewalk.chat.dialects.mistral import Mistral
from ropewalk.chat.dialects.tagged import Tagged
from ropewalk.chat.messages import BlockEnded, BlockStarted, Delta, MessagesRequest, Text, Thinking, Tool, ToolUse, Turn
from ropewalk.chat.replies import parser_for
from ropewalk.chat.template import Template

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "places": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object"},
        "ratio": {"type": ["number", "null"]},
    },
}
TOOLS = (Tool("weather", "Tells the weather.", SCHEMA), Tool("time", "", {"type": "object", "properties": {}}))
SOURCES = {
    Hermes: "{% if tools %}<tool_call>{{ tools }} arguments{% endif %}{{ messages }}",
    Tagged: "{% if tools %}<tool_call><function=x>{{ tools }}{% endif %}",
    Gemma: "{% if tools %}<|tool_call>call:{{ tools }}{% endif %}",
    Mistral: "{% if tools %}[TOOL_CALLS][ARGS][THINK]{{ tools }}{% endif %}",
    Harmony: "<|start|><|channel|><|message|>{{ tools }}",
    Llama: "<|start_header_id|>{{ tools }} parameters",
}


@pytest.fixture(scope="module")
def templates(tokenizer_folder):
    plain = Template.load(tokenizer_folder, "chatml")
    found = {family: Template(plain.tokenizer, source, plain.special) for family, source in SOURCES.items()}
    return found | {None: plain}


def parser(template, tail="", kept=False, tools=TOOLS, thinking=True, last="user"):
    request = MessagesRequest("m", 10, (Turn(last, (Text("x"),)),), tools=tools, thinking=thinking)
    return parser_for(template, request, tail, kept=kept)


def read(template, text, cuts=(), **more):
    """Blocks as (kind, text) and (name, input as text)."""
    reader = parser(template, **more)
    places = [0, *sorted(cuts), len(text)]
    events = [event for a, b in pairwise(places) for event in reader.feed(text[a:b])] + reader.finish()
    found, ended = [], True
    for event in events:
        match event:
            case BlockStarted(block):
                assert ended
                found.append([block.name if isinstance(block, ToolUse) else type(block), ""])
                assert not isinstance(block, ToolUse) or block.id.startswith("toolu_")
                ended = False
            case Delta(said):
                assert not ended
                assert said
                found[-1][1] += said
            case BlockEnded():
                assert not ended
                ended = True
    assert ended
    return [tuple(block) for block in found], reader.called


WEATHER = {"city": 'São <b> "Paulo"\n{x}', "days": 3, "exact": True, "places": ["a", "b, c"], "where": {"x": [1.5, None]}}
MULTILINE = 'def f():\n    return "<x>"\n'
CALLS = {
    Hermes: "<tool_call>\n" + json.dumps({"name": "weather", "arguments": WEATHER}) + "\n</tool_call>",
    Tagged: "<tool_call>\n<function=weather>\n<parameter=city>\n" + WEATHER["city"] + "\n</parameter>\n"
    '<parameter=days>\n3\n</parameter>\n<parameter=exact>\ntrue\n</parameter>\n<parameter=places>\n["a", "b, c"]\n</parameter>\n'
    '<parameter=where>\n{"x": [1.5, null]}\n</parameter>\n</function>\n</tool_call>',
    Gemma: '<|tool_call>call:weather{city:<|"|>'
    + WEATHER["city"]
    + '<|"|>,days:3,exact:true,places:[<|"|>a<|"|>,<|"|>b, c<|"|>],'
    "where:{x:[1.5,null]}}<tool_call|>",
    Mistral: "[TOOL_CALLS]weather[ARGS]" + json.dumps(WEATHER),
    Harmony: "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + json.dumps(WEATHER) + "<|call|>",
    Llama: json.dumps({"name": "weather", "parameters": WEATHER}),
}
THOUGHT = {
    Hermes: "<think>\nHm.\n</think>\n\n",
    Tagged: "<think>\nHm.\n</think>\n\n",
    Gemma: "<|channel>thought\nHm.\n<channel|>",
    Mistral: "[THINK]Hm.[/THINK]",
    Harmony: "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant",
}
TAILS = {Harmony: "<|start|>assistant"}
FAMILIES = list(CALLS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [False, True])
def test_a_call_is_read_with_its_thought_before_it(templates, family, kept):
    text = THOUGHT.get(family, "") + CALLS[family]
    for cuts in [(), range(1, len(text)), (5, 9, 40)]:
        blocks, called = read(templates[family], text, cuts, kept=kept, tail=TAILS.get(family, ""))
        assert called
        if family in THOUGHT:
            assert blocks.pop(0) == (Thinking, "Hm.")
        [(name, found)] = blocks
        assert name == "weather"
        assert json.loads(found) == WEATHER


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_is_kept_whole_is_told_while_it_comes(templates, family):
    reader = parser(templates[family], kept=True, tail=TAILS.get(family, ""))
    half = len(CALLS[family]) * 2 // 3
    events = reader.feed(CALLS[family][:half])
    assert isinstance(events[0].block, ToolUse)
    assert "Paulo" in "".join(event.text for event in events if isinstance(event, Delta))
    assert parser(templates[family], tail=TAILS.get(family, "")).feed(CALLS[family][:half]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_is_cut_off_is_text_or_closed_json(templates, family):
    call = CALLS[family]
    for end in range(len(call)):
        blocks, called = read(templates[family], call[:end], tail=TAILS.get(family, ""))
        if called:
            assert json.loads(blocks[0][1]) == WEATHER
        else:
            assert "".join(text for _, text in blocks) == call[:end].rstrip() or blocks[0][1] == call[:end]
        streamed, _ = read(templates[family], call[:end], kept=True, tail=TAILS.get(family, ""))
        assert all(isinstance(kind, type) or isinstance(json.loads(text), dict) for kind, text in streamed)


def test_text_before_calls_and_several_calls(templates):
    two = CALLS[Hermes] + "\n" + '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    blocks, _ = read(templates[Hermes], "Let me look.\n\n" + two)
    assert [kind for kind, _ in blocks] == [Text, "weather", "time"]
    assert blocks[0][1] == "Let me look."
    two = 'I look.[TOOL_CALLS]time[ARGS]{}[TOOL_CALLS]time[ARGS]{"a": "[TOOL_CALLS]"}'
    assert [kind for kind, _ in read(templates[Mistral], two)[0]] == [Text, "time", "time"]
    older = '[TOOL_CALLS][{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {"days": 2}, "id": "abcdefghi"}]'
    assert read(templates[Mistral], older)[0] == [("time", "{}"), ("weather", '{"days": 2}')]
    gemma = "<|tool_call>call:time{}<tool_call|><|tool_call>call:weather{days:-1}<tool_call|>"
    assert read(templates[Gemma], gemma)[0] == [("time", "{}"), ("weather", '{"days":-1}')]


def test_channels_of_several_messages(templates):
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.time<|channel|>commentary json<|message|>{}"
    assert read(templates[Harmony], said, tail="<|start|>assistant") == ([(Text, "I look."), ("time", "{}")], True)
    final = THOUGHT[Harmony] + "<|channel|>final<|message|>It rains. "
    assert read(templates[Harmony], final, tail="<|start|>assistant") == ([(Thinking, "Hm."), (Text, "It rains. ")], False)
    unknown = "<|channel|>commentary to=functions.nothing <|constrain|>json<|message|>{}"
    assert read(templates[Harmony], unknown, tail="<|start|>assistant") == ([(Text, unknown)], False)


def test_arguments_that_are_text_are_typed_by_the_schema(templates):
    def value(name, text):
        call = f"<tool_call>\n<function=weather>\n<parameter={name}>\n{text}\n</parameter>\n</function>\n</tool_call>"
        [(_, found)], _ = read(templates[Tagged], call)
        return json.loads(found)[name]

    assert value("city", "5") == "5"
    assert value("city", MULTILINE) == MULTILINE
    assert value("days", "5") == 5
    assert value("days", "5.0") == 5
    assert value("days", "many") == "many"
    assert value("exact", "True") is True
    assert value("ratio", "null") is None
    assert value("ratio", "0.25") == 0.25
    assert value("unknown", "[1]") == [1]
    assert value("unknown", "as it is") == "as it is"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no call</tool_call> and more",
        '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": []}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {} and}</tool_call>',
        "<tool_call>",
    ],
)
def test_what_is_no_call_is_text(templates, text):
    assert read(templates[Hermes], text) == ([(Text, text)], False)
    assert read(templates[Hermes], text, range(1, len(text))) == ([(Text, text)], False)


def test_a_call_within_a_spoilt_one_is_found(templates):
    blocks, _ = read(templates[Hermes], '<tool_call>oh <tool_call>{"name": "time", "arguments": {}}</tool_call>')
    assert blocks == [(Text, "<tool_call>oh"), ("time", "{}")]


def test_thinking_that_the_prompt_began_and_that_nobody_asked_for(templates):
    assert read(templates[Hermes], "Hm.\n</think>\n\nYes.", tail="<think>\n")[0] == [(Thinking, "Hm."), (Text, "Yes.")]
    assert read(templates[Hermes], "Hm.\n</think>\n\nYes.", tail="<think>\n", thinking=False)[0] == [(Text, "Yes.")]
    assert read(templates[Hermes], " and two", last="assistant")[0] == [(Text, " and two")]
    assert read(templates[Llama], "{ no call }")[0] == [(Text, "{ no call }")]
    assert read(templates[Llama], 'x {"name": "time", "parameters": {}}')[1] is False
    assert read(templates[Llama], '<|python_tag|>{"name": "time", "parameters": {}}')[0] == [("time", "{}")]


def test_families_are_known_by_their_templates(templates):
    for family, template in templates.items():
        if family is not None:
            assert type(dialect_of(template)) is family
    assert set(DIALECTS.values()) == set(FAMILIES)
    assert dialect_of(templates[None]).calls


MARKERS = [
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=weather>",
        "</function>",
        "<parameter=city>",
        "</parameter>",
    ),
    *("<parameter=days>", '{"name": "time", "arguments": {', '"name"', "call:weather{", "city:", '<|"|>', "<|tool_call>", "}"),
    *(
        "<tool_call|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "weather",
        "[{",
        "]",
        "[THINK]",
        "[/THINK]",
        "<|channel|>",
        "analysis",
        "<|message|>",
    ),
    *(
        "commentary to=functions.time",
        "<|end|>",
        "<|start|>",
        "<|call|>",
        "final",
        "<|channel>thought\n",
        "<channel|>",
        "{",
        ",",
    ),
    *('"', ":", "\\", "\n", " ", "true", "1", "<|python_tag|>", "\\ud800", "\\u00e9"),
]
replies = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(string.ascii_letters + '{}[]":, \n\\<>|/', max_size=6))).map(
    "".join
)


@pytest.mark.parametrize("family", [*FAMILIES, None])
@settings(max_examples=150, deadline=None)
@given(reply=replies, data=st.data())
def test_any_reply_reads_the_same_however_it_is_cut(templates, family, reply, data):
    tail = data.draw(st.sampled_from(["", "<think>", "<|start|>assistant"]))
    cuts = data.draw(st.lists(st.integers(0, len(reply))))
    for kept in (False, True):
        whole, called = read(templates[family], reply, kept=kept, tail=tail)
        assert read(templates[family], reply, cuts, kept=kept, tail=tail) == (whole, called)
        for kind, text in whole:
            assert isinstance(kind, type) or isinstance(json.loads(text), dict)


@pytest.mark.parametrize("family", [Hermes, Tagged, Gemma, Mistral, None])
@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.text(string.ascii_letters + " \n{}:,", min_size=1), min_size=1, max_size=4))
def test_every_character_outside_markers_is_somewhere(templates, family, words):
    call = CALLS[family] if family else ""
    reply = call.join(words)
    blocks, _ = read(templates[family], reply)
    said = "".join(text for kind, text in blocks if kind is Text)
    assert said.split() == "".join(words).split() or "".join(said.split()) == "".join("".join(words).split())
    assert sum(kind == "weather" for kind, _ in blocks) == (len(words) - 1 if family else 0)


@settings(max_examples=200, deadline=None)
@given(
    value=st.dictionaries(
        st.text(),
        st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), st.lists),
    ),
    ascii=st.booleans(),
    data=st.data(),
)
def test_json_can_be_closed_wherever_it_is_cut(value, ascii, data):
    text = json.dumps(value, ensure_ascii=ascii)
    scanner = JsonObject()
    told, count = scanner.feed(text + "rest")
    assert (told, count, scanner.done) == (text, len(text), True)
    end = data.draw(st.integers(0, len(text)))
    scanner = JsonObject()
    told, _ = scanner.feed(text[:end])
    assert is_object(told + scanner.close())
