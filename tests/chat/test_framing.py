"""What stands around a document: ours, or what the model was trained on."""

import json
import shutil

import pytest

from ropewalk.chat.framing import FILE, Framing, framing
from ropewalk.chat.messages import Document, FileId, MessagesRequest, Text, Turn
from ropewalk.chat.prompt import Shown, render
from ropewalk.chat.template import Template
from ropewalk.errors import ModelError
from ropewalk.quickstart.run import BASE


def said(template, request, shown, instruction=""):
    prompt = render(template, request, [shown], instruction)
    ids = [id for piece in prompt.prefix for id in piece.ids] + list(prompt.tail)
    return template.decode(ids, skip_special_tokens=False)


def asked(document):
    return MessagesRequest("m", 10, (Turn("user", (document, Text("How much?"))),), (Text("Be short."),))


LEASE = Document(FileId("file_1"))


def test_the_quickstarts_base_gets_documents_as_it_was_trained_to_read_them():
    template = Template.load(BASE)
    assert framing(str(BASE)) == Framing(tags=False, numbers=False)
    assert "<|im_start|>user\nThe rent is 900.\n\nHow much?<|im_end|>" in said(
        template, asked(LEASE), Shown("The rent is 900.\n")
    )


def test_other_models_get_tags_and_what_the_system_part_adds(tokenizer_folder):
    template = Template.load(tokenizer_folder, "chatml")
    text = said(template, asked(LEASE), Shown("The rent is 900."), "Name the numbers.")
    assert "Be short.\n\nName the numbers." in text
    assert "<document>\nThe rent is 900.\n</document>\n\nHow much?" in text


@pytest.mark.parametrize("values", [{"tags": "no"}, {"tag": True}, [], "{"])
def test_a_file_that_says_something_else_is_refused(tmp_path, values):
    (tmp_path / FILE).write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(ModelError, match=FILE):
        framing(str(tmp_path))


def test_a_copy_of_a_base_keeps_its_framing(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    assert not framing(str(tmp_path / "base")).tags
