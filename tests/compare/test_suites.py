"""Suites: what is read, what is refused with its line, what is held back, and what dies with a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update

from ropewalk.checks import CheckSpec
from ropewalk.compare.sealing import seal, unseal
from ropewalk.compare.suite_reading import held_back
from ropewalk.compare.suites import (
    DAY,
    add_suite,
    delete_suite,
    forget_unfinished,
    get_suite,
    list_suites,
    prompt,
    prompts,
    suite_key,
)
from ropewalk.compare.tables import candidates as candidate_rows
from ropewalk.compare.tables import outputs, runs, suites
from ropewalk.compare.tables import prompts as prompt_rows
from ropewalk.database import now
from ropewalk.errors import BadInput, DamagedContent, DataError, FileExpired, NotFound, PermissionDenied
from ropewalk.files.lifecycle import expire, sweep
from ropewalk.files.tables import derived, erasures, files
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def many(count, groups=40):
    return lines(*({"prompt": f"question {n}", "reference": f"answer {n}", "group": f"g{n % groups}"} for n in range(count)))


def test_rows_become_prompts_with_their_checks(opened):
    source = lines(
        {"prompt": "How long?", "reference": "30 days", "group": "refunds.md", "tags": ["policy"], "must_pass": True},
        {
            "prompt": "As JSON",
            "checks": [{"kind": "schema", "schema": {"type": "object"}, "guardrail": True}, {"kind": "judge"}],
        },
        {"messages": [{"role": "user", "content": "Which?"}], "system": "Be brief.", "answer": 7, "check": "numeric"},
        {"prompt": "Write a poem.", "style": True},
    )

    async def body(store, caller):
        suite = await add_suite(store, caller, source, name="support", hold=0, margin=0.05)
        assert (suite.name, suite.n_prompts, suite.n_held, suite.n_groups, suite.margin) == ("support", 4, 0, 4, 0.05)
        first, second, third, fourth = await prompts(store, caller, suite.id)
        assert (first.number, first.group, first.tags, first.must_pass) == (1, "refunds.md", ("policy",), True)
        assert (first.messages, first.reference, first.checks) == (
            ({"role": "user", "content": "How long?"},),
            "30 days",
            (CheckSpec("exact"),),
        )
        assert second.judged
        assert second.checks[0] == CheckSpec("schema", {"schema": {"type": "object"}}, True)
        assert (third.system, third.reference, third.checks, third.judged) == ("Be brief.", "7", (CheckSpec("numeric"),), False)
        assert fourth.judged
        assert fourth.style
        assert fourth.checks == ()
        assert fourth.text == "Write a poem."
        assert await prompt(store, caller, first.id) == first
        assert await get_suite(store, caller, suite.id) == suite
        assert await list_suites(store, caller) == [suite]

    opened(body)


def test_the_last_answer_of_a_training_row_is_what_is_expected(opened):
    source = lines(
        {
            "messages": [
                {"role": "system", "content": "Short."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": [{"type": "text", "text": "Capital of Peru?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Lima"}]},
            ]
        },
        {"conversations": [{"from": "human", "value": "Capital of Chad?"}, {"from": "gpt", "value": "N'Djamena"}]},
        {"instruction": "Translate", "input": "ja", "output": "yes"},
    )

    async def body(store, caller):
        suite = await add_suite(store, caller, source, hold=0)
        first, second, third = await prompts(store, caller, suite.id)
        assert [turn["role"] for turn in first.messages] == ["user", "assistant", "user"]
        assert (first.system, first.text, first.reference) == ("Short.", "Capital of Peru?", "Lima")
        assert first.checks == (CheckSpec("exact"),)
        assert (second.text, second.reference) == ("Capital of Chad?", "N'Djamena")
        assert (third.text, third.reference) == ("Translate\n\nja", "yes")

    opened(body)


GOOD = b'{"prompt": "a", "reference": "b"}'
BAD = [
    (b'{"prompt": "a"', "is no JSON object"),
    (b"prompt,answer", "a table is not read"),
    (b"[1]", "is a list; expected one JSON object per line"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "\xff"}', "is not UTF-8"),
    (b'{"question": "a"}', "has neither 'prompt' nor 'messages', but 'question'"),
    (b'{"prompt": "a", "refrence": "b"}', "key 'refrence': did you mean 'reference'?"),
    (b'{"prompt": " "}', "key 'prompt': expected a text"),
    (b'{"prompt": "a", "checks": [{"kind": "regexp"}]}', "checks[0]: 'regexp' is no kind of check; did you mean 'regex'?"),
    (b'{"prompt": "a", "check": "exact"}', "check[0]: a check of kind 'exact' needs the prompt's 'reference'"),
    (b'{"prompt": "a", "reference": "b", "check": "numeric"}', "is not one number"),
    (b'{"prompt": "a", "reference": "b", "checks": ["exact", "judge"]}', "judge beside a check that scores"),
    (b'{"prompt": "a", "reference": [1]}', "key 'reference': expected a text or a number"),
    (b'{"prompt": "a", "must_pass": "yes"}', "key 'must_pass': expected true or false"),
    (b'{"prompt": "a", "tags": [1]}', "key 'tags'"),
    (b'{"prompt": "a", "group": 1.5}', "key 'group'"),
    (b'{"messages": []}', "key 'messages': expected a list of messages"),
    (b'{"messages": [{"role": "tool", "content": "x"}]}', 'message 1 has the role "tool"'),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "message 1 has a block"),
    (b'{"messages": [{"role": "assistant", "content": "x"}]}', "begins with a user's turn"),
    (b"[" * 200_000, "is nested too deeply"),
]


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_bad_line_is_refused_with_its_number_and_leaves_nothing(opened):
    async def body(store, caller):
        for line, said in BAD:
            with pytest.raises(DataError) as raised:
                await add_suite(store, caller, GOOD + b"\n\n" + line + b"\n" + GOOD)
            assert raised.value.line == 3
            assert str(raised.value).startswith("suite:3: ")
            assert said in str(raised.value)
        async with store.database.reading() as connection:
            assert (await connection.execute(select(func.count()).select_from(suites))).scalar() == 0
            assert (await connection.execute(select(func.count()).select_from(prompt_rows))).scalar() == 0

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_bad_line_far_down_a_stream_leaves_nothing(opened):
    async def stream():
        for _ in range(600):
            yield GOOD + b"\n"
        yield b"nonsense"

    async def body(store, caller):
        with pytest.raises(DataError, match="601"):
            await add_suite(store, caller, stream())
        async with store.database.reading() as connection:
            assert (await connection.execute(select(func.count()).select_from(prompt_rows))).scalar() == 0

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_what_cannot_be_a_suite_is_said(opened, tmp_path):
    async def body(store, caller):
        for settings, said in (({"hold": 1}, "hold is 1"), ({"hold": -0.1}, "hold"), ({"margin": 3}, "margin is 3")):
            with pytest.raises(BadInput, match=said):
                await add_suite(store, caller, GOOD, **settings)
        with pytest.raises(DataError, match="has no prompt"):
            await add_suite(store, caller, b"\n\n")
        with pytest.raises(NotFound, match="there is no file"):
            await add_suite(store, caller, tmp_path / "none.jsonl")
        with pytest.raises(NotFound, match="File `file_x` not found"):
            await add_suite(store, caller, "file_x")
        held = next(f"g{n}" for n in range(99) if held_back(f"g{n}", 0.5))
        with pytest.raises(BadInput, match="held back, since they are of only 1 groups"):
            await add_suite(store, caller, lines({"prompt": "a", "reference": "b", "group": held}))
        with pytest.raises(DataError, match="key 'doc_id': is missing"):
            await add_suite(store, caller, GOOD, group="doc_id")
        with pytest.raises(PermissionDenied):
            await add_suite(store, replace(caller, rights=frozenset({"read"})), GOOD)

    opened(body)


def test_half_of_the_groups_are_held_back_and_the_same_ones_in_every_suite(opened):
    async def body(store, caller):
        one = await add_suite(store, caller, many(400))
        other = await add_suite(store, caller, b"\n".join(reversed(many(400).split(b"\n"))))
        held = {prompt.group for prompt in await prompts(store, caller, one.id, "held")}
        main = {prompt.group for prompt in await prompts(store, caller, one.id, "main")}
        assert not held & main
        assert len(held | main) == one.n_groups == 40
        assert 8 <= len(held) <= 32  # binomial: outside with a chance of 1 in 10,000, and the hash is fixed
        assert {prompt.group for prompt in await prompts(store, caller, other.id, "held")} == held
        assert one.n_held == 10 * len(held) == len(await prompts(store, caller, one.id, "held"))

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_the_same_prompts_have_the_same_digest_and_others_another(opened):
    async def body(store, caller):
        one, same = [await add_suite(store, caller, many(30)) for _ in range(2)]
        others = [
            await add_suite(store, caller, many(31)),
            await add_suite(store, caller, many(30), hold=0.3),
            await add_suite(store, caller, many(30, groups=29)),
        ]
        assert one.digest == same.digest
        assert one.id != same.id
        assert len({one.digest, *(other.digest for other in others)}) == 4
        first = (await prompts(store, caller, one.id))[0]
        again = (await prompts(store, caller, same.id))[0]
        assert first.text_hash != again.text_hash  # under each suite's own key

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_prompts_without_a_group_are_each_their_own_and_equal_ones_together(opened):
    async def body(store, caller):
        suite = await add_suite(store, caller, lines(*({"prompt": text, "reference": "x"} for text in ("a", "b", "a"))), hold=0)
        first, second, third = await prompts(store, caller, suite.id)
        assert first.group == third.group != second.group
        assert suite.n_groups == 2
        assert first.text_hash == third.text_hash != second.text_hash

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_tag_says_what_must_pass_and_a_key_what_hangs_together(opened):
    rows = lines({"prompt": "a", "tags": ["safety"], "doc": 1}, {"prompt": "b", "tags": "other", "doc": 2})

    async def body(store, caller):
        suite = await add_suite(store, caller, rows, must_pass="safety", group="doc", hold=0)
        first, second = await prompts(store, caller, suite.id)
        assert (first.must_pass, second.must_pass) == (True, False)
        assert (first.group, second.group, second.tags) == ("1", "2", ("other",))

    opened(body)


def test_nothing_of_a_prompt_can_be_read_in_the_tables(opened, settings):
    async def body(store, caller):
        secret = lines({"prompt": "marzipan-1", "reference": "marzipan-2", "group": "marzipan-3", "tags": ["marzipan-4"]})
        await add_suite(store, caller, secret, hold=0)
        async with store.database.reading() as connection:
            for table in (prompt_rows, suites):
                for row in (await connection.execute(select(table))).all():
                    assert b"marzipan" not in repr(tuple(row)).encode()
        if settings.database.startswith("sqlite"):
            assert not [f for f in Path(settings.data).rglob("*") if f.is_file() and b"marzipan" in f.read_bytes()]

    opened(body)


def test_another_workspace_and_another_user_find_nothing(opened):
    async def body(store, caller):
        other = await create_workspace(store.database, store.vault, "other")
        stranger = Caller(caller.organization_id, other.id, None)
        user, neighbour = replace(caller, user_id="u1"), replace(caller, user_id="u2")
        suite = await add_suite(store, user, GOOD, hold=0)
        [asked] = await prompts(store, user, suite.id)
        assert await prompts(store, caller, suite.id) == [asked]  # who stands for all users
        for who in (stranger, neighbour):
            assert await list_suites(store, who) == []
            for ask in (get_suite, prompts, suite_key, delete_suite):
                with pytest.raises(NotFound) as theirs:
                    await ask(store, who, suite.id)
                with pytest.raises(NotFound) as nobodys:
                    await ask(store, who, "suite_none")
                assert str(theirs.value) == str(nobodys.value).replace("suite_none", suite.id)
            with pytest.raises(NotFound):
                await prompt(store, who, asked.id)
        for odd in ("ü", "x" * 500, "a\0b"):
            with pytest.raises(NotFound):
                await get_suite(store, caller, odd)

    opened(body)


async def answered(store, caller, suite, asked):
    """An answer to a prompt, as a run would keep it."""
    key = await suite_key(store, caller, suite.id)
    owner = {"workspace_id": caller.workspace_id, "created_at": now()}
    candidate = {"kind": "base", "name": "b", "target": "b", "digest": "d", "family": "f", "template_digest": "t"}
    async with store.database.writing() as connection:
        await connection.execute(insert(candidate_rows).values(id="cand_1", **owner, **candidate))
        run = {
            "candidate_id": "cand_1",
            "suite_id": suite.id,
            "params": "{}",
            "path": "serving",
            "digest": "d",
            "state": "done",
        }
        await connection.execute(insert(runs).values(id="run_1", **owner, **run))
        output = {
            "run_id": "run_1",
            "suite_id": suite.id,
            "prompt_id": asked.id,
            "sample": 0,
            "key": "k",
            "content": seal(key, "an answer", "output out_1"),
            **dict.fromkeys(("tokens_in", "tokens_cached", "tokens_out", "retries", "created_at"), 0),
        }
        await connection.execute(insert(outputs).values(id="out_1", **output))
    return key


async def counts(store):
    async with store.database.reading() as connection:
        return [
            (await connection.execute(select(func.count()).select_from(table))).scalar()
            for table in (suites, prompt_rows, outputs, runs, derived, erasures)
        ]


def test_a_suite_dies_with_its_file_and_the_receipt_says_so(opened):
    async def body(store, caller):
        file = await store.put(caller, many(700), "questions.jsonl")
        twin = await store.put(caller, many(700), "copy.jsonl")  # the same bytes keep nothing of it alive
        suite = await add_suite(store, caller, file.id)
        kept = await add_suite(store, caller, many(10), hold=0)
        assert (suite.name, suite.file_id, suite.n_prompts) == ("questions.jsonl", file.id, 700)
        asked = (await prompts(store, caller, suite.id))[0]
        await answered(store, caller, suite, asked)
        assert await counts(store) == [2, 710, 1, 1, 1, 0]
        receipt = await store.delete(caller, file.id)
        assert receipt.derived == ("suite",)
        assert receipt.content == "shared"
        assert await counts(store) == [1, 10, 0, 1, 0, 0]
        with pytest.raises(NotFound):
            await suite_key(store, caller, suite.id)
        assert len(await prompts(store, caller, kept.id)) == 10
        assert (await store.delete(caller, twin.id)).derived == ()

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_after_the_sweep_no_byte_of_a_suite_of_a_deleted_file_is_left(opened, settings):
    async def body(store, caller):
        file = await store.put(caller, many(700), "canary-name.jsonl")
        suite = await add_suite(store, caller, file.id)
        async with store.database.reading() as connection:
            wrapped = (await connection.execute(select(suites.c.sealed_key))).scalar_one()
            sealed = (await connection.execute(select(prompt_rows.c.content).limit(1))).scalar_one()
        canaries = (wrapped, sealed, b"canary-name", suite.id.encode())

        def seen():
            data = b"".join(path.read_bytes() for path in Path(settings.data).rglob("*") if path.is_file())
            return [canary in data for canary in canaries]

        assert seen() == [True] * 4
        await store.delete(caller, file.id)
        await sweep(store)
        assert seen() == [False] * 4

    opened(body)


def test_a_suite_dies_when_its_file_expires(opened):
    async def body(store, caller):
        file = await store.put(caller, many(5), "q.jsonl", expires_in=3600)
        suite = await add_suite(store, caller, file.id, hold=0)
        async with store.database.writing() as connection:
            await connection.execute(update(files).values(expires_at=now() - 1))
        with pytest.raises(FileExpired):
            await add_suite(store, caller, file.id)
        assert await expire(store) == 1
        assert await counts(store) == [0, 0, 0, 0, 0, 0]
        with pytest.raises(NotFound):
            await get_suite(store, caller, suite.id)

    opened(body)


def test_deleting_a_suite_takes_its_answers_and_leaves_its_file(opened):
    async def body(store, caller):
        file = await store.put(caller, many(5), "q.jsonl")
        suite = await add_suite(store, caller, file.id, hold=0)
        await answered(store, caller, suite, (await prompts(store, caller, suite.id))[0])
        await delete_suite(store, caller, suite.id)
        assert await counts(store) == [0, 0, 0, 1, 0, 0]
        assert (await store.delete(caller, file.id)).derived == ()

    opened(body)


def test_a_file_that_is_deleted_while_it_is_read_leaves_no_suite(opened):
    async def body(store, caller):
        file = await store.put(caller, many(2000), "q.jsonl")
        content = await store.open_content(caller, file.id)

        class Slow:
            """The file's own bytes, deleted after the first portion."""

            @staticmethod
            async def open_content(caller, id):
                return Slow

            @staticmethod
            def chunks():
                return Slow.some()

            @staticmethod
            async def some():
                data = await content.read()
                yield data[:60_000]
                await store.delete(caller, file.id)
                yield data[60_000:]

            file = content.file

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "open_content", Slow.open_content)
            with pytest.raises(NotFound, match=file.id):
                await add_suite(store, caller, file.id)
        assert await counts(store) == [0, 0, 0, 0, 0, 0]

    opened(body)


def test_what_a_crash_left_of_a_suite_is_seen_by_nobody_and_dropped_after_a_day(opened):
    async def body(store, caller):
        suite = await add_suite(store, caller, GOOD, hold=0)
        async with store.database.writing() as connection:
            await connection.execute(update(suites).values(complete=False))
        with pytest.raises(NotFound):
            await get_suite(store, caller, suite.id)
        await forget_unfinished(store)
        assert (await counts(store))[:2] == [1, 1]  # somebody may be at it
        async with store.database.writing() as connection:
            await connection.execute(update(suites).values(created_at=now() - DAY - 1))
        await forget_unfinished(store)
        assert (await counts(store))[:2] == [0, 0]

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_what_is_sealed_opens_for_its_own_purpose_only(opened):
    async def body(store, caller):
        suite = await add_suite(store, caller, GOOD, hold=0)
        key = await suite_key(store, caller, suite.id)
        sealed = seal(key, "an answer \ud800", "output out_1")
        assert unseal(key, sealed, "output out_1") == "an answer \ud800"
        with pytest.raises(DamagedContent):
            unseal(key, sealed, "output out_2")

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_suites_are_listed_newest_first_page_by_page(opened):
    async def body(store, caller):
        made = [await add_suite(store, caller, GOOD, hold=0) for _ in range(5)]
        first = await list_suites(store, caller, limit=2)
        second = await list_suites(store, caller, limit=9, after=first[-1].id)
        assert [suite.id for suite in (*first, *second)] == [suite.id for suite in reversed(made)]

    opened(body)


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_file_of_this_machine_may_have_a_byte_order_mark_and_dos_lines(opened, tmp_path):
    path = tmp_path / "suite.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD + b"\r\n")

    async def body(store, caller):
        suite = await add_suite(store, caller, path, hold=0)
        assert (suite.name, suite.n_prompts) == ("suite.jsonl", 2)

    opened(body)
