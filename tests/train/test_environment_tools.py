"""Tools of an environment: what the model is told of them, what calls give, and that ids stay as they were sampled."""

import pytest

from ropewalk.chat.template import Template
from ropewalk.errors import BadInput, ModelError
from ropewalk.train.environment import Generated, Limits, run_episode
from ropewalk.train.environment_pool import EnvironmentPool
from ropewalk.train.environment_tools import Toolbox, ToolCall
from ropewalk.train.environment_worker import EnvironmentSpec
from ropewalk.train.talk import TemplateTalk

MODULE = '''
import asyncio

class Shop:
    def reset(self, row):
        self.prices, self.asked = row["prices"], 0
        return [{"role": "user", "content": "What costs most?"}]

    async def price(self, item: str, pieces: int = 1) -> float:
        """What an item costs."""
        await asyncio.sleep(0)
        self.asked += 1
        return self.prices[item] * pieces

    def list_items(self) -> list[str]:
        """All items."""
        return sorted(self.prices)

    tools = [price, "list_items"]

    def step(self, reply):
        right = max(self.prices, key=self.prices.get)
        return [], (1.0 if right in reply else 0.0) - 0.1 * self.asked, True
'''
PRICE = '<tool_call>\n{"name": "price", "arguments": {"item": "%s"}}\n</tool_call>'


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A pool with the processes of an environment that has tools."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_shop.py").write_text(MODULE)
    with EnvironmentPool(EnvironmentSpec("own_shop.Shop", (str(folder),), 5.0)) as pool:
        yield pool


def talk_of(folder, name, tools):
    return TemplateTalk(Template.load(folder, name), tools)


def end_of(talk):
    """The id that the template writes behind a reply."""
    return talk.follow([{"role": "user", "content": "?"}], None)[0]


def says(talk, *replies):
    """A model that says these, in turn, and the ids that it went on from."""
    coming, asked, end = iter(replies), [], end_of(talk)

    def generate(ids):
        asked.append(ids)
        said = [*talk.template.encode(next(coming)), end]
        return Generated(said, [-0.5] * len(said), [1] * len(said), True)

    return generate, asked


@pytest.mark.parametrize("family", ["qwen3", "chatml", "llama3", "gemma3", "mistral_v3_tekken"])
def test_what_calls_give_stands_behind_the_ids_that_were_sampled(shop, tokenizer_folder, family):
    talk = talk_of(tokenizer_folder, family, shop.tools)
    call = PRICE if not talk.dialect.opener else PRICE.replace("<tool_call>", talk.dialect.opener.strip())
    both = f"{call % 'rope'}\n{call % 'sail'}"
    generate, asked = says(talk, both, call % "anchor", "The sail.")
    found = run_episode(shop.begin(), {"prices": {"rope": 2, "sail": 30}}, talk, generate)
    assert (found.end, found.replies[-1], found.reward) == ("done", "The sail.", pytest.approx(0.7))
    assert [list(ids) == found.ids[: len(ids)] for ids in asked] == [True] * 3
    text = [talk.template.decode(ids, skip_special_tokens=False) for ids in (found.ids, *asked)]
    assert text[1].count("What an item costs.") == 1
    assert end_of(talk) in talk.stop_ids
    given = text[2][len(text[1]) + len(both) :]
    assert given.index("2") < given.index("30")
    assert "error: KeyError: 'anchor'" in text[3][len(text[2]) :]
    trained = [id for id, own in zip(found.ids, found.trained) if own]
    end = talk.template.decode([end_of(talk)], skip_special_tokens=False)
    assert talk.template.decode(trained, skip_special_tokens=False) == f"{both}{end}{call % 'anchor'}{end}The sail.{end}"
    assert end * 2 not in text[0]


def test_qwens_template_writes_the_same_of_the_whole_conversation(shop, tokenizer_folder):
    talk = talk_of(tokenizer_folder, "qwen3", shop.tools)
    generate, asked = says(talk, PRICE % "rope", "Rope.")
    run_episode(shop.begin(), {"prices": {"rope": 2}}, talk, generate)
    function = {"name": "price", "arguments": {"item": "rope"}}
    messages = [
        {"role": "user", "content": "What costs most?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "price", "content": "2"},
    ]
    told = [
        {"type": "function", "function": {"name": one.name, "description": one.description, "parameters": one.schema}}
        for one in shop.tools
    ]
    whole = talk.template.render(messages, tools=told, add_generation_prompt=True)
    assert talk.template.decode(asked[1], skip_special_tokens=False) == whole.text


def test_a_reply_that_was_cut_off_behind_its_call_is_given_its_end(shop, tokenizer_folder):
    talk = talk_of(tokenizer_folder, "chatml", shop.tools)
    (call,) = talk.calls(talk.template.encode(PRICE % "rope"))
    assert call == ToolCall("price", {"item": "rope"})
    behind = talk.template.decode(talk.answer([call], ["2"], last=9), skip_special_tokens=False)
    assert behind.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n2\n")
    assert talk.calls(talk.template.encode("<tool_call>\n{broken")) == []
    generate, _ = says(talk, *[PRICE % "rope"] * 3)
    found = run_episode(shop.begin(), {"prices": {"rope": 2}}, talk, generate, Limits(turns=2))
    assert (found.end, found.reward, len(found.replies)) == ("turns", 0.0, 2)


def test_the_model_is_told_names_types_and_docstrings_and_what_was_wrong_with_a_call(shop):
    price, items = shop.tools
    assert (price.name, price.description) == ("price", "What an item costs.")
    assert price.schema == {
        "type": "object",
        "properties": {"item": {"type": "string"}, "pieces": {"type": "integer", "default": 1}},
        "required": ["item"],
    }
    assert (items.name, items.schema) == ("list_items", {"type": "object", "properties": {}})
    env = shop.begin()
    env.reset({"prices": {"rope": 2, "öl": 3}})
    calls = [
        ToolCall("price", {"item": "rope", "pieces": "2"}),
        ToolCall("list_items", {}),
        ToolCall("price", {"pieces": "two", "colour": "red"}),
        ToolCall("cost", {}),
    ]
    assert env.call(calls).result(10) == [
        "4",
        '["rope", "öl"]',
        "error: arguments of 'price': item: Field required; "
        "pieces: Input should be a valid integer, unable to parse string as an integer; colour: Extra inputs are not permitted",
        "error: there is no tool 'cost'; there are price, list_items",
    ]
    assert shop.failures == 0


def test_methods_that_cannot_be_tools_are_told_at_the_start():
    class Odd:
        def silent(self, a: int): ...

        def untyped(self, a):
            """Something."""

        def many(self, *all: int):
            """Something."""

    for tools, said in [
        (["silent"], "the tool 'silent' has no docstring"),
        (["untyped"], "its parameter 'a' has no type"),
        (["many"], "takes '[*]all: int'; expected parameters that have a name each"),
        (["other"], "the tool 'other' is no method of the class"),
        ("silent", "tools is 'silent'; expected a list"),
    ]:
        Odd.tools = tools
        with pytest.raises(BadInput, match=said):
            Toolbox("own.Odd", Odd)


def test_a_template_whose_calls_are_not_known_is_refused(shop, tokenizer_folder):
    plain = Template.load(tokenizer_folder, "chatml")
    strange = Template(plain.tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}", plain.special)
    with pytest.raises(ModelError, match="writes calls of tools in no way that is known here"):
        TemplateTalk(strange, shop.tools)
    assert TemplateTalk(strange).calls([1, 2]) == []
