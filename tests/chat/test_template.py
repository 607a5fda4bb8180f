"""The chat template: what is rendered equals transformers' own, and what is trained is exactly what the assistants wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ropewalk.chat.families import SOURCES
from ropewalk.chat.masking import Rules
from ropewalk.chat.template import Template
from ropewalk.errors import ConfigError, DataError, ModelError

TALK = [
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "It is Paris."},
    {"role": "user", "content": "And of Spain?"},
    {"role": "assistant", "content": "Madrid, 🌍 naturally.\nAnything else?"},
]
# What ends an assistant's turn, by family; the tokenizer of these tests has most of them as special tokens.
ENDS = {
    **dict.fromkeys(["chatml", "qwen2_vl", "falcon_h1", "qwen_25", "qwen3", "qwen3_5", "phi_4"], "<|im_end|>"),
    **dict.fromkeys(["llama3", "llama3_2_vision"], "<|eot_id|>"),
    **dict.fromkeys(["gemma", "gemma3", "gemma3n"], "<end_of_turn>"),
    **dict.fromkeys(["gemma4", "gemma4_unified"], "<turn|>"),
    **dict.fromkeys(["phi_3", "phi_35"], "<|end|>"),
    **dict.fromkeys(["cohere", "aya"], "<|END_OF_TURN_TOKEN|>"),
    "llama4": "<|eot|>",
    "exaone": "[|endofturn|]",
    "jamba": "<|eom|>",
}


def trained(template: Template, messages: list[dict], rules: Rules | None = None, **more: object) -> str:
    rendered = template.render(messages, rules=rules or Rules(), **more)
    assert len(rendered.ids) == len(rendered.train_mask)
    return template.decode([i for i, on in zip(rendered.ids, rendered.train_mask) if on], skip_special_tokens=False)


@pytest.mark.parametrize("family", sorted(SOURCES))
def test_decoding_the_trained_tokens_gives_the_assistants_words_and_their_ends(family: str, tokenizer_folder: Path) -> None:
    template = Template.load(tokenizer_folder, family)
    end = ENDS.get(family, "</s>")
    # Where the prompt ends at a colon or in a blank, the blank is part of the first word.
    blank = " " if family in ("mistral_v1", "mistral_v2v3", "llava", "deepseek_v2") else ""
    empty = {"qwen3": "<think>\n\n</think>\n\n", "qwen3_5": "\n</think>\n\n"}.get(family, "")  # so is the thought it has not
    words = [blank + TALK[1]["content"], empty + blank + TALK[3]["content"]]
    got = trained(template, TALK)
    assert got.replace(" It", "It") == end.join([*words, ""]) if family == "jamba" else got == end.join([*words, ""])


@pytest.mark.parametrize("family", sorted(SOURCES))
def test_rendering_equals_transformers(family: str, tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    theirs.chat_template = SOURCES[family]
    ours = Template.load(tokenizer_folder, family)
    for prompt in (False, True):
        part = TALK[:3] if prompt else TALK
        want = theirs.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
        rendered = ours.render(part, add_generation_prompt=prompt)
        assert rendered.text == want
        assert rendered.ids == theirs(want, add_special_tokens=False)["input_ids"]
        assert not any(rendered.train_mask)


def test_end_tokens_follow_their_rules(tokenizer_folder: Path) -> None:
    template = Template.load(tokenizer_folder, "chatml")
    a, b = TALK[1]["content"], TALK[3]["content"]
    assert trained(template, TALK, Rules(train_on_eos="none")) == a + b
    assert trained(template, TALK, Rules(train_on_eos="last")) == a + b + "<|im_end|>"
    every = trained(template, TALK, Rules(train_on_eos="all"))
    assert every == f"<|im_end|>{a}<|im_end|><|im_end|>{b}<|im_end|>"
    assert trained(template, TALK, Rules(train_on_eos="none", train_on_eot="turn")) == f"{a}<|im_end|>{b}<|im_end|>"


def test_an_end_of_sequence_after_the_end_of_turn_is_trained_too(tokenizer_folder: Path) -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}"
    template = Template.load(tokenizer_folder, None, chat_template_jinja=source)
    assert trained(template, TALK[:2]) == "It is Paris.<|end|></s>"
    assert trained(template, TALK[:2], Rules(train_on_eos="none")) == "It is Paris."


def test_roles_flags_and_details_say_what_is_trained(tokenizer_folder: Path) -> None:
    template = Template.load(tokenizer_folder, "chatml")
    assert trained(template, TALK, Rules(roles_to_train=("user",))) == "What is the capital?<|im_end|>And of Spain?<|im_end|>"
    flagged = [TALK[0], {**TALK[1], "training": False}, {**TALK[2], "training": True}, TALK[3]]
    assert trained(template, flagged) == f"And of Spain?<|im_end|>{TALK[3]['content']}<|im_end|>"
    detail = [{"begin_offset": 0, "end_offset": 4, "train": False}, {"begin_offset": 5, "end_offset": 11, "train": True}]
    assert trained(template, [TALK[0], {**TALK[1], "training_detail": detail}]) == " Paris.<|im_end|>"
    assert trained(template, TALK, Rules((), last_only=True)) == TALK[3]["content"] + "<|im_end|>"


def test_thinking_that_the_template_drops_is_not_trained_and_what_it_keeps_is(tokenizer_folder: Path) -> None:
    template = Template.load(tokenizer_folder, "qwen3")
    old = [TALK[0], {"role": "assistant", "content": "<think>\nFrance, so\n</think>\n\nIt is Paris."}, TALK[2]]
    new = {"role": "assistant", "content": "Madrid.", "reasoning_content": "Spain, so"}
    want = "It is Paris.<|im_end|><think>\nSpain, so\n</think>\n\nMadrid.<|im_end|>"
    assert trained(template, [*old, new]) == want


def test_a_call_is_trained_with_its_markup(tokenizer_folder: Path) -> None:
    template = Template.load(tokenizer_folder, "qwen_25")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
    talk = [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
    want = (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call><|im_end|>It rains.<|im_end|>'
    )
    assert trained(template, talk, tools=tools) == want
    talk[1]["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": {"days": 2}}}]
    assert trained(template, talk, tools=tools) == want.replace('"city": "Paris", ', "")


def test_generation_blocks_narrow_the_mask(tokenizer_folder: Path) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}note:\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    template = Template.load(tokenizer_folder, None, chat_template_jinja=source)
    assert trained(template, TALK[:2]) == "It is Paris.<|im_end|>"


@pytest.mark.parametrize("family", ["chatml", "gemma", "mistral_v7_tekken", "llama3", "qwen3"])
@pytest.mark.parametrize("content", ["  Yes. \n", "\n\nYes.", "<b>Yes</b>", "Yes", "a <|im_start|> b", "<answer>4</answer>\n"])
def test_blanks_and_tags_around_the_words_do_not_move_the_mask(family: str, content: str, tokenizer_folder: Path) -> None:
    template = Template.load(tokenizer_folder, family)
    got = trained(template, [TALK[0], {"role": "assistant", "content": content}, TALK[2], TALK[3]])
    words = content.strip() if family in ("gemma", "llama3") else content
    # Newlines that run into the template's own form one token with it, which is not the model's to write.
    assert got.split(ENDS.get(family, "</s>"))[0].lstrip("\n") == words.lstrip("\n")


def test_own_template_is_read_from_file_key_or_list(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}{% endfor %}"
    for kind in ("file", "key", "list"):
        folder = tmp_path / kind
        shutil.copytree(tokenizer_folder, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if kind == "file":
            (folder / "chat_template.jinja").write_text(source)
        else:
            config["chat_template"] = source if kind == "key" else [{"name": "default", "template": source}]
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        for name in (None, "tokenizer_default", "tokenizer_default_fallback_chatml"):
            assert trained(Template.load(folder, name), TALK[:2]) == "It is Paris.</s>"


def test_a_template_that_cannot_be_masked_is_an_error_and_never_a_wrong_mask(tokenizer_folder: Path) -> None:
    twice = "{% for m in messages %}{{ m.content }}|{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(DataError, match="writes message 2 twice"):
        trained(Template.load(tokenizer_folder, chat_template_jinja=twice), TALK[:2])
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(DataError, match="leaves this message out"):
        trained(Template.load(tokenizer_folder, chat_template_jinja=drops), TALK[:2])
    upper = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
    detail = [{"begin_offset": 0, "end_offset": 4, "train": True}]
    with pytest.raises(DataError, match="rewrites 'content'"):
        trained(Template.load(tokenizer_folder, chat_template_jinja=upper), [TALK[0], {**TALK[1], "training_detail": detail}])
    assert trained(Template.load(tokenizer_folder, chat_template_jinja=upper), TALK[:2]) == "IT IS PARIS.<|im_end|>"
    with pytest.raises(DataError, match="refuses this conversation: roles must"):
        trained(Template.load(tokenizer_folder, chat_template_jinja="{{ raise_exception('roles must alternate') }}"), TALK)


def test_a_call_that_the_template_does_not_show_is_an_error(tokenizer_folder: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "rain"}]
    with pytest.raises(DataError, match="message 2: the chat template leaves its calls out"):
        trained(Template.load(tokenizer_folder, "chatml"), talk)
    talk[1]["content"] = "Let me see."
    with pytest.raises(DataError, match="does not show its call of 'weather'"):
        trained(Template.load(tokenizer_folder, "chatml"), talk)


def test_templates_that_want_parts_or_written_arguments_get_them(tokenizer_folder: Path) -> None:
    parts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = Template.load(tokenizer_folder, chat_template_jinja=parts)
    assert trained(template, TALK[:2]) == "It is Paris.<|im_end|>"
    written = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'f:' + c.function.name + c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    template = Template.load(tokenizer_folder, chat_template_jinja=written)
    assert trained(template, talk) == 'f:weather{"city": "Paris"}<|im_end|>'


def test_a_prompt_that_opens_a_thought_is_left_out_only_where_the_turn_has_it(tokenizer_folder: Path) -> None:
    # The generation prompt shuts the thought at once; a turn that thinks does not begin with that prompt.
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}"
        "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    template = Template.load(tokenizer_folder, chat_template_jinja=source)
    assert trained(template, TALK[:2]) == "It is Paris.<|im_end|>"
    thought = [TALK[0], {**TALK[1], "reasoning_content": "France, so"}]
    assert trained(template, thought) == "France, so\n</think>\n\nIt is Paris.<|im_end|>"


def test_wrong_names_say_what_to_write(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        Template.load(tokenizer_folder, "chatlm")
    with pytest.raises(ConfigError, match="has no chat template"):
        Template.load(tokenizer_folder, "tokenizer_default")
    with pytest.raises(ModelError, match="name one with 'chat_template'"):
        Template.load(tokenizer_folder).render(TALK)
    with pytest.raises(ConfigError, match="not a single token"):
        Template.load(tokenizer_folder, "chatml", eot_tokens=["<|nope|>"])
    with pytest.raises(ModelError, match="in its line 2"):
        Template.load(tokenizer_folder, chat_template_jinja="ok\n{% for %}")
    with pytest.raises(ModelError, match="no tokenizer"):
        Template.load(tmp_path)


@pytest.mark.parametrize("kind", ["prepended", "replaced"])
@pytest.mark.parametrize("family", ["chatml", "gemma", "llama3", "mistral_v7_tekken"])
def test_sentencepiece_kinds_of_tokenizers_are_masked_alike(kind: str, family: str, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if kind == "prepended" else blanks
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    corpus = [message["content"] for message in TALK] * 3
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False))
    ends = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ends])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    end = ENDS.get(family, "</s>")
    got = trained(Template.load(tmp_path, family), TALK)
    # A tokenizer that puts a blank before each stretch of text gives it back when decoding.
    pieces = [piece.removeprefix(" ") if kind == "prepended" else piece for piece in got.split(end)]
    assert pieces == [TALK[1]["content"], TALK[3]["content"], ""]


def test_a_reply_stops_at_what_ends_a_conversation_and_not_at_what_ends_a_thought(tokenizer_folder: Path) -> None:
    assert Template.load(tokenizer_folder, "chatml").stop_ids == tuple(
        Template.load(tokenizer_folder).tokenizer.token_to_id(token) for token in ("</s>", "<|im_end|>")
    )
    # Inside a conversation turns end with <|end|>, and so do thoughts; the last turn ends with <|endoftext|>.
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ '<|endoftext|>' if loop.last and not add_generation_prompt "
        "and m.role == 'assistant' else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template = Template.load(tokenizer_folder, chat_template_jinja=source)
    assert [template.decode([i], skip_special_tokens=False) for i in template.stop_ids] == ["</s>", "<|endoftext|>"]
    assert trained(template, TALK) == f"{TALK[1]['content']}<|end|>{TALK[3]['content']}<|endoftext|>"


def test_what_is_saved_loads_the_same(tokenizer_folder: Path, tmp_path: Path) -> None:
    template = Template.load(tokenizer_folder, "gemma")
    template.save(tmp_path)
    again = Template.load(tmp_path)
    assert again.render(TALK, rules=Rules()) == template.render(TALK, rules=Rules())
    assert (again.eos_id, again.pad_id) == (template.eos_id, template.pad_id)
    assert again.decode(again.encode("Hello 🌍 there")) == "Hello 🌍 there"
