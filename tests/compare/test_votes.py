"""Blind votes: one ticket one vote, one voter one mean, nothing that tells whose an answer is, and a log that shows its wounds."""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import asdict, replace

import pytest
import time_machine
from sqlalchemy import delete, func, insert, literal, select, update

from compare.votable import keyed, votable
from ropewalk.compare import vote_pairs
from ropewalk.compare.candidates import get_candidate
from ropewalk.compare.identity_words import IdentityWords
from ropewalk.compare.invites import accept, invite
from ropewalk.compare.labels import mean_labels
from ropewalk.compare.records import get_comparison
from ropewalk.compare.suites import delete_suite, prompt, prompts
from ropewalk.compare.tables import labels, vote_tickets, voters, votes
from ropewalk.compare.vote_counts import tally_votes, votes_on, waiting
from ropewalk.compare.vote_log import verify_votes
from ropewalk.compare.voters import VOTE, Who, declare_trainer, exclude, who
from ropewalk.compare.votes import cast, next_ticket
from ropewalk.errors import BadInput, NotFound, PermissionDenied, VerificationFailed
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace


@pytest.fixture(autouse=True)
def no_repeats(monkeypatch):
    """Pairs that come back are a test of their own."""
    monkeypatch.setattr(vote_pairs, "REPEATS", 0.0)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """One loop and one store for all tests of this module that need no database of their own."""
    with asyncio.Runner() as loop:
        store = loop.run(Store.open(Settings(data=tmp_path_factory.mktemp("votes"))))
        yield lambda body, caller: loop.run(body(store, caller)), lambda: loop.run(_workspace(store))
        loop.run(store.close())


async def _workspace(store):
    made = await create_workspace(store.database, store.vault, secrets.token_hex(8))
    return Caller(made.organization_id, made.id, None)


@pytest.fixture
def here(runner):
    """Runs a test's body in a workspace of its own."""
    run, workspace = runner
    return lambda body: run(body, workspace())


def person(number):
    return Who("user", f"person {number}")


def better(ticket, what="two"):
    """The side of the answer that begins so."""
    return "left" if ticket.left.startswith(what) else "right"


async def vote_all(store, caller, comparison, somebody, choose, most=1000):
    """How many votes there were to cast."""
    for number in range(most):
        ticket = await next_ticket(store, caller, comparison.id, somebody)
        if ticket is None:
            return number
        await cast(store, caller, ticket.token, choose(ticket), 1500)
    return most


def test_a_ticket_tells_no_name_and_a_vote_tells_both(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        ticket = await next_ticket(store, caller, comparison.id, person(1))
        told = json.dumps(asdict(ticket)) + repr(ticket)
        for item in comparison.items:
            one = await get_candidate(store, caller, item.candidate_id)
            for secret in (one.id, one.name, item.run_id):
                assert secret not in told
        assert {ticket.left[:3], ticket.right[:3]} == {"one", "two"}
        assert ticket.prompt.startswith("question ")
        assert ticket.number == 1
        assert ticket.token not in repr(ticket)
        revealed = await cast(store, caller, ticket.token, better(ticket), 1200)
        assert {revealed.left, revealed.right} == {"rope-seven", "hemp-nine"}
        assert revealed.chosen == comparison.candidate_ids[0]
        assert (await prompt(store, caller, revealed.prompt_id)).text == ticket.prompt

    here(body)


def test_a_ticket_opens_once(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        ticket = await next_ticket(store, caller, comparison.id, person(1))
        await cast(store, caller, ticket.token, "left", 10)
        told = set()
        for token in (ticket.token, "never was one", ""):
            with pytest.raises(NotFound) as caught:
                await cast(store, caller, token, "right", 10)
            told.add(str(caught.value))
        assert len(told) == 1
        (only,) = [
            vote
            for p in await prompts(store, caller, comparison.suite_id)
            for vote in await votes_on(store, caller, comparison.id, p.id)
        ]
        assert only.choice == "left"

    here(body)


def test_of_many_who_use_one_ticket_at_once_one_votes(opened):
    async def body(store, caller):
        comparison = await votable(store, caller)
        ticket = await next_ticket(store, caller, comparison.id, person(1))
        tries = [cast(store, caller, ticket.token, "left", 10) for _ in range(8)]
        done = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(one, NotFound) for one in done) == 7

    opened(body)


def test_who_asks_again_before_voting_is_shown_the_same_pair_under_another_token(opened):
    async def body(store, caller):
        comparison = await votable(store, caller)
        first = await next_ticket(store, caller, comparison.id, person(1))
        for again in [await next_ticket(store, caller, comparison.id, person(1)) for _ in range(5)]:
            assert (again.prompt, again.left, again.right) == (first.prompt, first.left, first.right)
            assert again.token != first.token
        with pytest.raises(NotFound):
            await cast(store, caller, first.token, "left", 10)
        await cast(store, caller, again.token, "left", 10)
        at_once = await asyncio.gather(*(next_ticket(store, caller, comparison.id, person(2)) for _ in range(6)))
        assert len({ticket.prompt for ticket in at_once}) == 1
        async with store.database.reading() as connection:
            assert await connection.scalar(select(func.count()).select_from(vote_tickets)) == 2

    opened(body)


def test_a_ticket_that_waited_too_long_is_given_another_token(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        ticket = await next_ticket(store, caller, comparison.id, person(1))
        with time_machine.travel((ticket.expires_at + 1) / 1e6, tick=True):
            with pytest.raises(NotFound):
                await cast(store, caller, ticket.token, "left", 10)
            again = await next_ticket(store, caller, comparison.id, person(1))
            assert again.prompt == ticket.prompt
            await cast(store, caller, again.token, "left", 10)

    here(body)


def test_the_token_is_not_kept(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        ticket = await next_ticket(store, caller, comparison.id, person(1))
        async with store.database.reading() as connection:
            (row,) = (
                (await connection.execute(select(vote_tickets).where(vote_tickets.c.comparison_id == comparison.id)))
                .mappings()
                .all()
            )
            (voter,) = (
                (await connection.execute(select(voters).where(voters.c.workspace_id == caller.workspace_id))).mappings().all()
            )
        assert ticket.token.encode() not in b"".join(
            bytes(v) if isinstance(v, bytes) else str(v).encode() for v in row.values()
        )
        assert "person" not in str(dict(voter))

    here(body)


def test_a_voter_sees_each_pair_once_and_the_sides_are_chosen_by_chance(here):
    async def body(store, caller):
        comparison = await votable(store, caller, count=24)
        seen = []

        def choose(ticket):
            seen.append((ticket.prompt, ticket.left[:3]))
            return "left"

        assert await vote_all(store, caller, comparison, person(1), choose) == 24
        assert len({prompt for prompt, _ in seen}) == 24
        # All on one side by chance: 2 in 2**24.
        assert {side for _, side in seen} == {"one", "two"}
        assert await next_ticket(store, caller, comparison.id, person(1)) is None
        assert await next_ticket(store, caller, comparison.id, person(2)) is not None

    here(body)


def test_every_candidate_is_held_against_the_baseline(here):
    async def body(store, caller):
        comparison = await votable(
            store, caller, lambda name, number: f"{name[0]} says {number}", count=4, names=("aaa-1", "bbb-2", "ccc-3")
        )
        assert await vote_all(store, caller, comparison, person(1), lambda ticket: better(ticket, "a")) == 8
        for counted in (await tally_votes(store, caller, comparison.id)).values():
            assert [(voter.n_ballots, voter.share) for voter in counted.tally.voters] == [(4, 0.0)]

    here(body)


def test_the_half_that_is_held_back_equal_answers_and_those_that_name_a_candidate_are_shown_to_nobody(here):
    def answers(name, number):
        if number % 4 == 1:
            return "the same"
        if number % 4 == 2 and name == "hemp-nine":
            return "Hello, HEMP\u200bNine speaking."
        return f"{name[0]} {number}"

    async def body(store, caller):
        comparison = await votable(store, caller, answers, count=40, hold=0.5)
        may = {one.text for one in await prompts(store, caller, comparison.suite_id, "main") if one.number % 4 in (0, 3)}
        shown = set()
        await vote_all(store, caller, comparison, person(1), lambda ticket: shown.add(ticket.prompt) or "same")
        assert shown == may
        assert 0 < len(may) < 20

    here(body)


@pytest.mark.parametrize(
    ("answer", "tells"),
    [
        ("I am Qwen, made by Alibaba Cloud.", True),
        ("Sure - qwen3 0.6B here.", True),
        ("As QWEN3_0.6b I think so.", True),
        ("I'm ChatGPT, how can I help?", True),
        ("I was trained by Anthropic to be helpful.", True),
        ("House-Bot_r16 says hi", True),
        ("The lama is an animal; so is the llama.", False),
        ("Claude Monet painted water lilies.", False),
        ("I am sure that the GPT partition table is fine", True),  # too much is left out rather than too little
        ("A houseboat is a boat.", False),
        ("", False),
    ],
)
def test_words_that_give_away_who_answered(answer, tells):
    words = IdentityWords(["qwen3-0.6b", "models/house-bot/r16", "a"], ["qwen", ""])
    assert (
        words.in_(answer.replace("House-Bot_r16", "house bot r16")) is tells
        if "House" in answer
        else words.in_(answer) is tells
    )


def test_a_pair_that_comes_back_is_swapped_and_counts_for_consistency_alone(opened, monkeypatch):
    async def body(store, caller):
        comparison = await votable(store, caller, count=6)
        first = {}

        def choose(ticket):
            first[ticket.prompt] = ticket.left
            return better(ticket)

        assert await vote_all(store, caller, comparison, person(1), choose) == 6
        before = await tally_votes(store, caller, comparison.id)
        monkeypatch.setattr(vote_pairs, "REPEATS", 1.0)
        again = []
        for side in ("two", "two", "one"):
            ticket = await next_ticket(store, caller, comparison.id, person(1))
            assert ticket.left != first[ticket.prompt]
            again.append(ticket.prompt)
            await cast(store, caller, ticket.token, better(ticket, side), 10)
        assert len(set(again)) == 3
        monkeypatch.setattr(vote_pairs, "REPEATS", 0.0)
        assert await next_ticket(store, caller, comparison.id, person(1)) is None
        (candidate,) = comparison.candidate_ids
        (voter,) = (await tally_votes(store, caller, comparison.id))[candidate].tally.voters
        assert (voter.n_ballots, voter.share) == (6, before[candidate].tally.voters[0].share)
        assert voter.consistency == pytest.approx(2 / 3)
        async with store.database.reading() as connection:
            assert await connection.scalar(select(voters.c.self_consistency)) == pytest.approx(2 / 3)
            assert await connection.scalar(select(func.count()).select_from(labels)) == 6

    opened(body)


def test_about_one_pair_in_twenty_comes_back(here, monkeypatch):
    async def body(store, caller):
        comparison = await votable(store, caller, count=40)
        monkeypatch.setattr(vote_pairs, "REPEATS", 0.05)
        drawn = iter([0.5, 0.04, *[0.5] * 100])
        monkeypatch.setattr(vote_pairs.CHANCE, "random", lambda: next(drawn))
        assert (
            await vote_all(store, caller, comparison, person(1), lambda ticket: "same") == 40
        )  # the second is too early to repeat
        async with store.database.reading() as connection:
            assert (
                await connection.scalar(
                    select(func.count()).select_from(votes).where(votes.c.is_repeat, votes.c.comparison_id == comparison.id)
                )
                == 0
            )

    here(body)


def test_twenty_ballots_of_one_person_are_one_opinion(here):
    async def body(store, caller):
        comparison = await votable(store, caller, count=20)
        (candidate,) = comparison.candidate_ids
        for number in range(6):  # three for the one, three for the other
            side = "one" if number % 2 else "two"
            await vote_all(store, caller, comparison, person(number), lambda ticket, side=side: better(ticket, side), most=2)
        before = (await tally_votes(store, caller, comparison.id))[candidate].tally
        assert before.share == pytest.approx(0.5)
        assert await vote_all(store, caller, comparison, person("stuffer"), better) == 20
        after = (await tally_votes(store, caller, comparison.id))[candidate].tally
        assert after.n_ballots == 32
        assert after.share == pytest.approx(4 / 7)  # 26 of 32 ballots would have said 0.81
        assert after.low < 0.5 < after.high

    here(body)


def test_no_share_is_told_below_five_voters(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        (candidate,) = comparison.candidate_ids
        for number in range(5):
            counted = (await tally_votes(store, caller, comparison.id))[candidate]
            assert (counted.tally.share, len(counted.tally.voters)) == (None, number)
            await vote_all(store, caller, comparison, person(number), better, most=2)
        assert (await tally_votes(store, caller, comparison.id))[candidate].tally.share == 1.0

    here(body)


def test_who_trained_a_candidate_is_counted_apart(here):
    async def body(store, caller):
        file = await store.put(keyed(caller, "key_trainer"), b"{}", "train.jsonl")
        comparison = await votable(store, caller, trained_on=file.id)
        (candidate,) = comparison.candidate_ids
        trainer, other = keyed(caller, "key_trainer"), keyed(caller, "key_other")
        for one in (trainer, other):
            await vote_all(store, one, comparison, who(one), better, most=3)
        counted = (await tally_votes(store, caller, comparison.id))[candidate]
        assert (len(counted.tally.voters), len(counted.trainers.voters)) == (1, 1)
        assert len(await mean_labels(store, comparison)) in range(1, 4)
        await declare_trainer(store, other, who(other), [candidate])
        counted = (await tally_votes(store, caller, comparison.id))[candidate]
        assert (len(counted.tally.voters), len(counted.trainers.voters)) == (0, 2)
        assert await mean_labels(store, comparison) == {}

    here(body)


def test_who_is_left_out_is_named_with_the_reason(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        (candidate,) = comparison.candidate_ids
        await vote_all(store, caller, comparison, person(1), better, most=2)
        (voter,) = (await tally_votes(store, caller, comparison.id))[candidate].tally.voters
        with pytest.raises(BadInput, match="no reason"):
            await exclude(store, caller, voter.name, " ")
        await exclude(store, caller, voter.name, "a script")
        counted = (await tally_votes(store, caller, comparison.id))[candidate]
        assert (counted.tally.voters, counted.excluded) == ((), ((voter.name, "a script"),))
        assert await mean_labels(store, comparison) == {}
        with pytest.raises(NotFound):
            await exclude(store, caller, "voter_nobody", "why not")

    here(body)


def test_votes_become_labels_for_judges(here):
    async def body(store, caller):
        comparison = await votable(store, caller, count=3)
        (candidate,) = comparison.candidate_ids
        said = {"question 1": "two", "question 2": "one"}
        for number in range(2):
            choose = lambda ticket: better(ticket, said[ticket.prompt]) if ticket.prompt in said else "both_bad"
            await vote_all(store, caller, comparison, person(number), choose)
        await vote_all(store, caller, comparison, person("third"), lambda ticket: "same")
        found = await mean_labels(store, comparison)
        by_text = {one.text: found[candidate, one.id] for one in await prompts(store, caller, comparison.suite_id)}
        assert by_text == {
            "question 1": pytest.approx(2.5 / 3),
            "question 2": pytest.approx(0.5 / 3),
            "question 3": pytest.approx(0.5),  # "both bad" says nothing on judges
        }

    here(body)


ADDED = {"id": literal("vote_stuffed"), "number": literal(6), "ticket": literal(b"none")}
TAMPERINGS = {
    "changed": (
        lambda id: update(votes).where(votes.c.comparison_id == id, votes.c.number == 2).values(choice="right"),
        "vote 2 was changed",
    ),
    "removed": (lambda id: delete(votes).where(votes.c.comparison_id == id, votes.c.number == 2), "vote 2 is missing"),
    "put in": (
        lambda id: insert(votes).from_select(
            [column.name for column in votes.c],
            select(*(ADDED.get(column.name, column) for column in votes.c)).where(
                votes.c.comparison_id == id, votes.c.number == 5
            ),
        ),
        "vote 6 was added beside the log",
    ),
    "cut off": (lambda id: delete(votes).where(votes.c.comparison_id == id, votes.c.number == 5), "ends with vote 4"),
    "another voter": (
        lambda id: update(votes).where(votes.c.comparison_id == id, votes.c.number == 5).values(ms=7),
        "vote 5 was changed",
    ),
}


@pytest.mark.parametrize("way", TAMPERINGS)
def test_a_log_that_was_tampered_with_shows_it(here, way):
    async def body(store, caller):
        comparison = await votable(store, caller)
        assert (await verify_votes(store, caller, comparison.id)).votes == 0
        await vote_all(store, caller, comparison, person(1), lambda ticket: "left", most=5)
        report = await verify_votes(store, caller, comparison.id)
        report.check()
        assert (report.votes, report.faults) == (5, ())
        statement, fault = TAMPERINGS[way]
        async with store.database.writing() as connection:
            await connection.execute(statement(comparison.id))
        report = await verify_votes(store, caller, comparison.id)
        assert any(fault in told for told in report.faults), report
        with pytest.raises(VerificationFailed):
            report.check()

    here(body)


def test_voters_at_once_make_one_chain(opened):
    async def body(store, caller):
        comparison = await votable(store, caller, count=6)
        await asyncio.gather(*(vote_all(store, caller, comparison, person(n), lambda ticket: "left", most=3) for n in range(5)))
        report = await verify_votes(store, caller, comparison.id)
        assert (report.votes, report.faults) == (15, ())

    opened(body)


def test_an_invitation_is_one_voter_of_one_comparison_and_nothing_else(here):
    async def body(store, caller):
        comparison, other = await votable(store, caller), await votable(store, caller, suite="other")
        token = await invite(store, caller, comparison.id)
        first, second = await accept(store, token), await accept(store, token)
        assert first == second
        assert first.caller.rights == {VOTE}
        ticket = await next_ticket(store, first.caller, comparison.id, first.who)
        await cast(store, second.caller, ticket.token, "left", 10)
        assert (await next_ticket(store, second.caller, comparison.id, second.who)).number == 2
        with pytest.raises(NotFound):
            await next_ticket(store, first.caller, other.id, first.who)
        for closed in (get_comparison, tally_votes, verify_votes, invite):
            with pytest.raises(PermissionDenied):
                await closed(store, first.caller, comparison.id)
        colleague = await accept(store, await invite(store, caller, comparison.id))
        assert (await next_ticket(store, colleague.caller, comparison.id, colleague.who)).number == 1

    here(body)


def test_an_invitation_that_is_forged_or_too_old_is_none(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        token = await invite(store, caller, comparison.id, days=2)
        head, tail = token.split(".")
        told = set()
        for forged in (f"{head}.{tail[:-2]}AA", f"{head[:-4]}AAAA.{tail}", head, "", "é.é", "." * 20_000):
            with pytest.raises(NotFound) as caught:
                await accept(store, forged)
            told.add(str(caught.value))
        found = await accept(store, token)
        with time_machine.travel(found.expires_at / 1e6 + 1), pytest.raises(NotFound) as caught:
            await accept(store, token)
        assert told == {str(caught.value)}
        for days in (0, 61, -1):
            with pytest.raises(BadInput, match="at most 60"):
                await invite(store, caller, comparison.id, days=days)
        with pytest.raises(BadInput, match="no candidate"):
            await invite(store, caller, comparison.id, trainer_of=["cand_x"])

    here(body)


def test_an_invited_trainer_is_counted_apart(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        (candidate,) = comparison.candidate_ids
        found = await accept(store, await invite(store, caller, comparison.id, trainer_of=[candidate]))
        await vote_all(store, found.caller, comparison, found.who, better, most=2)
        counted = (await tally_votes(store, caller, comparison.id))[candidate]
        assert (len(counted.tally.voters), len(counted.trainers.voters)) == (0, 1)

    here(body)


def test_what_is_anothers_cannot_be_voted_on(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        ticket = await next_ticket(store, caller, comparison.id, person(1))
        elsewhere = replace(caller, workspace_id=(await create_workspace(store.database, store.vault, secrets.token_hex(8))).id)
        ann = replace(caller, user_id="ann")
        for other in (elsewhere, ann):
            with pytest.raises(NotFound):
                await cast(store, other, ticket.token, "left", 10)
            for id in (comparison.id, "cmp_nothing"):
                with pytest.raises(NotFound, match=id):
                    await next_ticket(store, other, id, person(1))
                with pytest.raises(NotFound, match=id):
                    await tally_votes(store, other, id)
        reader = replace(caller, rights=frozenset({"read"}))
        with pytest.raises(PermissionDenied):
            await next_ticket(store, reader, comparison.id, person(1))
        await cast(store, caller, ticket.token, "left", 10)

    here(body)


def test_a_vote_that_is_none_is_told_what_is(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        ticket = await next_ticket(store, caller, comparison.id, person(1))
        with pytest.raises(BadInput, match="left, right, same, both_bad"):
            await cast(store, caller, ticket.token, "up", 10)
        with pytest.raises(BadInput, match="milliseconds"):
            await cast(store, caller, ticket.token, "left", -1)
        await cast(store, caller, ticket.token, "left", 10**12)

    here(body)


def test_votes_stay_when_the_suite_goes(here):
    async def body(store, caller):
        comparison = await votable(store, caller)
        await vote_all(store, caller, comparison, person(1), better, most=3)
        open_one = await next_ticket(store, caller, comparison.id, person(1))
        assert [one.id for one in await waiting(store, caller, person(1))] == [comparison.id]
        await delete_suite(store, caller, comparison.suite_id)
        assert await next_ticket(store, caller, comparison.id, person(1)) is None
        with pytest.raises(NotFound):
            await cast(store, caller, open_one.token, "left", 10)
        assert await waiting(store, caller, person(1)) == []
        counted = (await tally_votes(store, caller, comparison.id))[comparison.candidate_ids[0]]
        assert counted.tally.n_ballots == 3
        assert (await verify_votes(store, caller, comparison.id)).faults == ()

    here(body)


def test_a_comparison_waits_until_all_its_pairs_are_voted_on(here):
    async def body(store, caller):
        comparison = await votable(store, caller, count=3)
        assert [one.id for one in await waiting(store, caller, person(1))] == [comparison.id]
        await vote_all(store, caller, comparison, person(1), better)
        assert await waiting(store, caller, person(1)) == []
        assert [one.id for one in await waiting(store, caller, person(2))] == [comparison.id]

    here(body)
