"""Chat completions and completions under /openai/v1, with the official client unchanged, over a real engine of a tiny model."""

import base64
import json
import re
import secrets

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from ropewalk.chat.template import Template
from ropewalk.errors import Overloaded

TEXT = "The lighthouse of Pellworm was built in 1907 and is 41 metres high. " * 8
SAY = [{"role": "user", "content": "Say something."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"enum": ["Kiel", "Ulm"]}}, "required": ["place"]},
    },
}


@pytest.fixture(scope="module")
def place(asked):
    """A workspace of these tests' own and a client of it."""
    _, key = asked.workspace(f"openai chat {secrets.token_hex(4)}")
    with openai.OpenAI(base_url=f"{asked.url}/openai/v1", api_key=key, max_retries=0) as client:
        yield asked, client, key


@pytest.fixture(scope="module")
def client(place):
    return place[1]


@pytest.fixture(scope="module")
def template(tiny):
    return Template.load(tiny)


def ask(client, **more):
    given = {"model": "tiny", "messages": SAY, "max_tokens": 6, "temperature": 0}
    return client.chat.completions.create(**{**given, **more})


def test_a_reply_is_whole_or_comes_in_chunks_and_is_the_same(client):
    whole = ask(client)
    assert whole.object == "chat.completion"
    [choice] = whole.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    usage = whole.usage
    assert (usage.completion_tokens, usage.total_tokens) == (6, usage.prompt_tokens + 6)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in ask(client, stream=True))


def test_a_prompt_is_read_once_for_several_replies_which_differ(client):
    whole = ask(client, n=4, temperature=1.0, seed=7, max_tokens=12)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    assert whole.usage.prompt_tokens == ask(client).usage.prompt_tokens  # once, and not four times
    assert 4 < whole.usage.completion_tokens <= 48
    assert [c.message.content for c in ask(client, n=4, temperature=1.0, seed=7, max_tokens=12).choices] == texts
    streamed = {}
    for chunk in ask(client, n=4, temperature=1.0, seed=7, max_tokens=12, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(4)] == texts


def test_what_was_read_before_is_told_as_cached(client):
    made = client.files.create(file=("pellworm.txt", TEXT.encode()), purpose="user_data")
    parts = [{"type": "file", "file": {"file_id": made.id}}, {"type": "text", "text": "How high?"}]
    asked = [ask(client, messages=[{"role": "user", "content": parts}], max_tokens=2) for _ in range(2)]
    cached = [reply.usage.prompt_tokens_details.cached_tokens for reply in asked]
    assert cached[1] > len(TEXT) // 40
    assert cached[1] > cached[0]
    inline = {"type": "file", "file": {"filename": "p.txt", "file_data": base64.b64encode(TEXT.encode()).decode()}}
    assert ask(client, messages=[{"role": "user", "content": [inline]}], max_tokens=1).usage.prompt_tokens > len(TEXT) // 40
    with pytest.raises(openai.NotFoundError, match="not found"):
        ask(client, messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "file_none"}}]}])


def test_token_ids_and_logprobs_are_those_of_the_model(client, tiny, template):
    reply = ask(client, logprobs=True, temperature=1.0, seed=1, extra_body={"return_token_ids": True})
    [choice] = reply.choices
    prompt, ids = reply.prompt_token_ids, choice.token_ids
    assert prompt == template.render(SAY, add_generation_prompt=True).ids
    assert len(ids) == reply.usage.completion_tokens == len(choice.logprobs.content) == len(choice.token_versions)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1)[range(len(ids)), ids]
    told = torch.tensor([token.logprob for token in choice.logprobs.content])
    assert torch.allclose(told, wanted, atol=1e-3)
    assert [token.token for token in choice.logprobs.content] == [template.decode([id], False) for id in ids]
    as_ids = ask(client, logprobs=True, extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True})
    named = [f"token_id:{id}" for id in as_ids.choices[0].token_ids]
    assert [token.token for token in as_ids.choices[0].logprobs.content] == named


def test_the_likeliest_tokens_are_told_in_the_place_of_each(client, tiny):
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    reply = ask(client, logprobs=True, top_logprobs=3, temperature=1.0, seed=4, max_tokens=4, extra_body=ids)
    prompt, chosen = reply.prompt_token_ids, reply.choices[0].token_ids
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
    values, places = logits.log_softmax(-1).topk(3)
    for token, wanted, likely in zip(reply.choices[0].logprobs.content, values.tolist(), places.tolist(), strict=True):
        assert [other.token for other in token.top_logprobs] == [f"token_id:{id}" for id in likely]
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(wanted, abs=1e-3)
    made = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0, logprobs=2)
    assert [len(likely) for likely in made.choices[0].logprobs.top_logprobs] == [2, 2]  # greedy: the chosen is one of them
    assert max(made.choices[0].logprobs.top_logprobs[0].values()) == made.choices[0].logprobs.token_logprobs[0]


def test_chunks_tell_every_id_once(client):
    whole = ask(client, logprobs=True, extra_body={"return_token_ids": True})
    chunks = list(ask(client, logprobs=True, stream=True, extra_body={"return_token_ids": True}))
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert [id for choice in choices for id in getattr(choice, "token_ids", None) or ()] == whole.choices[0].token_ids
    told = [token.logprob for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert told == [token.logprob for token in whole.choices[0].logprobs.content]


def test_ids_go_in_and_ids_come_out(client, template):
    chat = ask(client, extra_body={"return_token_ids": True})
    given = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    made = client.completions.create(**given, prompt=chat.prompt_token_ids, logprobs=0, extra_body={"return_token_ids": True})
    [choice] = made.choices
    assert choice.token_ids == chat.choices[0].token_ids
    assert choice.prompt_token_ids == chat.prompt_token_ids
    assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens) == len(choice.token_ids)
    assert choice.logprobs.text_offset[0] == 0
    assert made.usage.prompt_tokens == len(chat.prompt_token_ids)
    more = client.completions.create(**given, prompt=chat.prompt_token_ids + choice.token_ids)
    assert more.usage.prompt_tokens_details.cached_tokens == 0  # it is shorter than a block
    streamed = client.completions.create(**given, prompt=chat.prompt_token_ids, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def test_several_prompts_are_completed_side_by_side(client):
    given = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    alone = [client.completions.create(**given, prompt=prompt).choices[0].text for prompt in ("The dog", "A cat")]
    made = client.completions.create(**given, prompt=["The dog", "A cat"], n=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in made.choices] == [alone[0], alone[0], alone[1], alone[1]]
    long = [5 + number % 1000 for number in range(400)]
    cached = [client.completions.create(**given, prompt=long).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert cached[1] == len(long) - 1
    grown = client.completions.create(**given, prompt=[*long, 7, 8]).usage.prompt_tokens_details.cached_tokens
    assert grown == 256  # whole blocks


def test_a_reply_ends_before_a_stop_sequence(client):
    text = ask(client, max_tokens=12).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    reply = ask(client, max_tokens=12, stop=stop)
    assert reply.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert (reply.choices[0].finish_reason, reply.choices[0].stop_reason) == ("stop", stop)
    both = ask(client, n=2, max_tokens=12, stop=[stop])
    assert {choice.message.content for choice in both.choices} == {reply.choices[0].message.content}


def test_a_tool_that_must_be_called_is_called_and_its_answer_goes_back(client):
    given = {"tools": [TOOL], "max_tokens": 120, "temperature": 1.0, "seed": 0}
    reply = ask(client, tool_choice="required", parallel_tool_calls=False, **given)
    [choice] = reply.choices
    [call] = choice.message.tool_calls
    print(choice, reply.usage)
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert json.loads(call.function.arguments)["place"] in ("Kiel", "Ulm")
    parts = {}
    for chunk in ask(client, tool_choice="required", parallel_tool_calls=False, stream=True, **given):
        for part in chunk.choices[0].delta.tool_calls or ():
            name, arguments = parts.get(part.index, ("", ""))
            parts[part.index] = (name + (part.function.name or ""), arguments + (part.function.arguments or ""))
    assert parts == {0: ("weather", call.function.arguments)}
    # As everybody does it: the message goes back as it came.
    told = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    again = ask(client, messages=[*SAY, choice.message, told, {"role": "user", "content": "And?"}], tools=[TOOL])
    assert again.usage.prompt_tokens > reply.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="without an answer are") as raised:
        ask(client, messages=[*SAY, choice.message, {"role": "user", "content": "And?"}], tools=[TOOL])
    assert raised.value.param == "messages.2"


def test_a_reply_is_of_its_schema(client):
    schema = {"type": "object", "properties": {"high": {"enum": [41, 42]}}, "required": ["high"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "height", "strict": True, "schema": schema}}
    told = ask(client, response_format=form, max_tokens=40).choices[0].message.content
    assert json.loads(told)["high"] in (41, 42)
    assert ask(client, response_format={"type": "json_object"}).choices[0].message.content.startswith("{")


def test_a_reply_goes_on_where_an_assistant_message_ends(client):
    begun = [*SAY, {"role": "assistant", "content": "It is"}]
    on = {"continue_final_message": True, "add_generation_prompt": False}
    assert ask(client, messages=begun, extra_body=on).usage.prompt_tokens > ask(client).usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        ask(client, messages=begun)


REFUSED = [
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"logit_bias": {"5": 100}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"extra_body": {"repetition_penalty": 1.2}}, "repetition_penalty"),
    ({"extra_body": {"guided_json": {}}}, "guided_json"),
    ({"n": 65}, "n"),
    ({"n": 0}, "n"),
    ({"temperature": 2.5}, "temperature"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "a", "name": "ann"}]}, "messages.0.name"),
    ({"messages": [{"role": "function", "content": "a", "name": "f"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "a"}]}, "messages.0.tool_call_id"),
    ({"messages": [*SAY, {"role": "assistant", "content": None}]}, "messages.1"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
]


@pytest.mark.parametrize(("more", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_what_is_not_followed_here_is_refused_by_its_name(client, more, param):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **more)
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"
    assert param.split(".")[-1] in raised.value.message or param in raised.value.message


def test_what_asks_for_nothing_passes(client):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "n": 1, "top_logprobs": 0, "store": False}
    named = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}, "service_tier": "auto"}
    extra = {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert (
        ask(client, **neutral, **named, extra_body=extra).choices[0].message.content == ask(client).choices[0].message.content
    )


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1, 2], ["a"]]}, "prompt.1.0"),
        ({"prompt": ["a"] * 40, "n": 2}, "prompt"),
        ({"prompt": [10**9]}, None),
    ],
)
def test_a_completion_that_cannot_be_had_is_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{"model": "tiny", "max_tokens": 2, **more})
    assert raised.value.param == param


def test_where_a_budget_ends_thinking_not_every_id_is_the_models_and_none_is_told(client):
    for more in ({"n": 2}, {"logprobs": True}, {"extra_body": {"return_token_ids": True}}):
        with pytest.raises(openai.BadRequestError, match="budget of thinking"):
            ask(client, reasoning_effort="low", **more)
        assert ask(client, reasoning_effort="max", **more).usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="enable_thinking"):
        ask(client, reasoning_effort="none", extra_body={"chat_template_kwargs": {"enable_thinking": True}})


def test_a_model_that_is_not_served_is_told_before_a_stream_begins(client):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as raised:
            ask(client, model="none", stream=stream)
        assert raised.value.code == "model_not_found"


def test_a_model_that_another_workspace_has_trained_is_not_there(place, tiny):
    server, client, key = place
    theirs, _ = server.workspace(f"trainers {secrets.token_hex(4)}")
    server.app.state.registry.publish_base("theirs", tiny, {"workspace": theirs.id})
    try:
        assert "theirs" not in {model.id for model in client.models.list()}
        text = client.files.create(file=("a.txt", b"text"), purpose="user_data").id
        for asking in (
            lambda: client.models.retrieve("theirs"),
            lambda: ask(client, model="theirs"),
            lambda: client.completions.create(model="theirs", prompt="a"),
        ):
            with pytest.raises(openai.NotFoundError) as raised:
                asking()
            assert raised.value.code == "model_not_found"
        with server.http(key) as http:
            assert http.post(f"/v1/files/{text}/questions", json={"model": "theirs"}).status_code == 404
    finally:
        server.app.state.registry.publish_base("theirs", tiny)


def test_pictures_are_refused_by_a_model_that_sees_none(client):
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match="reads no images"):
        ask(client, messages=[{"role": "user", "content": parts}])


def test_a_server_that_is_full_says_503_and_when_to_come_again(place, monkeypatch):
    server, client, _ = place

    async def full(name, caller):
        raise Overloaded("256 requests wait already")

    monkeypatch.setattr(server.app.state.models, "answerer", full)
    with pytest.raises(openai.InternalServerError, match="wait already") as raised:
        ask(client)
    assert (raised.value.status_code, raised.value.code) == (503, "overloaded")
    assert int(raised.value.response.headers["retry-after"]) >= 1


def test_tokens_of_all_replies_are_counted(place):
    server, client, _ = place

    def written():
        with httpx.Client(base_url=server.url) as http:
            return float(re.search(r'tokens_total\{kind="output"\} ([0-9.e+]+)', http.get("/metrics").text)[1])

    before = written()
    usage = ask(client, n=3, max_tokens=3).usage
    assert usage.completion_tokens == written() - before
