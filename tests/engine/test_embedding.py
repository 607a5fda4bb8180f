"""Chunks found by meaning: a tiny encoder of this machine, another server's, and vectors that die with their file."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from ropewalk.chat import messages
from ropewalk.chat.messages import Ended, FileId, MessagesRequest, Retrieved, Text, Turn, Usage
from ropewalk.chat.retrieval import Index, chunks, fused
from ropewalk.config.serving import Embeddings, EngineOptions, Remote, Retrieval, ServedModel, Serving
from ropewalk.engine.embedding import KIND, LocalEncoder, Meanings
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, UpstreamFailed
from ropewalk.files.documents import document
from ropewalk.files.reading import Document
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import derived
from ropewalk.models.base import make_base
from ropewalk.registry import Registry

WORDS = "the dog cat car vehicle rent money is a fast old red sleeps drives costs".split()
# What the other server knows of meanings: words of one kind point in one direction.
KINDS = {"automobile": 0, "car": 0, "engine": 0, "rent": 1, "money": 1, "dog": 2, "animal": 2}
TEXT = "\n\n".join(
    f"# Part {n}\n\n{said} {'Nothing of note. ' * 12}"
    for n, said in enumerate(["The dog sleeps.", "A car was bought in May.", "The rent is due.", "It rained all week."])
)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A BERT with random weights and one token a word."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def meant() -> Iterator[Any]:
    """Another server's /v1/embeddings, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        broken = False

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({"path": self.path, "key": self.headers["authorization"], **body})
            rows = []
            for n, text in enumerate(body["input"]):
                vector = [0.0, 0.0, 0.0, 0.1]
                for word in text.lower().replace(".", " ").replace("?", " ").split():
                    if word in KINDS:
                        vector[KINDS[word]] += 1.0
                rows.append({"index": n, "embedding": vector})
            answer = json.dumps({"data": rows[:-1] if Handler.broken else rows[::-1]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.asked, server.handler = asked, Handler
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store_of(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_ROOT_KEY_FILE", str(tmp_path / "root.key"))
    return lambda: Store.open(Settings(data=tmp_path / "data"))


async def put(store, caller, text=TEXT):
    async def sent():
        yield text.encode()

    return (await store.put(caller, sent(), "notes.md")).id


async def kinds(store):
    async with store.database.reading() as connection:
        return sorted((await connection.execute(select(derived.c.kind))).scalars())


def test_two_rankings_become_one():
    a, b, c = (chunk for chunk in Index([Document("text/plain", "One. Two. Three.", (), ())], 4).chunks[0])
    assert fused([a, b, c]) == [a, b, c]
    # a: 1/61 + 1/63; b: 1/62 + 1/61; c: 1/63 + 1/62.
    assert fused([a, b, c], [b, c, a]) == [b, a, c]
    assert fused([], [c, a]) == [c, a]


def test_the_vectors_of_a_local_encoder_are_those_of_transformers(encoder_folder):
    texts = ["the dog sleeps", "a car", "the old red car drives fast and the rest is cut off" + " the" * 50]

    async def whole(pooling):
        encoder = LocalEncoder(encoder_folder, pooling, 1)
        try:
            encoded = await encoder.encode(texts)
            assert encoded.cut == (2,)  # the last is longer than the 32 tokens that are read
            assert encoded.tokens == 3 + 2 + 32
            return encoded.vectors
        finally:
            await encoder.close()

    model, tokenizer = AutoModel.from_pretrained(encoder_folder).eval(), AutoTokenizer.from_pretrained(encoder_folder)
    for pooling in ("", "cls", "last"):
        found = asyncio.run(whole(pooling))
        for text, vector in zip(texts, found, strict=True):
            with torch.inference_mode():
                hidden = model(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0]
            wanted = {"": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            assert np.allclose(vector, torch.nn.functional.normalize(wanted, dim=0).numpy(), atol=2e-3)


def test_a_folder_that_is_no_encoder_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="is no encoder that transformers can load"):
        asyncio.run(LocalEncoder(tmp_path).encode(["x"]))


def test_vectors_are_made_once_kept_sealed_and_gone_with_the_file(encoder_folder, store_of, monkeypatch, tmp_path):
    async def story():
        store = await store_of()
        caller = await store.local_caller()
        id = await put(store, caller)
        encoder = LocalEncoder(encoder_folder, threads=1)
        encoded = []
        encode = encoder.encode

        async def counted(texts):
            encoded.append(len(texts))
            return await encode(texts)

        monkeypatch.setattr(encoder, "encode", counted)
        meanings = Meanings(store, encoder, Embeddings(str(encoder_folder)))
        read = await document(store, caller, id)
        count = len(chunks(read, 120))
        first, same = await asyncio.gather(*(meanings.nearness(caller, [(id, read)], 120, "the dog sleeps") for _ in range(2)))
        again = await meanings.nearness(caller, [(id, read)], 120, "the dog sleeps")
        assert np.allclose(first, same, atol=1e-2)
        assert np.allclose(first, again, atol=1e-2)
        assert sorted(encoded) == sorted([1, 1, 1, count])  # three questions, and the file once
        assert KIND in await kinds(store)
        receipt = await store.delete(caller, id)
        assert KIND in receipt.derived
        assert KIND not in await kinds(store)
        await meanings.close()
        await store.close()

    asyncio.run(story())


def test_a_question_finds_by_meaning_what_it_shares_no_word_with(meant, store_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MEANT_KEY", "sk-meant")
    make_base(tmp_path / "tiny", "qwen3", size="tiny", seed=1)
    url = f"http://127.0.0.1:{meant.server_address[1]}"

    async def asked(embeddings, ahead=False):
        store = await store_of()
        caller = await store.local_caller()
        id = await put(store, caller, TEXT)
        options = EngineOptions(threads=1, longest=220)
        models = Models(
            store,
            Registry(tmp_path / "registry"),
            Serving({"m": ServedModel(str(tmp_path / "tiny"))}, options, Retrieval(chunk=120, tokens=60), embeddings),
        )
        try:
            answerer = await models.answerer("m")
            if embeddings is not None and ahead:
                assert await models.warm(caller, "m", id) == Usage()
                assert KIND in await kinds(store)
                meant.asked.clear()
            blocks = (messages.Document(FileId(id)), Text("Which automobile came when?"))
            request = MessagesRequest("m", 2, (Turn("user", blocks),), temperature=0.0)
            events = [event async for event in answerer.stream(caller, request)]
            assert isinstance(events[0], Retrieved)
            assert isinstance(events[-1], Ended)
            inner = answerer.answers
            prompt, *_ = await inner._prompt(caller, request, await inner._album(caller, request))
            return inner.template.decode([id for piece in prompt.prefix for id in piece.ids])
        finally:
            await models.close()
            await store.close()

    assert "car was bought" not in asyncio.run(asked(None))
    remote = Remote("openai", url, "meant-1", "MEANT_KEY")
    assert "car was bought" in asyncio.run(asked(Embeddings(remote=remote, query="query: ", passage="passage: ")))
    first = meant.asked[0]
    assert (first["path"], first["key"], first["model"]) == ("/v1/embeddings", "Bearer sk-meant", "meant-1")
    assert first["input"] == ["query: Which automobile came when?"]
    assert all(text.startswith("passage: ") for text in meant.asked[1]["input"])
    assert "car was bought" in asyncio.run(asked(Embeddings(remote=remote), ahead=True))
    assert [len(found["input"]) for found in meant.asked] == [1, 1]  # twice the question, never the file
    meant.handler.broken = True
    with pytest.raises(UpstreamFailed, match="'embeddings' answered with no vector for each text"):
        asyncio.run(asked(Embeddings(remote=remote)))
    meant.handler.broken = False
