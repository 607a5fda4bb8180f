"""Leakage: prompts that stand in training files are named, and nothing else is."""

from __future__ import annotations

import json
import random

import pytest

from ropewalk.compare import leakage
from ropewalk.compare.candidates import Candidate
from ropewalk.compare.evidence import Finding
from ropewalk.compare.leakage import Index, leaks, words
from ropewalk.compare.provenance import Lineage
from ropewalk.compare.suites import Prompt, add_suite, delete_suite, prompts
from ropewalk.errors import NotFound
from ropewalk.quickstart import facts

LONG = "A customer from Peru asks how many days there are to send back a kettle that was opened once"  # 19 words
only_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def chat(question, answer="It depends."):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def trained_on(*files):
    return Candidate("cand_1", "w", None, "adapter", "house", "house", "d", "f", "t", Lineage(train_data=tuple(files)))


async def found(store, caller, asked, training, name="train.jsonl"):
    """What is said of each prompt of a suite against one training file: by number."""
    suite = await add_suite(store, caller, asked, hold=0)
    file = await store.put(caller, training, name)
    troubles = await leaks(store, caller, suite.id, trained_on(file.id))
    for trouble in troubles:
        assert (trouble.finding, trouble.blocks) == (Finding.LEAKAGE, True)
        assert file.id in trouble.sentence
        assert "house" in trouble.sentence
    named = " ".join(trouble.sentence for trouble in troubles)
    return {prompt.number for prompt in await prompts(store, caller, suite.id) if prompt.id in named}


def filler(seed, count):
    pick = random.Random(seed)
    return " ".join("".join(pick.choices("abcdefghij", k=6)) for _ in range(count))


CASES = [
    ("the prompt itself", chat(LONG), True),
    ("in capitals, with other punctuation and white space", chat(LONG.upper().replace(" ", ",\n ")), True),
    ("inside a longer text", {"text": f"{filler(1, 90)} {LONG} {filler(2, 90)}"}, True),
    ("13 of its words", {"a": [{"b": " ".join(LONG.split()[3:16])}]}, True),
    ("12 of its words", {"a": " ".join(LONG.split()[3:15])}, False),
    ("as an answer", chat("Repeat.", LONG), True),
    ("with one word changed in its middle", chat(LONG.replace("days", "weeks")), False),
    ("another text", chat(filler(3, 60)), False),
]


@only_sqlite
def test_thirteen_words_in_a_row_are_a_leak(opened):
    async def body(store, caller):
        asked = lines({"prompt": filler(8, 30)}, {"prompt": LONG}, {"prompt": filler(9, 30)})
        for name, row, leaked in CASES:
            training = lines(*(chat(filler(n, 20)) for n in range(20, 40)), row)
            assert await found(store, caller, asked, training) == ({2} if leaked else set()), name

    opened(body)


@only_sqlite
def test_a_short_prompt_leaks_only_as_a_whole_turn_value_or_line(opened):
    async def body(store, caller):
        asked = lines(*({"prompt": text} for text in ("Name the capital of Peru.", "Hi there", "Who wrote Ulysses?")))
        assert await found(store, caller, asked, lines(chat("name the capital of PERU"))) == {1}
        assert await found(store, caller, asked, lines(chat("Please name the capital of Peru. Thank you"))) == set()
        assert await found(store, caller, asked, lines(chat("Hi there"))) == set()  # too little to tell
        assert await found(store, caller, asked, b"Some prose.\nWho wrote Ulysses?\nHi there\n", "notes.txt") == {3}

    opened(body)


@only_sqlite
def test_a_text_leaks_across_its_lines_and_its_pieces(opened):
    async def body(store, caller):
        text = f"{filler(1, 200)}\n" + LONG.replace(" ", "\n") + f"\n{filler(2, 200)}"
        assert await found(store, caller, lines({"prompt": LONG}), text.encode(), "book.txt") == {1}
        big = "\n".join(filler(n, 40) for n in range(4500)) + "\n" + LONG + "\n"  # more than a portion
        assert await found(store, caller, lines({"prompt": LONG}), big.encode(), "big.txt") == {1}

    opened(body)


@only_sqlite
def test_a_script_without_spaces_is_counted_by_its_characters(opened):
    async def body(store, caller):
        asked = "東京から大阪まで新幹線で何時間かかりますか教えてください"
        assert len(words(asked)) > 13
        assert await found(store, caller, lines({"prompt": asked}), lines(chat(f"質問です。{asked}"))) == {1}
        assert await found(store, caller, lines({"prompt": asked}), lines(chat(asked[:12]))) == set()

    opened(body)


@only_sqlite
def test_the_template_of_a_suite_is_no_leak_but_what_it_asks_is(opened):
    shape = "Answer from the manual below in one short sentence and say so if it does not tell: what is the {} of it today"

    async def body(store, caller):
        asked = lines(*({"prompt": shape.format(filler(n, 2))} for n in range(30)))
        others = lines(*(chat(shape.format(filler(n, 2))) for n in range(100, 160)))
        assert await found(store, caller, asked, others) == set()
        copied = lines(*(chat(shape.format(filler(n, 2))) for n in (100, 4, 101)))
        assert await found(store, caller, asked, copied) == {5}

    opened(body)


@only_sqlite
def test_the_held_out_questions_of_the_quickstart_are_not_in_its_training_data(opened):
    trained, held_out = facts.split()
    rows = [chat(q.prompt, q.answer) for q in facts.questions(trained, len(facts.KINDS))]
    asked = [{"prompt": q.prompt, "reference": q.answer, "group": q.country} for q in facts.questions(held_out, 3)]

    async def body(store, caller):
        assert await found(store, caller, lines(*asked), lines(*rows)) == set()
        leaked = [*rows[:50], chat(asked[7]["prompt"])]
        assert await found(store, caller, lines(*asked), lines(*leaked)) == {7, 8, 9}  # three are about that passage

    opened(body)


@only_sqlite
def test_a_file_that_cannot_be_read_is_told_and_does_not_block(opened, tmp_path):
    async def body(store, caller):
        suite = await add_suite(store, caller, lines({"prompt": LONG}), hold=0)
        binary = await store.put(caller, b"\0\1" * 5000, "rows.parquet")
        (tmp_path / "train.jsonl").write_bytes(lines(chat(LONG)))
        names = ("file_gone", binary.id, "org/data-set", str(tmp_path), str(tmp_path / "train.jsonl"))
        *unread, leaked = await leaks(store, caller, suite.id, trained_on(*names))
        assert [trouble.blocks for trouble in unread] == [False] * 4
        assert all(name in trouble.sentence for name, trouble in zip(names, unread))
        assert leaked.blocks
        assert "1 of 1 prompts" in leaked.sentence
        assert len({trouble.id for trouble in (*unread, leaked)}) == 5
        assert await leaks(store, caller, suite.id, trained_on()) == []

    opened(body)


def test_a_file_is_looked_through_once_and_what_was_found_stays_when_it_is_gone(opened, tmp_path, monkeypatch):
    looked = []

    async def counted(index, chunks, look=leakage.look_through):
        looked.append(index)
        return await look(index, chunks)

    monkeypatch.setattr(leakage, "look_through", counted)
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(chat(filler(1, 40))))

    async def body(store, caller):
        suite = await add_suite(store, caller, lines({"prompt": LONG}, {"prompt": filler(2, 30)}), hold=0)
        file = await store.put(caller, lines(chat(LONG)), "t.jsonl")
        candidate = trained_on(file.id, str(path))
        first = await leaks(store, caller, suite.id, candidate)
        assert len(looked) == 2
        assert looked[0] is looked[1]  # one index for all files
        assert [trouble.blocks for trouble in first] == [True]
        assert await leaks(store, caller, suite.id, candidate) == first
        assert len(looked) == 2
        await store.delete(caller, file.id)  # which makes nothing right
        assert await leaks(store, caller, suite.id, candidate) == first
        path.write_bytes(lines(chat(filler(2, 30)), chat(filler(5, 50))))  # now it has one too
        again = await leaks(store, caller, suite.id, candidate)
        assert [trouble.blocks for trouble in again] == [True, True]
        path.unlink()
        assert await leaks(store, caller, suite.id, candidate) == again
        assert len(looked) == 3
        await delete_suite(store, caller, suite.id)
        with pytest.raises(NotFound):
            await leaks(store, caller, suite.id, candidate)

    opened(body)


@only_sqlite
def test_a_large_suite_keeps_a_part_of_each_prompt_and_finds_every_whole_one(settings):
    asked = [Prompt(f"p{n}", "s", n, f"g{n}", False, ({"role": "user", "content": filler(n, 60)},)) for n in range(200)]
    index = Index(most=500)  # of 200 * 48
    for begin in range(0, 200, 20):
        index.add(asked[begin : begin + 20])
    index.close()
    assert len(index._hashes) < 1200
    seen = index.look([lines(chat(filler(n, 60))) for n in range(100, 300)], [])
    assert seen == set(range(100, 200))
