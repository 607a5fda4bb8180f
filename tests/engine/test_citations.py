"""Citations through the answerer: what the model is shown, what it may write, and what the caller gets of it."""

import json

import numpy as np
import pytest
import torch

from files.papers import pdf
from ropewalk.chat.framing import FILE
from ropewalk.chat.messages import Bytes, CitationAdded, Cited, Delta, Document, FileId, MessagesRequest, Pieces, Text, Turn
from ropewalk.chat.template import Template
from ropewalk.engine.answer import Answerer, Places
from ropewalk.engine.grammar import Grammars
from ropewalk.engine.request import Event, Grammar
from ropewalk.engine.sources import Sources
from ropewalk.files.local import open_local
from ropewalk.models.base import make_base

LEASE = "The flat is in Oslo. The rent is 900 euros.\nIt is due on the first.\n"


class Scripted:
    """An engine that writes what it is told to, a few ids at a time."""

    longest = 4096

    def __init__(self, template, reply):
        self._template, self._reply, self.request = template, reply, None

    async def start(self):
        pass

    async def generate(self, request, pixels=None, over=()):
        self.request = request
        ids = self._template.encode_content(self._reply)
        for place in range(0, len(ids), 3):
            yield Event(request.id, 0, tuple(ids[place : place + 3]), read=0 if not place else None)
        yield Event(request.id, 0, finish="stop", read=0 if not ids else None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("citing") / "base"
    make_base(folder, "qwen3_moe", size="tiny", seed=3)
    return folder


@pytest.fixture
def ask(base, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    files = open_local()
    file = files.put(LEASE.encode(), "lease.txt")

    def asked(reply, *documents, before=()):
        template = Template.load(base)
        client = Scripted(template, reply)
        documents = documents or (Document(FileId(file.id), title="Lease", citations=True),)

        async def work(store, caller):
            answerer = Answerer(store, Sources(store), Places(store), client, template, "w")
            turns = [Turn("user", (*documents, Text("How much is the rent?")))]
            turns += [Turn("assistant", before), Turn("user", (Text("And until when?"),))] if before else []
            request = MessagesRequest("m", 100, tuple(turns))
            assert await answerer.count(caller, request) > 0
            return [event async for event in answerer.stream(caller, request)]

        events = files.run(work)
        ids = [id for span in client.request.prefix for id in span.ids] + list(client.request.tail)
        return events, template.decode(ids, skip_special_tokens=False), client.request, file.id

    return asked


def cited(events):
    return [event.citation for event in events if isinstance(event, CitationAdded)]


def text(events):
    return "".join(event.text for event in events if isinstance(event, Delta))


def test_a_numbered_file_is_cited_by_its_numbers(ask):
    events, prompt, request, file_id = ask("You pay 900 euros [2]. Do so at once [9].")
    assert "[1] The flat is in Oslo. [2] The rent is 900 euros.\n[3] It is due on the first.\n" in prompt
    assert "name the sentences it rests on" in prompt
    assert text(events) == "You pay 900 euros. Do so at once."
    (citation,) = cited(events)
    assert (citation.text, citation.start, citation.end) == ("The rent is 900 euros.", 21, 43)
    assert (citation.title, citation.file_id, citation.document) == ("Lease", file_id, 0)
    assert request.grammar is None


def test_without_citations_a_document_stands_as_it_is(ask):
    document = Document(Bytes("text/plain", LEASE.encode()))
    events, prompt, _, _ = ask("See [2].", document)
    assert LEASE in prompt
    assert text(events) == "See [2]."
    assert not cited(events)


def test_blocks_and_texts_in_one_request_are_cited_in_their_own_terms(ask):
    blocks = Document(Pieces(("One block.", "Another block. Of two sentences.")), citations=True)
    sent = Document(Bytes("text/plain", b"A text."), citations=True)
    events, prompt, _, _ = ask("So it is [2][3].", blocks, sent)
    assert "[2] Another block. Of two sentences." in prompt
    assert [(c.kind, c.document, c.start, c.end, c.text) for c in cited(events)] == [
        ("content_block_location", 0, 1, 2, "Another block. Of two sentences."),
        ("char_location", 1, 0, 7, "A text."),
    ]


def test_a_pdf_is_cited_by_its_pages(ask):
    paper = pdf("First page. It is short.", "The rent is 900 euros. It is due on the first.")
    events, prompt, _, _ = ask(
        "900 euros [3], on the first [4]. All of it [2-3].", Document(Bytes("application/pdf", paper), citations=True)
    )
    assert "[3] The rent is 900 euros. [4] It is due on the first." in prompt
    found = cited(events)
    assert [(c.kind, c.start, c.end) for c in found] == [
        ("page_location", 2, 3),
        ("page_location", 2, 3),
        ("page_location", 1, 3),
    ]
    assert found[0].text == "The rent is 900 euros."
    assert found[2].text.startswith("It is short.")
    assert found[2].text.endswith("The rent is 900 euros.")


def test_an_earlier_reply_is_read_again_as_its_text(ask):
    earlier = (Text("It is 900. ", (Cited("char_location", "The rent is 900 euros.", 0, None, None, 21, 43),)), Text("Fine."))
    _, prompt, _, _ = ask("On the first.", before=earlier)
    assert "assistant\nIt is 900. Fine.<|" in prompt


def test_a_reply_can_be_held_to_markers_that_exist(ask, base):
    (base / FILE).write_text(json.dumps({"steered": True}))
    try:
        _, _, request, _ = ask("Yes [2].")
    finally:
        (base / FILE).unlink()
    template = Template.load(base)
    assert request.grammar is not None
    for reply, allowed in (
        ("It is 900 [2]. So [x] (a[i])", True),
        ("All [1-3]", True),
        ("No [4", False),
        ("No [0", False),
        ("[31", False),
    ):
        assert follows(base, template, request.grammar, reply) is allowed, reply


def follows(base, template, grammar: Grammar, reply: str) -> bool:
    follower = Grammars(base / "tokenizer.json", template.stop_ids).begin(grammar)
    for id in template.encode_content(reply):
        logits = torch.zeros(template.vocabulary)
        follower.mask(logits)
        if np.isinf(logits[id].item()):
            return False
        follower.take(id)
    return True
