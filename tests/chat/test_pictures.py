"""Pictures in prompts: pieces of their own, where the template shows them, and nobody's text is one."""

import pytest

from ropewalk.chat.messages import Document, FileId, Image, MessagesRequest, Text, ToolResult, ToolUse, Turn
from ropewalk.chat.pictures import BELOW, Pictured
from ropewalk.chat.prompt import Shown, render
from ropewalk.chat.template import Template
from ropewalk.errors import BadInput

TOKEN = "<|vision_pad|>"
PARTS = (
    """{% if content is string %}{{ content }}{% else %}{% for part in content %}
{%- if part.type == 'image' %}<picture>"""
    + TOKEN
    + """</picture>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}"""
)
USERS_ONLY = (
    """{% for message in messages %}[{{ message.role }}]
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}{{ call.function.arguments | tojson }}</tool_call>{% endfor -%}
{%- set content = message.content -%}
{% if message.role == 'tool' and content is not string %}{{ content | map(attribute='text') | join }}{% else %}"""
    + PARTS
    + """{% endif %}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{% if tools %}{% endif %}"""
)
EVERYWHERE = USERS_ONLY.replace("message.role == 'tool' and ", "false and ")
ONE = Pictured((1, 1, 2), "one", 30, 20, "file_1")
OTHER = Pictured((1, 2), "other", 20, 30)


@pytest.fixture(scope="module")
def templates(tokenizer_folder):
    def load(source):
        return Template.load(tokenizer_folder, chat_template_jinja=source, tokens=[TOKEN])

    return {"users only": load(USERS_ONLY), "everywhere": load(EVERYWHERE)}


def user(*blocks):
    return Turn("user", blocks)


def pieces(template, turns, *pictures, documents=()):
    """The prompt, with words for ids and pictures as they are."""
    prompt = render(template, MessagesRequest("m", 10, turns), documents, "", pictures, TOKEN)
    found = [piece.picture or template.decode(piece.ids, skip_special_tokens=False) for piece in prompt.prefix]
    return [*found, template.decode(prompt.tail, skip_special_tokens=False)], prompt


def test_a_picture_is_a_piece_between_what_the_template_writes_around_it(templates):
    found, prompt = pieces(templates["everywhere"], (user(Text("See:"), Image(FileId("file_1")), Text("What is it?")),), ONE)
    assert found == ["[user]See:<picture>", ONE, "</picture>What is it?[assistant]"]
    assert [(piece.files, piece.kept) for piece in prompt.prefix] == [((), True), (("file_1",), True)]
    assert prompt.length == len(prompt.prefix[0].ids) + 3 + len(prompt.tail)


def test_pictures_stand_in_their_order_among_texts_and_documents(templates):
    blocks = (Image(FileId("x")), Text("a"), Text("b"), Document(FileId("file_2")), Image(FileId("y")))
    found, _ = pieces(templates["everywhere"], (user(*blocks),), OTHER, ONE, documents=[Shown("Lease.", "file_2")])
    assert found[:2] == ["[user]<picture>", OTHER]
    assert "a\nb" in found[2]
    assert "Lease." in "".join(text for text in found if isinstance(text, str))
    assert [part for part in found if isinstance(part, Pictured)] == [OTHER, ONE]


def test_what_is_not_stored_and_what_follows_it_stays_off_the_disk(templates):
    _, prompt = pieces(templates["everywhere"], (user(Image(FileId("x")), Image(FileId("file_1"))),), OTHER, ONE)
    assert [piece.kept for piece in prompt.prefix] == [True, False, False, False]


CALLED = Turn("assistant", (ToolUse("toolu_1", "look", {}),))
RESULT = user(ToolResult("toolu_1", (Text("Here: "), Image(FileId("x")))), Text("Well?"))


@pytest.mark.parametrize("kind", ["users only", "everywhere"])
def test_a_tools_picture_stands_in_its_result_or_right_below(templates, kind):
    found, _ = pieces(templates[kind], (user(Image(FileId("y")), Text("Look.")), CALLED, RESULT), ONE, OTHER)
    assert [part for part in found if isinstance(part, Pictured)] == [ONE, OTHER]
    text = "".join(part if isinstance(part, str) else "#" for part in found)
    if kind == "everywhere":
        assert "[tool]Here: <picture>#</picture>[user]Well?" in text
    else:
        assert f"[tool]Here: {BELOW}[user]<picture>#</picture>Well?" in text


def test_a_text_that_says_what_the_template_says_is_no_picture(templates):
    found, _ = pieces(templates["everywhere"], (user(Text(f"{TOKEN} and <picture>"), Image(FileId("x"))),), ONE)
    assert [part for part in found if isinstance(part, Pictured)] == [ONE]
    assert TOKEN in found[0]


def test_a_template_that_shows_no_pictures_is_told_of(tokenizer_folder):
    template = Template.load(tokenizer_folder, "chatml", tokens=[TOKEN])
    with pytest.raises(BadInput, match="chat template"):
        pieces(template, (user(Image(FileId("x"))),), ONE)


def test_the_assistant_shows_no_pictures(templates):
    with pytest.raises(BadInput, match="of the user"):
        pieces(templates["everywhere"], (user(Text("?")), Turn("assistant", (Image(FileId("x")),)), user(Text("?"))), ONE)
