"""Candidates: what is served, as it was when it was added, and cards, of which only words are known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import insert, select

from compare.page_text import render
from ropewalk.compare.candidates import (
    add_candidate,
    add_cards,
    card_claims,
    current_digest,
    get_candidate,
    link,
    list_candidates,
    measure_claim,
    twin,
)
from ropewalk.compare.cards import Card, Page, WarningKind
from ropewalk.compare.claims import ClaimStatus
from ropewalk.compare.page_text import read_page
from ropewalk.compare.provenance import Lineage, family
from ropewalk.compare.tables import fingerprints, measurements
from ropewalk.compare.tables import lineage as lineage_rows
from ropewalk.config.serving import Remote, ServedModel, Serving
from ropewalk.database import now
from ropewalk.engine.models import Models
from ropewalk.errors import BadInput, CardError, NotFound, PermissionDenied
from ropewalk.registry import Registry
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.workspaces import create_workspace

PAGES = Path(__file__).parent / "pages"
only_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


@pytest.fixture
def served(tmp_path, tokenizer_folder):
    """A registry with a base and two adapters over it, which nothing has to be loaded for."""
    base = tmp_path / "base"
    shutil.copytree(tokenizer_folder, base)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}))
    save_file({"w": np.arange(600, dtype=np.float32)}, base / "model.safetensors")
    registry = Registry(tmp_path / "registry")
    registry.publish_base("tiny", base)
    for number, name in enumerate(("house", "other"), 1):
        adapter(tmp_path / name / "adapter", number)
        registry.publish_adapter(name, tmp_path / name / "adapter", "tiny", {"file": f"file_a{number}"})
    registry.ship("answers", "house")
    return registry


def beside(card):
    """The text of a page with a card and a plain one."""
    return render(
        Page(f"{card.name} vs Plain", None, (card, Card("Plain", "Tools", "Is there", "It works.", "Free", "Open Source")))
    )


def adapter(folder, seed):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": np.full(9, seed, dtype=np.float32)}, folder / "adapter_model.safetensors")


def with_models(opened, registry, body, serving=None):
    async def whole(store, caller):
        models = Models(store, registry, serving)
        try:
            await body(store, caller, models)
        finally:
            await models.close()

    opened(whole)


def test_what_is_served_becomes_a_candidate_once(opened, served):
    async def body(store, caller, models):
        base, house, other, answers = [
            await add_candidate(store, models, caller, name) for name in ("tiny", "house", "other", "answers")
        ]
        assert [one.kind for one in (base, house, other, answers)] == ["base", "adapter", "adapter", "alias"]
        assert {one.family for one in (base, house, other, answers)} == {"qwen"}
        assert (answers.name, answers.target, answers.digest) == ("answers", "answers", house.digest)
        assert len({base.digest, house.digest, other.digest}) == 3
        assert base.template_digest == house.template_digest != ""
        assert house.lineage == Lineage(train_data=("file_a1",))
        assert base.runs
        assert await add_candidate(store, models, caller, "house") == house
        assert await get_candidate(store, caller, house.id) == house
        assert [one.id for one in await list_candidates(store, caller)] == [one.id for one in (answers, other, house, base)]
        assert await list_candidates(store, caller, limit=1, after=other.id) == [house]
        with pytest.raises(NotFound, match="model: nobody"):
            await add_candidate(store, models, caller, "nobody")
        with pytest.raises(PermissionDenied):
            await add_candidate(store, models, replace(caller, rights=frozenset({"read"})), "tiny")

    with_models(opened, served, body)


@only_sqlite
def test_other_weights_under_the_same_name_are_another_candidate(opened, served, tmp_path):
    async def body(store, caller, models):
        before = await add_candidate(store, models, caller, "house")
        assert await current_digest(store, models, caller, "house") == before.digest
        adapter(tmp_path / "house" / "adapter", 7)
        after = await add_candidate(store, models, caller, "house")
        assert after.id != before.id
        assert await current_digest(store, models, caller, "house") == after.digest != before.digest
        alias = await add_candidate(store, models, caller, "answers")
        served.ship("answers", "other")
        assert await current_digest(store, models, caller, "answers") != alias.digest
        assert (await get_candidate(store, caller, before.id)).digest == before.digest

    with_models(opened, served, body)


@only_sqlite
def test_lineage_comes_from_registry_run_and_files(opened, served, tmp_path):
    run = tmp_path / "run"
    adapter(run / "adapter", 3)
    record = {
        "config": {"datasets": [{"path": "file_b1"}, {"path": "org/set"}], "reward_model": "judge-7b"},
        "lineage": {"teacher": ["big", "bigger"]},
    }
    (run / "run.json").write_text(json.dumps(record))

    async def body(store, caller, models):
        file = await store.put(caller, b"{}", "train.jsonl", tags=("generator:big-model",))
        told = {"file": f"{file.id} file_b2", "data_generator": "gpt-x=0.62, other", "run": str(run)}
        served.publish_adapter("tuned", run / "adapter", "tiny", told)
        tuned = await add_candidate(store, models, caller, "tuned")
        assert set(tuned.lineage.train_data) == {file.id, "file_b1", "file_b2", "org/set"}
        assert set(tuned.lineage.data_generator) == {"gpt-x", "other", "big-model"}
        assert tuned.lineage.shares == {"gpt-x": 0.62}
        assert tuned.lineage.reward_model == ("judge-7b",)
        assert set(tuned.lineage.teacher) == {"big", "bigger"}
        served.publish_adapter("tuned", run / "adapter", "tiny", {"reward_model": "late"})  # known better by now
        again = await add_candidate(store, models, caller, "tuned")
        assert (again.id, set(again.lineage.reward_model)) == (tuned.id, {"judge-7b", "late"})

    with_models(opened, served, body)


@only_sqlite
def test_a_serving_file_names_folders_and_remotes(opened, served, tmp_path):
    models = {
        "direct": ServedModel(base=str(tmp_path / "base"), adapter=str(tmp_path / "house" / "adapter")),
        "far": ServedModel(remote=Remote("openai", "http://127.0.0.1:9", "meta-llama/Llama-3.1-8B")),
        "farther": ServedModel(remote=Remote("openai", "http://127.0.0.1:9", "gpt-5")),
    }

    async def body(store, caller, models):
        direct, far, farther = [await add_candidate(store, models, caller, name) for name in ("direct", "far", "farther")]
        assert (direct.kind, direct.lineage.train_data) == ("adapter", ("file_a1",))  # which the registry knows by its folder
        assert (far.kind, far.family, far.template_digest) == ("remote", "llama", "")
        assert farther.digest != far.digest
        with pytest.raises(NotFound):
            await add_candidate(store, models, caller, "house")  # published, and not served

    with_models(opened, served, body, Serving(models=models))


@pytest.mark.parametrize(
    ("name", "kin"),
    [
        ("qwen3_moe", "qwen"),
        ("Qwen/Qwen3-8B", "qwen"),
        ("meta-llama/Llama-3.1-8B", "llama"),
        ("gemma3_text", "gemma"),
        ("o3-mini", "gpt"),
        ("gpt-4.1", "gpt"),
        ("claude-sonnet-5", "claude"),
        ("Mixtral-8x7B", "mistral"),
        ("olmo2", "olmo"),
        ("7b", "7b"),
    ],
)
def test_a_family_is_the_first_word_of_a_name(name, kin):
    assert family(name) == kin


@only_sqlite
def test_a_twin_is_the_same_weights_under_another_id(opened, served):
    async def body(store, caller, models):
        house = await add_candidate(store, models, caller, "house")
        again = await twin(store, caller, house.id)
        assert (again.digest, again.target, again.lineage) == (house.digest, "house", house.lineage)
        assert (again.name, again.id == house.id) == ("house (again)", False)
        assert (await add_candidate(store, models, caller, "house")).id == house.id

    with_models(opened, served, body)


# -- cards


def test_a_page_of_two_tools_becomes_two_cards_with_all_they_say(opened):
    text = (PAGES / "two_tools.txt").read_text(encoding="utf-8")
    page = read_page(text, source_url="https://example.org/compare/a-vs-b", source_date="2026-11-22")

    async def body(store, caller):
        found = await add_cards(store, caller, text, "https://example.org/compare/a-vs-b", "2026-11-22")
        assert [one.card for one in found] == list(page.cards)
        assert [(one.kind, one.name, one.target, one.runs) for one in found] == [
            ("card", card.name, "", False) for card in page.cards
        ]
        for one, card in zip(found, page.cards):
            stated = await card_claims(store, caller, one.id)
            assert tuple(claim.claim for claim in stated) == card.claims
            assert {claim.status for claim in stated} <= {ClaimStatus.UNTESTED}
        assert sum(len(card.claims) for card in page.cards) > 0
        assert [one.id for one in await add_cards(store, caller, text)] == [one.id for one in found]  # nothing twice

    opened(body)


@only_sqlite
def test_two_cards_of_one_tool_that_differ_warn_of_each_other(opened):
    def page(label):
        return beside(Card("Claw Code", "Agents", "Codes", "It is 12x faster.", label, "$5 a month"))

    async def body(store, caller):
        free, plain = await add_cards(store, caller, page("Free"))
        assert not [note for note in free.card.warnings if note.kind is WarningKind.DUPLICATE]
        paid, same = await add_cards(store, caller, page("Paid"))
        assert (paid.id == free.id, same.id == plain.id) == (False, True)
        for one in (paid, await get_candidate(store, caller, free.id)):
            [note] = [note for note in one.card.warnings if note.kind is WarningKind.DUPLICATE]
            assert "'Free' and 'Paid'" in note.text
        assert [one.id for one in await add_cards(store, caller, page("Free"))] == [free.id, plain.id]
        other = replace(caller, workspace_id=(await create_workspace(store.database, store.vault, "other")).id)
        theirs, _ = await add_cards(store, other, page("Paid"))  # who has not seen the first
        assert not [note for note in theirs.card.warnings if note.kind is WarningKind.DUPLICATE]

    opened(body)


@only_sqlite
def test_a_text_that_is_no_page_is_refused_and_leaves_nothing(opened):
    async def body(store, caller):
        with pytest.raises(CardError):
            await add_cards(store, caller, "")
        assert await list_candidates(store, caller) == []
        found = await add_cards(store, caller, (PAGES / "hostile.txt").read_bytes())
        assert found
        assert await list_candidates(store, caller) == found[::-1]

    opened(body)


async def measured(store, caller, candidate, id="m_1"):
    row = {
        "device": "cpu",
        "driver": "",
        "versions": "{}",
        "dtype": "float32",
        "commit": "",
        "detail": "{}",
        "created_at": now(),
    }
    figure = {
        "metric": "speed",
        "value": 2.3,
        "n": 5,
        "unit": "x",
        "concurrency": 1,
        "fingerprint_id": f"fp_{id}",
        "detail": "",
    }
    async with store.database.writing() as connection:
        await connection.execute(insert(fingerprints).values(id=f"fp_{id}", **row))
        owner = {"workspace_id": caller.workspace_id, "candidate_id": candidate.id, "created_at": now()}
        await connection.execute(insert(measurements).values(id=id, **owner, **figure))
    return id


def test_a_link_makes_claims_testable(opened, served):
    card = Card("Tool", "Training", "Fast", "It is 15x faster.", "Free", "Open Source")

    async def body(store, caller, models):
        tool, _ = await add_cards(store, caller, beside(card))
        house, other = [await add_candidate(store, models, caller, name) for name in ("house", "other")]
        [claim] = await card_claims(store, caller, tool.id)
        assert (claim.claim.value, claim.status) == (15, ClaimStatus.UNTESTED)
        figure = await measured(store, caller, house)
        with pytest.raises(BadInput, match="no measurement of what the card is linked to"):
            await measure_claim(store, caller, claim.id, figure, 2.0, 2.6)
        assert (await link(store, caller, tool.id, house.id)).linked_to == house.id
        tested = await measure_claim(store, caller, claim.id, figure, 2.0, 2.6)
        assert (tested.status, tested.measurement_id, tested.low, tested.high) == (ClaimStatus.CONTRADICTED, figure, 2.0, 2.6)
        assert [tested] == await card_claims(store, caller, tool.id)
        assert (await measure_claim(store, caller, claim.id, figure, 14.0, 16.0)).status is ClaimStatus.CONFIRMED
        await link(store, caller, tool.id, house.id)
        assert (await card_claims(store, caller, tool.id))[0].status is ClaimStatus.CONFIRMED
        await link(store, caller, tool.id, other.id)  # of another, nothing was measured yet
        [fresh] = await card_claims(store, caller, tool.id)
        assert (fresh.status, fresh.measurement_id, fresh.tested_at) == (ClaimStatus.UNTESTED, None, None)
        with pytest.raises(BadInput, match="is no card but an adapter"):
            await link(store, caller, house.id, other.id)
        with pytest.raises(BadInput, match="is a card too"):
            await link(store, caller, tool.id, tool.id)
        with pytest.raises(NotFound):
            await measure_claim(store, caller, "claim_none", figure, 1, 2)
        with pytest.raises(BadInput, match="is a card"):
            await twin(store, caller, tool.id)

    with_models(opened, served, body)


def test_another_workspace_and_another_user_find_no_candidate(opened, served):
    async def body(store, caller, models):
        other = await create_workspace(store.database, store.vault, "other")
        stranger, user = Caller(caller.organization_id, other.id, None), replace(caller, user_id="u1")
        house = await add_candidate(store, models, user, "house")
        assert [one.id for one in await list_candidates(store, caller)] == [house.id]
        for who in (stranger, replace(caller, user_id="u2")):
            assert await list_candidates(store, who) == []
            for id in (house.id, "cand_none", "a\0b", "ü"):
                with pytest.raises(NotFound, match="Candidate"):
                    await get_candidate(store, who, id)
            assert (await add_candidate(store, models, who, "house")).id != house.id
        async with store.database.reading() as connection:
            assert len((await connection.execute(select(lineage_rows))).all()) == 3

    with_models(opened, served, body)
