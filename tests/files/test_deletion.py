"""After DELETE and the sweep, nothing of a file is anywhere: not its bytes, its text, its name, nor the key that opened it."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text

from ropewalk.database import metadata
from ropewalk.errors import NotFound, VerificationFailed
from ropewalk.files import receipts
from ropewalk.files.documents import document
from ropewalk.files.integrity import verify
from ropewalk.files.lifecycle import sweep
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store
from ropewalk.files.tables import blobs
from ropewalk.vault import CHUNK

_spec = importlib.util.spec_from_file_location("papers", Path(__file__).with_name("papers.py"))
papers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(papers)

PLAIN, PACKED, NAMED = "canary-in-a-plain-stream", "canary-in-a-packed-stream", "canary-in-the-name"


def pdf() -> bytes:
    """Two pages: the text of one in a plain stream, that of the other deflated."""

    def page(words: str) -> bytes:
        return f"BT /F1 18 Tf 40 100 Td ({words}) Tj ET".encode()

    leaf = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 200] /Contents %d 0 R /Resources << /Font << /F1 7 0 R >> >> >>"
    return papers.written(
        {
            1: b"<< /Type /Catalog /Pages 2 0 R >>",
            2: b"<< /Type /Pages /Kids [3 0 R 4 0 R] /Count 2 >>",
            3: leaf % 5,
            4: leaf % 6,
            5: papers.stream(page(PLAIN)),
            6: papers.stream(zlib.compress(page(PACKED)), b"/Filter /FlateDecode"),
            7: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        }
    )


def traces(store: Store, needles: dict[str, bytes]) -> set[str]:
    """Which of the needles are anywhere: in any byte of the data folder, in any stored bytes, in any value of the database."""
    found = set[str]()
    for haystack in _everything(store):
        found |= {name for name, needle in needles.items() if needle in haystack}
    return found


def _everything(store: Store) -> Iterator[bytes]:
    for path in store.settings.data.rglob("*"):  # SQLite's file, its log and its free pages; the blobs; the caches
        yield str(path).encode()
        if path.is_file():
            yield path.read_bytes()
    for name in [*store.blobs.names(), *store.blobs.staged()]:
        yield name.encode()
        yield store.blobs.read(name, 0, 1 << 30)


async def rows(store: Store) -> bytes:
    """Every value of every table."""
    out = b""
    async with store.database.reading() as connection:
        for table in metadata.sorted_tables:
            for row in await connection.execute(text(f'SELECT * FROM "{table.name}"')):
                out += b" ".join(value if isinstance(value, bytes) else str(value).encode() for value in row)
    return out


def needles_of(data: bytes, wrapped: bytes) -> dict[str, bytes]:
    return {
        "plain stream": PLAIN.encode(),
        "packed stream": PACKED.encode(),
        "text in UTF-16": PACKED.encode("utf-16-le"),
        "file's bytes": data[-300:],
        "packed bytes": zlib.compress(f"BT /F1 18 Tf 40 100 Td ({PACKED}) Tj ET".encode()),
        "name": NAMED.encode(),
        "wrapped data key": wrapped,
    }


async def wrapped_key(store: Store, blob_id: str | None) -> bytes:
    async with store.database.reading() as connection:
        return (await connection.execute(select(blobs.c.sealed_key).where(blobs.c.id == blob_id))).scalar_one()


def test_a_canary_in_a_pdf_is_found_nowhere_after_deletion(opened: Callable, tmp_path: Path) -> None:
    async def body(store, caller):
        data = pdf()
        file = await store.put(caller, data, f"{NAMED}.pdf", tags=[NAMED])
        other = await store.put(caller, b"another file stays", "other.txt")
        read = await document(store, caller, file.id)
        assert PLAIN in read.text, "the document must have been read, or there is nothing to erase"
        assert PACKED in read.text
        cache = tmp_path / "data" / "cache" / "tokens"
        await store.register_path(file.id, "tokens", cache)
        cache.mkdir(parents=True)
        (cache / "tokens.bin").write_text(read.text)

        needles = needles_of(data, await wrapped_key(store, file.blob_id))
        here = store.database.dialect == "sqlite"
        before = traces(store, needles)
        assert before >= {"plain stream", "packed stream"}, "the search must be able to find what is there"
        assert not here or before >= {"name", "wrapped data key"}
        assert NAMED.encode() in await rows(store)

        receipt = await store.delete(caller, file.id)
        with pytest.raises(NotFound):
            await store.open_content(caller, file.id)
        await sweep(store)
        assert traces(store, needles) == set()
        left = await rows(store)
        assert [name for name, needle in needles.items() if needle in left] == []
        assert receipt.as_json().encode() in left
        assert file.id not in receipt.as_json(), "the log of receipts names files by the digest of their ids"

        assert receipt.is_of(file.id)
        assert (receipt.content, receipt.derived, receipt.sha256) == ("erased", ("text", "tokens"), file.sha256)
        public = store.signing_key.public_key()
        assert receipts.verify(receipt.as_dict(), public) == receipt
        for name in receipt.as_dict():
            with pytest.raises(VerificationFailed):
                receipts.verify({**receipt.as_dict(), name: "changed"}, public)
        assert await (await store.open_content(caller, other.id)).read() == b"another file stays"
        assert (await verify(store)).whole

    opened(body)


def test_shared_bytes_stay_until_the_last_file_that_holds_them(opened: Callable) -> None:
    async def body(store, caller):
        data = pdf() + random.Random(2).randbytes(2 * CHUNK)
        first, second = await store.put(caller, data, "a.pdf"), await store.put(caller, data, "b.pdf")
        assert first.blob_id == second.blob_id
        wrapped = await wrapped_key(store, first.blob_id)
        await document(store, caller, first.id)
        receipt = await store.delete(caller, first.id)
        await sweep(store)
        assert (receipt.content, receipt.shared_with, receipt.derived) == ("shared", 1, ())
        assert await (await store.open_content(caller, second.id)).read() == data
        assert PACKED in (await document(store, caller, second.id)).text
        last = await store.delete(caller, second.id)
        await sweep(store)
        assert (last.content, last.shared_with, last.derived) == ("erased", 0, ("text",))
        assert last.previous == receipt.digest()
        assert list(store.blobs.names()) == []
        assert traces(store, needles_of(data, wrapped)) == set()

    opened(body)


def test_an_erasure_that_was_cut_short_is_done_by_the_sweep(opened: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(store, caller):
        file = await store.put(caller, b"cannot be erased yet", "a.txt")
        with monkeypatch.context() as patch:
            patch.setattr(store.blobs, "erase", lambda name: (_ for _ in ()).throw(OSError("the bucket is away")))
            receipt = await store.delete(caller, file.id)
        assert receipt.content == "erased"
        assert list(store.blobs.names()) == [file.blob_id], "the sealed bytes are there; the key that opens them is not"
        with pytest.raises(NotFound):
            await store.open_content(caller, file.id)
        assert (await sweep(store)).erased == 1
        assert list(store.blobs.names()) == []
        assert (await sweep(store)).erased == 0

    opened(body)


def test_what_was_made_on_another_machine_waits_for_its_own_sweep(
    opened: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(store, caller):
        made = tmp_path / "made"
        with monkeypatch.context() as patch:
            patch.setattr("platform.node", lambda: "trainer")
            file = await store.put(caller, b"rows", "a.txt")
            await store.register_path(file.id, "tokens", made)
        await store.delete(caller, file.id)  # by a server that does not see the trainer's disk
        assert (await sweep(store)).erased == 0
        made.mkdir()
        (made / "tokens.bin").write_bytes(b"rows")
        with monkeypatch.context() as patch:
            patch.setattr("platform.node", lambda: "trainer")
            assert (await sweep(store)).erased == 1
            assert not made.exists()
            assert (await sweep(store)).erased == 0

    opened(body)


def test_two_deletions_at_once_give_one_receipt(opened: Callable) -> None:
    async def body(store, caller):
        file = await store.put(caller, b"once", "a.txt")
        done = await asyncio.gather(*(store.delete(caller, file.id) for _ in range(4)), return_exceptions=True)
        assert sorted(type(one).__name__ for one in done) == ["NotFound", "NotFound", "NotFound", "Receipt"]
        assert (await verify(store)).receipts == 1

    opened(body)


@pytest.mark.parametrize("deleted", [False, True])
def test_what_is_made_by_several_at_once_is_one_and_dies_with_the_file(opened: Callable, tmp_path: Path, deleted: bool) -> None:
    async def body(store, caller):
        file = await store.put(caller, b"read by all at once", "a.txt")
        made = [store.keep_derived(file, "text", "", b"%d" % number) for number in range(4)]
        made += [store.register_path(file.id, "tokens", tmp_path / "made") for _ in range(2)]
        if deleted:
            made.insert(3, store.delete(caller, file.id))
        done = await asyncio.gather(*made, return_exceptions=True)
        assert {type(one) for one in done} <= {type(None), receipts.Receipt, NotFound}
        await sweep(store)
        assert len(list(store.blobs.names())) == (0 if deleted else 2)
        if not deleted:
            assert await store.derived(file, "text", "") in (b"0", b"1", b"2", b"3")
            assert (await store.delete(caller, file.id)).derived == ("text", "tokens")
        assert list(store.blobs.names()) == []

    opened(body)


def test_a_receipt_taken_out_of_the_log_is_told(opened: Callable) -> None:
    async def body(store, caller):
        for number in range(3):
            await store.delete(caller, (await store.put(caller, b"%d" % number, "a.txt")).id)
        assert (await verify(store)).whole
        for seq, said in ((3, "cut off after receipt 2"), (1, "does not follow")):
            async with store.database.writing() as connection:
                await connection.execute(text(f"DELETE FROM deletions WHERE seq = {seq}"))
            assert said in (await verify(store)).faults[0]

    opened(body)


def test_a_file_in_one_workspace_leaves_equal_bytes_in_another(settings: Settings) -> None:
    from ropewalk.tenants.workspaces import create_workspace

    async def body() -> None:
        store = await Store.open(settings)
        try:
            await create_workspace(store.database, store.vault, "other")
            here, there = await store.local_caller(), await store.local_caller("other")
            first, second = await store.put(here, b"equal", "a.txt"), await store.put(there, b"equal", "a.txt")
            assert first.blob_id != second.blob_id
            assert (await store.delete(here, first.id)).content == "erased"
            assert await (await store.open_content(there, second.id)).read() == b"equal"
        finally:
            await store.close()

    asyncio.run(body())
