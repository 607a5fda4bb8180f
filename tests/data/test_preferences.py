"""Rows of preferences, in every form they come in, and the batches made of them."""

import json
from collections import Counter

import numpy as np
import pytest

from ropewalk.config.run import parse_run
from ropewalk.data.formats import Conversation, Pieces
from ropewalk.data.packing import batches
from ropewalk.data.preferences import Judged, Pair, example_reader, template_named
from ropewalk.errors import ConfigError, DataError


def a_run(rl="dpo", kind="chat_template", **keys):
    source = {"path": "x", **({"type": kind} if kind else {}), **keys.pop("source", {})}
    values = {"base_model": "x", "learning_rate": 0.1, "adapter": "lora", "rl": rl, "datasets": [source], **keys}
    return parse_run(json.dumps(values))


def read(row, **keys):
    run = a_run(**keys)
    return example_reader(run.sources[0], run)(row)


def words(example):
    return [(m["role"], m["content"]) for m in example.messages]


USER, GOOD, BAD = ("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")


def said(*turns, role="role", content="content"):
    return [{role: who, content: text} for who, text in turns]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("chat_template", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}),
        ("chat_template.default", {"messages": said(USER), "chosen": said(GOOD)[0], "rejected": said(BAD)[0]}),
        ("chat_template", {"prompt": said(USER), "chosen": said(GOOD), "rejected": said(BAD)}),
        ("chat_template.argilla_chat", {"chosen": said(USER, GOOD), "rejected": said(USER, BAD)}),
        ("chatml.intel", {"question": "2 + 2?", "chosen": "4", "rejected": "5"}),
        ("chatml.icr", {"input": "2 + 2?", "chosen": "4", "rejected": "5"}),
        ("llama3.argilla", {"instruction": "2 + 2?", "chosen_response": "4", "rejected_response": "5"}),
        ("llama3.ultra", {"prompt": "2 + 2?", "chosen": said(USER, GOOD), "rejected": said(USER, BAD)}),
        (None, {"chosen": said(USER, GOOD), "rejected": said(USER, BAD)}),
        (
            "chat_template",  # OpenAI's preference fine-tuning
            {"input": {"messages": said(USER)}, "preferred_output": said(GOOD), "non_preferred_output": said(BAD)},
        ),
        (
            "chat_template",
            {
                "conversations": said(("human", "2 + 2?"), role="from", content="value"),
                "chosen": {"from": "gpt", "value": "4"},
                "rejected": {"from": "gpt", "value": "5"},
            },
        ),
    ],
)
def test_a_pair_is_one_prompt_with_two_answers(kind, row):
    found = read(row, kind=kind)
    assert isinstance(found, Pair)
    assert isinstance(found.chosen, Conversation)
    assert words(found.chosen) == [USER, GOOD]
    assert words(found.rejected) == [USER, BAD]
    assert found.chosen.rules.last_only


def test_a_system_text_stands_before_both():
    found = read({"system": "Be short.", "question": "2 + 2?", "chosen": "4", "rejected": "5"}, kind="chatml.intel")
    assert words(found.chosen) == [("system", "Be short."), USER, GOOD]


def test_columns_may_have_other_names():
    source = {"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad"}
    found = read({"q": "2 + 2?", "good": "4", "bad": "5"}, source=source)
    assert (words(found.chosen), words(found.rejected)) == ([USER, GOOD], [USER, BAD])


def test_plain_text_is_continued_without_a_template():
    found = read({"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}, kind=None)
    assert found == Pair(Pieces((("2 + 2 = ", False), ("4", True))), Pieces((("2 + 2 = ", False), ("5", True))))


def test_a_mapping_says_how_prompt_and_answers_are_written():
    kind = {
        "field_prompt": "q",
        "prompt_format": "[{system}] {prompt} ->",
        "chosen_format": " {chosen}!",
        "field_chosen": "good",
    }
    found = read({"q": "2 + 2", "good": "4", "rejected": "5", "system": "maths"}, kind=kind)
    assert found.chosen.parts == (("[maths] 2 + 2 ->", False), (" 4!", True))
    assert found.rejected.parts == (("[maths] 2 + 2 ->", False), ("5", True))


@pytest.mark.parametrize(("label", "wanted"), [(True, True), (0, False), ("true", True), ("False", False), (1.0, True)])
def test_an_answer_may_be_judged_by_itself(label, wanted):
    found = read({"prompt": "2 + 2?", "completion": "4", "label": label}, rl="kto")
    assert isinstance(found, Judged)
    assert words(found.answer) == [USER, GOOD]
    assert found.wanted is wanted


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"prompt": "p", "chosen": "a"}, {}, "key 'rejected': is missing; this row has 'prompt', 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, {}, "key 'prompt': is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, {}, "equals the preferred answer, so there is nothing to learn"),
        ({"prompt": "p", "chosen": 3, "rejected": "a"}, {}, "expected a text, a message or a list of messages, found int"),
        ({"chosen": said(GOOD, USER), "rejected": said(USER, BAD)}, {}, "key 'prompt': is missing"),
        ({"chosen": said(USER, GOOD, USER), "rejected": said(USER, BAD)}, {}, "ends with a message of the role 'user'"),
        (
            {"prompt": "p", "completion": "c", "label": "good"},
            {"rl": "kto"},
            "key 'label': expected true or false, found 'good'",
        ),
        ({"prompt": "p", "completion": "c"}, {"rl": "kto"}, "key 'label': is missing"),
    ],
)
def test_a_row_that_cannot_be_compared_is_told_with_its_key(row, keys, said):
    with pytest.raises(DataError) as caught:
        read(row, **keys)
    assert said in str(caught.value)


def test_a_format_that_nobody_knows_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'chatml\.intle' is no format of preferences; did you mean 'chatml\.intel'\?"):
        read({}, kind="chatml.intle")


def test_a_format_of_a_family_brings_its_template():
    run = a_run(kind="chatml.intel")
    assert template_named(run.sources[0], run).chat_template == "chatml"
    own = a_run(kind="chatml.intel", source={"chat_template": "llama3"})
    assert template_named(own.sources[0], own).chat_template == "llama3"


class Kept:
    """Rows in memory with their marks: row n is n + 1 repeated, its last two tokens trained, of each half where it is a pair."""

    pad = 0

    def __init__(self, lengths, marks):
        self.lengths, self.marks = np.array(lengths, np.int32), np.array(marks, np.int32)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, number):
        ids = np.full(self.lengths[number], number + 1, np.int32)
        labels = np.full_like(ids, -100)
        labels[-2:] = ids[-2:]
        mark = int(self.marks[number])
        if self.paired:
            labels[mark - 2 : mark] = number + 1
        return ids, labels

    paired = True


@pytest.mark.parametrize("packed", [True, False])
def test_both_answers_of_a_pair_are_in_one_batch_under_neighbouring_numbers(packed):
    rows = Kept([9, 7, 12, 8], [4, 3, 5, 4])
    run = a_run(sample_packing=packed, sequence_len=12, micro_batch_size=2)
    found = batches(rows, run, seed=0, epoch=0)
    seen = Counter()
    for batch in found:
        compared = batch.compared
        for unit in range(compared.units):
            both = [batch.ids[(compared.sample == 2 * unit + half) & (batch.labels != -100)] for half in (0, 1)]
            assert [len(part) for part in both] == [2, 2]
            (row,) = set(np.concatenate(both).tolist())
            seen[row] += 1
            halves = [int(((compared.sample == 2 * unit + half) & (batch.ids == row)).sum()) for half in (0, 1)]
            assert halves == [rows.marks[row - 1], rows.lengths[row - 1] - rows.marks[row - 1]]
        assert batch.ids.shape[1] <= (24 if packed else 12)
    assert seen == {1: 1, 2: 1, 3: 1, 4: 1}


def test_a_judged_answer_is_set_beside_the_prompt_of_another_row_once_each():
    rows = Kept([6, 5, 7], [3, -2, 4])
    rows.paired = False
    run = a_run("kto", sample_packing=True, sequence_len=16, micro_batch_size=1)
    units, prompts, answers = Counter(), Counter(), Counter()
    for batch in batches(rows, run, seed=0, epoch=0):
        compared = batch.compared
        twin = compared.mismatched
        assert twin.compared.units == compared.units == len(compared.wanted)
        for unit in range(compared.units):
            row = int(batch.ids[compared.sample == unit][0])
            assert bool(compared.wanted[unit]) == (rows.marks[row - 1] > 0)
            ids = twin.ids[twin.compared.sample == unit]
            trained = ids[(twin.labels[twin.compared.sample == unit] != -100)]
            assert ids[0] == row
            assert trained[0] != row
            units[row] += 1
            prompts[int(ids[0])] += 1
            answers[int(trained[0])] += 1
    assert units == prompts == answers == {1: 1, 2: 1, 3: 1}


def test_one_judged_row_alone_is_refused():
    rows = Kept([6], [3])
    with pytest.raises(DataError, match="there is one row alone; give it more"):
        batches(rows, a_run("kto"), seed=0, epoch=0)
