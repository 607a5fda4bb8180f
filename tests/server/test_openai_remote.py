"""OpenAI's shapes in front of another server: its chat completions, and its embeddings."""

import base64
import json
import secrets
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from ropewalk.config.serving import Embeddings, Remote, ServedModel, Serving
from ropewalk.server.settings import ServerSettings
from server.conftest import running

SAY = [{"role": "user", "content": "Say something."}]


class Handler(BaseHTTPRequestHandler):
    """Thinks aloud, says two words, and makes vectors of two numbers."""

    asked: list[dict] = []
    breaks = False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).asked.append(body)
        if self.path.endswith("embeddings"):
            rows = [{"index": n, "embedding": [3.0, 4.0 * len(text)]} for n, text in enumerate(body["input"])]
            return self._send("application/json", json.dumps({"data": rows, "usage": {"prompt_tokens": 7}}).encode())
        deltas = [{"reasoning_content": "Hm."}, {"content": "Good"}, {"content": " day"}]
        if "tools" in body:
            function = {"name": "weather", "arguments": '{"place":"Kiel"}'}
            deltas = [{"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]}]
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if "tools" in body else "stop"}]})
        usage = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}
        chunks.append({"choices": [], "usage": usage})
        if type(self).breaks:
            chunks = [*chunks[:2], {"error": {"message": "the machine is on fire", "type": "api_error"}}]
        lines = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
        return self._send("text/event-stream", b"".join(lines) + b"data: [DONE]\n\n")

    def _send(self, kind, content):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def served(root_key, tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    models = {"far": ServedModel(remote=Remote("openai", url, "big")), "claude": ServedModel(remote=Remote("anthropic", url))}
    serving = Serving(models, embeddings=Embeddings(remote=Remote("openai", url, "e5")))
    with running(tmp_path_factory.mktemp("far"), settings=ServerSettings(serving=serving)) as found:
        yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(served):
    Handler.asked.clear()
    Handler.breaks = False
    _, key = served.workspace(f"far {secrets.token_hex(4)}")
    with openai.OpenAI(base_url=f"{served.url}/openai/v1", api_key=key, max_retries=0) as found:
        yield found


def ask(client, **more):
    return client.chat.completions.create(**{"model": "far", "messages": SAY, **more})


def test_a_remote_is_asked_what_its_protocol_can_say_and_told_nothing_else(client):
    reply = ask(client, seed=5, temperature=1.5, stop=["!"], reasoning_effort="high", extra_body={"min_p": 0.1})
    [asked] = Handler.asked
    assert (asked["model"], asked["seed"], asked["temperature"], asked["min_p"]) == ("big", 5, 1.5, 0.1)
    assert (asked["stop"], asked["reasoning_effort"]) == (["!"], "high")
    assert not {"max_tokens", "max_completion_tokens", "n", "logprobs"} & asked.keys()
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == ("Good day", "Hm.")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (10, 4)
    assert reply.usage.prompt_tokens_details.cached_tokens == 6
    assert 0 < reply.usage.completion_tokens_details.reasoning_tokens < 4
    # A reply goes back as it came; the thinking in it is not shown again.
    ask(client, messages=[*SAY, message, {"role": "user", "content": "And?"}], max_tokens=3)
    assert Handler.asked[-1]["messages"][1] == {"role": "assistant", "content": "Good day"}
    assert Handler.asked[-1]["max_tokens"] == 3


def test_thinking_and_calls_come_in_a_stream_as_deltas(client):
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True, reasoning_effort="high") if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Good day"
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    choice = ask(client, tools=[tool]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls[0].function.arguments == '{"place":"Kiel"}'
    chunks = [chunk.choices[0] for chunk in ask(client, tools=[tool], stream=True) if chunk.choices]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert parts[0].id
    assert "".join(part.function.arguments or "" for part in parts) == '{"place":"Kiel"}'
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"n": 2}, "n: "),
        ({"logprobs": True}, "logprobs"),
        ({"extra_body": {"return_token_ids": True}}, "return_token_ids"),
        ({"model": "claude", "max_tokens": 5, "seed": 1}, "seed"),
        ({"model": "claude", "max_tokens": 5, "extra_body": {"min_p": 0.1}}, "min_p"),
        ({"model": "claude"}, "max_tokens"),
    ],
)
def test_what_a_remote_is_not_asked_for_is_refused(client, more, says):
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, **more)
    assert Handler.asked == []
    with pytest.raises(openai.BadRequestError, match="completions"):
        client.completions.create(model="far", prompt="a")


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client(client):
    Handler.breaks = True
    with pytest.raises(openai.APIError, match="on fire"):
        list(ask(client, stream=True))


def test_embeddings_are_vectors_of_length_one_in_either_encoding(client):
    made = client.embeddings.create(model="e5", input=["a", "ab"], encoding_format="float")
    assert [row.index for row in made.data] == [0, 1]
    assert made.data[0].embedding == pytest.approx([0.6, 0.8])
    assert (made.usage.prompt_tokens, made.model) == (7, "e5")
    raw = client.embeddings.with_raw_response.create(model="e5", input="a", encoding_format="base64")
    packed = json.loads(raw.text)["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == pytest.approx((0.6, 0.8))
    assert client.embeddings.create(model="e5", input="a").data[0].embedding == pytest.approx([0.6, 0.8])
    assert "e5" in {model.id for model in client.models.list()}
    assert client.models.retrieve("e5").id == "e5"


@pytest.mark.parametrize(
    ("more", "param"),
    [({"input": [1, 2]}, "input.0"), ({"input": []}, "input"), ({"input": ""}, "input"), ({"dimensions": 8}, "dimensions")],
)
def test_embeddings_that_cannot_be_made_are_refused(client, more, param):
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(**{"model": "e5", "input": "a", **more})
    assert raised.value.param == param
