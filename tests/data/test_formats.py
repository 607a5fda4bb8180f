"""Rows in every format, from every kind of file; and what is said of a row that cannot be used."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from ropewalk.chat.template import Template
from ropewalk.config.run import Run, parse_run
from ropewalk.data.dataset import open_data, preview
from ropewalk.data.formats import WITH_INPUT, WITHOUT_INPUT
from ropewalk.errors import ConfigError, DataError
from ropewalk.files.local import open_local

CHAT = {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "I am well"}]}
SAID = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def template(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Template:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    return Template.load(tokenizer_folder, "chatml")


def a_run(path: Path | str, source: dict | None = None, **keys: object) -> Run:
    entry = {"path": str(path), "type": "chat_template", **(source or {})}
    return parse_run(json.dumps({"base_model": "x", "learning_rate": 0.1, "datasets": [entry], **keys}))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def shown(template: Template, path: Path, source: dict, row: dict, **keys: object) -> tuple[str, str]:
    """The whole text of a row and the trained part of it."""
    lines(path / "row.jsonl", row)
    run = a_run(path / "row.jsonl", source, **keys)
    spans = preview(run, template)[0]
    data = open_data(run, template, quiet=True)  # the same through the cache
    ids, labels = data.train[0]
    whole, trained = "".join(text for text, _ in spans), "".join(text for text, on in spans if on)
    assert template.decode(ids, skip_special_tokens=False) == whole
    assert template.decode(labels[labels != -100], skip_special_tokens=False) == trained
    assert labels[0] == -100
    return whole, trained


def test_chat_rows_under_openai_and_sharegpt_keys_are_the_same(template: Template, tmp_path: Path) -> None:
    want = (SAID + "I am well<|im_end|>\n", "I am well<|im_end|>")
    sharegpt = {"conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "I am well"}]}
    mapped = {"talk": [{"who": "client", "said": "Hello there"}, {"who": "bot", "said": "I am well"}]}
    mapping = {
        "field_messages": "talk",
        "message_property_mappings": {"role": "who", "content": "said"},
        "roles": {"user": ["client"], "assistant": ["bot"]},
    }
    assert shown(template, tmp_path, {}, CHAT) == want
    assert shown(template, tmp_path, {}, sharegpt) == want
    assert shown(template, tmp_path, mapping, mapped) == want
    assert shown(template, tmp_path, {}, {"messages": json.dumps(CHAT["messages"])}) == want
    assert shown(template, tmp_path, {"type": "sharegpt"}, sharegpt) == want


def test_keys_of_a_chat_source_have_their_effect(template: Template, tmp_path: Path) -> None:
    talk = {"messages": [{"role": "system", "content": "Be kind"}, *CHAT["messages"]]}
    assert shown(template, tmp_path, {"drop_system_message": True}, talk)[0].startswith("<|im_start|>user")
    assert shown(template, tmp_path, {}, CHAT, default_system_message="Be kind")[0].startswith("<|im_start|>system\nBe kind")
    assert shown(template, tmp_path, {}, {**CHAT, "system": "Be kind"})[0].startswith("<|im_start|>system\nBe kind")
    assert shown(template, tmp_path, {"roles_to_train": ["user"]}, CHAT)[1] == "Hello there<|im_end|>"
    assert shown(template, tmp_path, {"train_on_eos": "none"}, CHAT)[1] == "I am well"
    assert shown(template, tmp_path, {}, CHAT, train_on_inputs=True)[1] == "Hello there<|im_end|>I am well<|im_end|>"
    assert shown(template, tmp_path, {"chat_template": "gemma"}, CHAT)[1] == "I am well<end_of_turn>"
    flagged = {"messages": [{**CHAT["messages"][0], "train": True}, {**CHAT["messages"][1], "train": False}]}
    assert shown(template, tmp_path, {"message_field_training": "train"}, flagged)[1] == "Hello there<|im_end|>"
    parts = [{"type": "text", "text": "I am", "train": False}, {"type": "text", "text": " well"}]
    assert shown(template, tmp_path, {}, {"messages": [CHAT["messages"][0], {"role": "assistant", "content": parts}]})[1] == (
        " well<|im_end|>"
    )


def test_thinking_and_calls_reach_the_template(template: Template, tmp_path: Path) -> None:
    thought = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "<think>so</think>I am well"}]}
    source = {"chat_template": "qwen3", "split_thinking": True}
    assert shown(template, tmp_path, source, thought)[1] == "<think>\nso\n</think>\n\nI am well<|im_end|>"
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    tools = json.dumps([{"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}])
    row = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools}
    whole, trained = shown(template, tmp_path, {"chat_template": "qwen_25"}, row)
    assert trained == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert '"parameters": {"type": "object"}' in whole


def test_instruction_formats(template: Template, tmp_path: Path) -> None:
    row = {"instruction": "What is {it}?", "input": "", "output": "Paris"}
    whole, trained = shown(template, tmp_path, {"type": "alpaca"}, row)
    assert (whole, trained) == (
        f"{WITHOUT_INPUT}\n\n### Instruction:\nWhat is {{it}}?\n\n### Response:\nParis</s>",
        "Paris</s>",
    )
    whole, _ = shown(template, tmp_path, {"type": "alpaca"}, {**row, "input": "France"})
    assert whole == f"{WITH_INPUT}\n\n### Instruction:\nWhat is {{it}}?\n\n### Input:\nFrance\n\n### Response:\nParis</s>"
    question = {"question": "What?", "answer": "This"}
    whole, _ = shown(template, tmp_path, {"type": "alpaca_chat.load_qa"}, question)
    assert whole.endswith("USER: What?\nASSISTANT:This</s>")
    whole, _ = shown(template, tmp_path, {"type": "alpaca_chat.load_no_prompt"}, row)
    assert whole == "USER: What is {it}?\nASSISTANT:Paris</s>"
    orca = {"system_prompt": "Be kind", "question": "What?", "response": "This"}
    whole, _ = shown(template, tmp_path, {"type": "alpaca_w_system.load_open_orca_chatml"}, orca)
    assert whole == "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThis</s>"
    assert (
        shown(template, tmp_path, {"type": "metharme"}, {"prompt": "Hello", "generation": " you"})[0] == "Hello you</s></s></s>"
    )
    assert "<|user|>\nWhat is {it}?<|end|>" in shown(template, tmp_path, {"type": "alpaca:phi"}, row)[0]


def test_a_mapping_of_ones_own(template: Template, tmp_path: Path) -> None:
    form = {
        "field_instruction": "q",
        "field_output": "a",
        "field_input": "more",
        "format": "[INST] {instruction} {{x}} {input} [/INST]",
        "no_input_format": "[INST] {instruction} [/INST]",
        "system_prompt": "Be kind. ",
    }
    row = {"q": "What {input}?", "a": " This"}
    assert shown(template, tmp_path, {"type": form}, row) == ("Be kind. [INST] What {input}? [/INST] This</s>", " This</s>")
    assert shown(template, tmp_path, {"type": form}, {**row, "more": "now"})[0].startswith(
        "Be kind. [INST] What {input}? {x} now [/"
    )


def test_text_segments_and_tokens(template: Template, tmp_path: Path) -> None:
    # The first token has nothing before it to be predicted from.
    whole, trained = shown(template, tmp_path, {"type": "completion"}, {"text": "Hello there"})
    first = template.decode(template.encode("Hello there")[:1])
    assert (whole, first + trained) == ("Hello there</s>", whole)
    segments = [{"label": False, "text": "<s>Hello "}, {"label": True, "text": "there</s>"}]
    assert shown(template, tmp_path, {"type": "input_output"}, {"segments": segments}) == ("<s>Hello there</s>", "there</s>")
    ids = template.encode("Hello there")
    row = {"input_ids": ids, "labels": [-100, *ids[1:]], "attention_mask": [1] * len(ids)}
    whole, trained = shown(template, tmp_path, {"type": None}, row)
    assert whole == "Hello there"
    assert trained == template.decode(ids[1:])


def test_a_long_text_becomes_several_rows(template: Template, tmp_path: Path) -> None:
    text = "Hello there, how are you today? " * 20
    lines(tmp_path / "t.jsonl", {"body": text})
    data = open_data(
        a_run(tmp_path / "t.jsonl", {"type": "completion", "field": "body"}, sequence_len=32), template, quiet=True
    )
    joined = [i for number in range(len(data.train)) for i in data.train[number][0]]
    assert set(data.train.lengths[:-1]) == {32}
    assert joined == [*template.encode(text), template.eos_id]


def test_every_kind_of_file_gives_the_same_rows(template: Template, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": f"What is {n}?", "input": "", "output": f"It is {n}"} for n in range(5)]
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text("\n".join(json.dumps(row, indent=2) for row in rows))
    with (tmp_path / "e.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder / "1.jsonl", *rows[:2])
    lines(folder / "2.jsonl", *rows[2:])
    (tmp_path / "g.data").write_bytes((tmp_path / "a.jsonl").read_bytes())
    for name, begin in (("h.arrow", pyarrow.ipc.new_file), ("i.arrow", pyarrow.ipc.new_stream)):
        table = pyarrow.Table.from_pylist(rows)
        with begin(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    names = ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.csv", "f.parquet", "h.arrow", "i.arrow")
    sources = [{"path": str(tmp_path / name)} for name in names]
    sources += [{"path": str(folder)}, {"path": "json", "data_files": str(tmp_path / "a.jsonl")}]
    sources += [{"path": open_local().put(tmp_path / name).id} for name in names]
    sources += [{"path": str(tmp_path / "g.data"), "ds_type": "jsonl"}]
    for source in sources:
        data = open_data(a_run(source["path"], {**source, "type": "alpaca"}), template, quiet=True)
        texts = [template.decode(data.train[i][0]) for i in range(len(data.train))]
        assert [text.split("\n")[-1] for text in texts] == [f"It is {n}" for n in range(5)], source


def test_a_data_set_of_the_hub_is_read_through_datasets(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None = None, **options: object) -> object:
        asked.append((path, name, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"instruction": "What?", "input": "", "output": "This"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"type": "alpaca", "name": "main", "split": "train[:2]", "revision": "v1"}
    data = open_data(a_run("someone/something", source), template, quiet=True)
    assert asked[0] == ("someone/something", "main", "train", "v1")
    assert len(data.train) == 2


def test_the_datasets_library_reads_and_streams_what_files_give(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from ropewalk.data import sources
    from ropewalk.data.rows import chunks, streamed_chunks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache" / "downloads"))
    datasets.disable_progress_bars()
    path = lines(tmp_path / "a.jsonl", *[{"instruction": f"{n}", "output": "x"} for n in range(4)])
    found = sources.HubSet("json", None, "train", None, (str(path),))
    read = [chunk.read(*row) for chunk in chunks(found) for row in chunk]
    assert [(row.line, row.values["instruction"]) for row in read] == [(1, "0"), (2, "1"), (3, "2"), (4, "3")]
    assert [chunk.read(*row) for chunk in streamed_chunks(found) for row in chunk] == read
    assert sources.content_digest(found)

    def refuses(*args: object, **options: object) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuses)
    with pytest.raises(
        DataError, match=r"'no/such' is neither a file or folder here nor to be had from the hub: no route to the hub$"
    ):
        open_data(a_run("no/such"), template, quiet=True)


def test_a_folder_with_splits_gives_the_one_asked_for(template: Template, tmp_path: Path) -> None:
    for name, count in (("train-1.jsonl", 3), ("train-2.jsonl", 2), ("test.jsonl", 1)):
        lines(tmp_path / name, *[CHAT] * count)
    assert len(open_data(a_run(tmp_path), template, quiet=True).train) == 5
    assert len(open_data(a_run(tmp_path, {"split": "test"}), template, quiet=True).train) == 1
    assert len(open_data(a_run(tmp_path, {"split": "train[20%:60%]"}), template, quiet=True).train) == 2


BAD = [
    ('{"messages": [', "malformed JSON: .* at column 15"),
    (
        {"message": []},
        "'messages': is missing; this row has 'message'; if 'message' holds the messages, write field_messages: message",
    ),
    ({"messages": []}, "key 'messages': has no message"),
    (
        {"messages": [{"role": "user", "content": "Hi"}]},
        "has no assistant turn, so there is nothing to train on; its roles are user",
    ),
    ({"messages": [{"role": "asistant", "content": "Hi"}]}, "the role 'asistant'; did you mean 'assistant'?"),
    ({"messages": [{"role": "user"}]}, "message 1 has no 'content' but 'role'"),
    ({"messages": [{"speaker": "user", "content": "x"}]}, "message 1 has no 'role' but 'speaker', 'content'"),
    ({"messages": ["Hi"]}, "message 1: expected an object"),
    ({"messages": 3}, "expected a list of messages, found int"),
    ("[1]", "a row must be an object with named values, and this is a list"),
    ({"messages": [{"role": "assistant", "content": "", "weight": 1}]}, "nothing of this row is trained"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named_with_file_line_key_and_reason(
    row: object, message: str, template: Template, tmp_path: Path
) -> None:
    path = lines(tmp_path / "bad.jsonl", *[CHAT] * 16, row, *[CHAT] * 3)
    run = a_run(path, {"train_on_eos": "none"})
    with pytest.raises(DataError, match=message) as caught:
        open_data(run, template, quiet=True)
    assert str(caught.value).startswith(f"{path}:17: ")
    assert caught.value.line == 17
    with pytest.raises(DataError, match=f"{path}:17: "):
        preview(run, template, n=20)
    assert len(preview(run.model_copy(update={"on_bad_row": "skip"}), template, n=20)) == 19
    data = open_data(run.model_copy(update={"on_bad_row": "skip"}), template, quiet=True)
    assert len(data.train) == 19
    assert [(bad.path, bad.line) for bad in data.bad] == [(str(path), 17)]
    assert any("1 bad" in notice for notice in data.notices)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("alpaca", {"instruction": "a", "outputs": "b"}, "key 'output': is missing; .*did you mean 'outputs'"),
        ("alpaca", {"instruction": "a", "output": ""}, "key 'output': is empty"),
        ("alpaca", {"instruction": "a", "output": 3}, "expected a text, found int"),
        ("completion", {"txt": "a"}, "key 'text': is missing"),
        ("input_output", {"segments": [{"label": False, "text": "a"}]}, "no segment has label true"),
        (None, {"text": "a"}, "key 'input_ids': is missing; .*for text add a type"),
        (None, {"input_ids": [1, 2], "labels": [-100]}, "has 1 entries, input_ids 2"),
        (None, {"input_ids": [1, 2], "labels": [-100, 3]}, "entry 1 is 3, expected -100 or the token 2"),
        (None, {"input_ids": [1, 2], "labels": [-100, -100]}, "every entry is -100"),
    ],
)
def test_a_row_that_does_not_fit_its_format_is_named(
    kind: str | None, row: dict, message: str, template: Template, tmp_path: Path
) -> None:
    path = lines(tmp_path / "bad.jsonl", row)
    with pytest.raises(DataError, match=message):
        open_data(a_run(path, {"type": kind}), template, quiet=True)


def test_places_in_other_kinds_of_files(template: Template, tmp_path: Path) -> None:
    good = {"instruction": "a", "input": "", "output": "b"}
    (tmp_path / "a.json").write_text("[\n" + ",\n".join([json.dumps(good)] * 3) + ",\n{'x'}\n]")
    with pytest.raises(DataError, match=r"a\.json:5: malformed JSON: .* at column 2"):
        open_data(a_run(tmp_path / "a.json", {"type": "alpaca"}), template, quiet=True)
    (tmp_path / "b.csv").write_text("instruction,output\na,b\nc,d,e\n")
    with pytest.raises(DataError, match=r"b\.csv:3: this row has 3 columns, its header 2"):
        open_data(a_run(tmp_path / "b.csv", {"type": "alpaca"}), template, quiet=True)
    (tmp_path / "c.jsonl").write_bytes(json.dumps(good).encode() + b'\n{"instruction": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2: malformed text: byte 18 is not UTF-8"):
        open_data(a_run(tmp_path / "c.jsonl", {"type": "alpaca"}), template, quiet=True)
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(DataError, match=r"d\.jsonl: the file is empty"):
        open_data(a_run(tmp_path / "d.jsonl", {"type": "alpaca"}), template, quiet=True)


def test_what_cannot_be_found_says_what_is_near(template: Template, tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", CHAT)
    with pytest.raises(DataError, match=r"no data file or folder .*did you mean .*train\.jsonl"):
        open_data(a_run(tmp_path / "trian.jsonl"), template, quiet=True)
    (tmp_path / "x.data").write_text("{}")
    with pytest.raises(ConfigError, match="add 'ds_type'"):
        open_data(a_run(tmp_path / "x.data"), template, quiet=True)
    with pytest.raises(ConfigError, match=r"type: 'alpacka' is not supported; did you mean 'alpaca'"):
        open_data(a_run(tmp_path / "train.jsonl", {"type": "alpacka"}), template, quiet=True)
