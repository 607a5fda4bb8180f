"""The audit log: written with what it tells of, and every way to falsify it found as its docstring says."""

import asyncio
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, insert, select, update

from ropewalk.errors import VerificationFailed
from ropewalk.tenants import audit
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.tables import audit as table
from ropewalk.tenants.tables import chains

CALLER = Caller("org_1", "wrkspc_1", "key_1", "ann")
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


async def write(database, count):
    """Entries 2 to count + 1; the first is the default workspace's."""
    for number in range(count):
        async with database.writing() as connection:
            await audit.append(
                connection, CALLER, "file_uploaded", f"file_{number}", request_id="req_1", detail={"size": number}
            )


async def rewrite(database):
    """What somebody with all of the database can do: makes the chain whole again over what is there."""
    async with database.writing() as connection:
        rows = (await connection.execute(select(table).order_by(table.c.seq))).mappings().all()
        await connection.execute(delete(table))
        digest = audit.FIRST
        for number, row in enumerate(rows, 1):
            entry = {**row, "seq": number, "previous": digest}
            shown = {k: v.hex() if isinstance(v, bytes) else v for k, v in entry.items()} | {
                "detail": json.loads(row["detail"])
            }
            digest = audit.entry_digest(shown)
            await connection.execute(insert(table).values({**entry, "digest": digest}))
        await connection.execute(update(chains).where(chains.c.name == "audit").values(seq=len(rows), head=digest))


def test_an_untouched_log_verifies(tell):
    async def story(database, vault):
        await write(database, 5)
        return await audit.verify(database), await audit.entries(database, newest=True, limit=1)

    report, newest = tell(story)
    report.check()
    assert (report.entries, report.sequence, report.faults) == (6, 6, ())
    assert newest[0]["digest"] == report.head
    assert newest[0] | {"at": 0, "previous": "", "digest": ""} == {
        "seq": 6,
        "at": 0,
        "organization_id": "org_1",
        "workspace_id": "wrkspc_1",
        "key_id": "key_1",
        "user_id": "ann",
        "action": "file_uploaded",
        "subject": "file_4",
        "outcome": "ok",
        "request_id": "req_1",
        "detail": {"size": 4},
        "previous": "",
        "digest": "",
    }


def test_an_operation_that_is_undone_leaves_no_entry(tell):
    async def story(database, vault):
        async def undone():
            async with database.writing() as connection:
                await audit.append(connection, CALLER, "file_deleted", "file_1")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            await undone()
        return await audit.verify(database)

    assert tell(story).entries == 1


def test_entries_written_at_once_are_one_chain(tell):
    async def story(database, vault):
        await asyncio.gather(*(write(database, 5) for _ in range(6)))
        return await audit.verify(database)

    report = tell(story)
    assert (report.entries, report.faults) == (31, ())


def test_an_action_that_nobody_knows_is_our_own_mistake(tell):
    async def story(database, vault):
        async with database.writing() as connection:
            with pytest.raises(AssertionError):
                await audit.append(connection, CALLER, "file_renamed", "file_1")

    tell(story)


def change(seq, **values):
    async def tamper(connection):
        await connection.execute(update(table).where(table.c.seq == seq).values(values))

    return tamper


def remove(*seqs):
    async def tamper(connection):
        await connection.execute(delete(table).where(table.c.seq.in_(seqs)))

    return tamper


async def exchange(connection):
    """Entries 3 and 4 change places."""
    for old, new in ((3, -3), (4, 3), (-3, 4)):
        await connection.execute(update(table).where(table.c.seq == old).values(seq=new))


async def insert_one(connection):
    """An entry more, made from the last one, with the head left as it was."""
    last = (await connection.execute(select(table).where(table.c.seq == 6))).mappings().one()
    await connection.execute(insert(table).values({**last, "seq": 7}))


async def insert_in_the_middle(connection):
    """Entry 4 becomes 40 and another takes its place."""
    row = (await connection.execute(select(table).where(table.c.seq == 4))).mappings().one()
    await connection.execute(update(table).where(table.c.seq == 4).values(seq=40))
    await connection.execute(insert(table).values({**row, "subject": "file_other"}))


async def behead(connection):
    await connection.execute(delete(chains))


@pytest.mark.parametrize(
    ("tamper", "fault"),
    [
        (change(3, subject="file_9"), "entry 3 was changed"),
        (change(3, key_id=None), "entry 3 was changed"),
        (change(3, detail='{"size":99}'), "entry 3 was changed"),
        (change(3, at=1), "entry 3 was changed"),
        (change(3, digest=bytes(32)), "entry 3 was changed"),
        (change(3, previous=bytes(32)), "entry 3 does not follow entry 2"),
        (remove(3), "entries 3 to 3 are missing"),
        (remove(1, 2), "entries 1 to 2 are missing"),
        (exchange, "entry 3 does not follow entry 2"),
        (insert_in_the_middle, "entry 4 was changed"),
        (remove(6), "entries 6 to 6 are missing at the end"),
        (remove(4, 5, 6), "entries 4 to 6 are missing at the end"),
        (remove(1, 2, 3, 4, 5, 6), "entries 1 to 6 are missing at the end"),
        (behead, "the chain has no head"),
    ],
)
def test_what_was_done_to_a_log_is_found(tell, tamper, fault):
    async def story(database, vault):
        await write(database, 5)
        async with database.writing() as connection:
            await tamper(connection)
        return await audit.verify(database)

    report = tell(story)
    assert any(fault in found for found in report.faults), report.faults
    with pytest.raises(VerificationFailed, match="not what was written"):
        report.check()


def test_an_entry_after_the_head_breaks_the_next_true_one(tell):
    async def story(database, vault):
        await write(database, 5)
        async with database.writing() as connection:
            await insert_one(connection)
        with pytest.raises(Exception, match=r"(?i)unique"):
            await write(database, 1)

    tell(story)


def test_of_a_log_that_is_broken_everywhere_only_some_faults_are_told(tell):
    async def story(database, vault):
        await write(database, 40)
        async with database.writing() as connection:
            await connection.execute(update(table).values(at=1))
        return await audit.verify(database)

    assert len(tell(story).faults) == audit.FAULTS


def test_a_log_rewritten_or_cut_off_whole_is_found_beside_a_signed_head(tell):
    async def story(database, vault):
        await write(database, 5)
        heads = [await audit.signed_head(database, KEY)]
        await write(database, 2)
        heads.append(await audit.signed_head(database, KEY))
        clean = await audit.verify(database, heads, KEY.public_key())
        async with database.writing() as connection:
            await remove(7, 8)(connection)
        await rewrite(database)
        shorter = await audit.verify(database), await audit.verify(database, heads, KEY.public_key())
        async with database.writing() as connection:
            await change(3, subject="file_other")(connection)
        await rewrite(database)
        other = await audit.verify(database), await audit.verify(database, heads, KEY.public_key())
        return clean, shorter, other

    clean, shorter, other = tell(story)
    assert clean.faults == ()
    assert shorter[0].faults == ()  # nothing beside the database itself says otherwise
    assert [fault.partition(":")[0] for fault in shorter[1].faults] == ["entry 8 was signed as the log's head and is not there"]
    assert other[0].faults == ()
    assert other[1].faults[0] == "entry 6 is not the one whose digest was signed: the log was rewritten"


def test_heads_that_others_signed_or_that_contradict_each_other_are_refused(tell):
    async def story(database, vault):
        head = await audit.signed_head(database, KEY)
        with pytest.raises(VerificationFailed, match="the key at hand is"):
            await audit.verify(database, [head], OTHER_KEY.public_key())
        with pytest.raises(VerificationFailed, match="signature does not match"):
            await audit.verify(database, [{**head, "sequence": 9}], KEY.public_key())
        from ropewalk.tenants.signing import sign

        unsigned = {k: v for k, v in head.items() if k not in ("signature", "key_id")}
        two = [head, sign({**unsigned, "head": "00" * 32}, KEY)]
        with pytest.raises(VerificationFailed, match="two signed heads"):
            await audit.verify(database, two, KEY.public_key())

    tell(story)


def test_an_exported_log_is_checked_offline(tell):
    async def story(database, vault):
        await write(database, 5)
        return [line async for line in audit.export(database, KEY)]

    lines = json.loads(json.dumps(tell(story)))
    public = KEY.public_key()
    assert audit.verify_export(lines, public).faults == ()
    assert len(lines) == 7
    with pytest.raises(VerificationFailed, match="does not end with a signed head"):
        audit.verify_export(lines[:-1], public)
    assert audit.verify_export(lines[:2] + lines[3:], public).faults == ("entries 3 to 3 are missing",)
    assert audit.verify_export(lines[:5] + lines[6:], public).faults == ("entries 6 to 6 are missing at the end",)
    changed = [*lines[:3], {**lines[3], "user_id": "ben"}, *lines[4:]]
    assert audit.verify_export(changed, public).faults == ("entry 4 was changed",)
    assert "follows the signed head" in audit.verify_export([*lines, lines[0]], public).faults[0]
    with pytest.raises(VerificationFailed, match="the key at hand"):
        audit.verify_export(lines, OTHER_KEY.public_key())


def test_a_long_log_is_read_in_parts(tell, monkeypatch):
    monkeypatch.setattr(audit, "BATCH", 7)

    async def story(database, vault):
        await write(database, 20)
        return await audit.verify(database), [line async for line in audit.export(database, KEY)]

    report, lines = tell(story)
    assert (report.entries, report.faults) == (21, ())
    assert audit.verify_export(lines, KEY.public_key()).entries == 21


def test_entries_are_found_by_workspace_and_action(tell):
    async def story(database, vault):
        await write(database, 3)
        by_workspace = await audit.entries(database, workspace_id="wrkspc_1", newest=True)
        by_action = await audit.entries(database, action="workspace_created")
        return by_workspace, by_action

    by_workspace, by_action = tell(story)
    assert [entry["seq"] for entry in by_workspace] == [4, 3, 2]
    assert [entry["seq"] for entry in by_action] == [1]
