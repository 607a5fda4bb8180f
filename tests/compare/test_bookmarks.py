"""Bookmarks: each person's own, of what they can see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compare.votable import candidate, keyed
from ropewalk.compare import bookmarks
from ropewalk.compare.bookmarks import add_bookmark, is_bookmarked, list_bookmarks, remove_bookmark
from ropewalk.compare.records import create
from ropewalk.compare.suites import add_suite
from ropewalk.errors import BadInput, NotFound, PermissionDenied
from ropewalk.tenants.workspaces import create_workspace


async def things(store, caller):
    """A candidate and a comparison."""
    first, second = [await candidate(store, caller, name) for name in ("rope-seven", "hemp-nine")]
    suite = await add_suite(store, caller, b'{"prompt": "Why?"}', hold=0)
    return first, (await create(store, caller, baseline_id=first, candidate_ids=[second], suite_id=suite.id, title="Which?")).id


def test_each_person_has_their_own_the_last_added_first(opened):
    async def body(store, caller):
        one, comparison = await things(store, caller)
        ann, ben = keyed(caller, "key_ann"), keyed(caller, "key_ben")
        for target in (one, comparison, one):
            await add_bookmark(store, ann, target)
        found = await list_bookmarks(store, ann)
        assert [(mark.target, mark.kind, mark.title) for mark in found] == [
            (comparison, "comparison", "Which?"),
            (one, "candidate", "rope-seven"),
        ]
        assert found[0].created_at > found[1].created_at
        assert await list_bookmarks(store, ben) == await list_bookmarks(store, caller) == []
        assert await is_bookmarked(store, ann, one)
        assert not await is_bookmarked(store, ben, one)
        for _ in range(2):
            await remove_bookmark(store, ann, one)
        assert [mark.target for mark in await list_bookmarks(store, ann)] == [comparison]

    opened(body)


def test_what_cannot_be_seen_cannot_be_kept_in_sight(opened):
    async def body(store, caller):
        one, comparison = await things(store, caller)
        elsewhere = replace(caller, workspace_id=(await create_workspace(store.database, store.vault, "other")).id)
        for asker in (elsewhere, replace(caller, user_id="ann")):
            for target in (one, comparison, "cand_nothing", "cmp_nothing", "nothing", ""):
                with pytest.raises(NotFound):
                    await add_bookmark(store, asker, target)
        with pytest.raises(PermissionDenied):
            await list_bookmarks(store, replace(caller, rights=frozenset({"vote"})))

    opened(body)


def test_there_is_an_end_to_how_many(opened, monkeypatch):
    monkeypatch.setattr(bookmarks, "MOST", 1)

    async def body(store, caller):
        one, comparison = await things(store, caller)
        await add_bookmark(store, caller, one)
        with pytest.raises(BadInput, match="remove one"):
            await add_bookmark(store, caller, comparison)
        assert len(await list_bookmarks(store, caller)) == 1

    opened(body)
