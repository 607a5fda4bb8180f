"""The door for code that does not await: bytes in, an id out, and a file object for the id, in any process."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from ropewalk.errors import DamagedContent, FileExpired, NotFound
from ropewalk.files.local import LocalFiles, is_id, old_files, open_local
from ropewalk.files.settings import Settings
from ropewalk.vault import CHUNK


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFiles:
    monkeypatch.setenv("ROPEWALK_HOME", str(tmp_path / "home"))
    return open_local()


@pytest.mark.parametrize("size", [0, 1, CHUNK, 2 * CHUNK + 5])
def test_bytes_come_back_under_their_id(files: LocalFiles, size: int) -> None:
    data = random.Random(size).randbytes(size)
    file = files.put(data, "data.bin")
    assert (file.filename, file.size, file.sha256) == ("data.bin", size, hashlib.sha256(data).hexdigest())
    assert files.show(file.id) == file
    with files.open(file.id) as opened:
        assert opened.read() == data


def test_an_opened_file_is_sought_and_read_like_one_of_the_disk(files: LocalFiles) -> None:
    data = random.Random(7).randbytes(2 * CHUNK + 1000)
    kept, plain = files.open(files.put(data, "data.bin").id), io.BytesIO(data)
    choose = random.Random(1)
    for _ in range(200):
        place, size = (
            choose.choice([(choose.randrange(len(data) + 10), 0), (-choose.randrange(1000), 2)]),
            choose.randrange(2000),
        )
        assert kept.seek(*place) == plain.seek(*place)
        assert kept.read(size) == plain.read(size)
        assert kept.tell() == plain.tell()
    kept.seek(0)
    plain.seek(0)
    assert kept.readlines() == plain.readlines()
    with pytest.raises(ValueError, match="-1"):
        kept.seek(-1)
    assert not kept.writable()


def test_a_path_is_put_under_its_own_name_and_gzip_reads_it(files: LocalFiles, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl.gz"
    source.write_bytes(gzip.compress(b"{}\n" * 1000))
    taken = list[int]()
    file = files.put(source, progress=taken.append)
    assert file.filename == "rows.jsonl.gz"
    assert sum(taken) == source.stat().st_size
    assert gzip.open(files.open(file.id)).read() == b"{}\n" * 1000  # noqa: SIM115


def test_what_is_not_there_is_not_found(files: LocalFiles, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="file_0000"):
        files.open("file_0000")
    with pytest.raises(NotFound, match="file_0000"):
        files.delete("file_0000")
    with pytest.raises(NotFound, match=r"rows\.jsonl"):
        files.put(tmp_path / "rows.jsonl")


def test_files_are_listed_newest_first_and_gone_after_deletion(files: LocalFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropewalk.files.local.PAGE", 2)
    put = [files.put(b"same", f"{number}.txt") for number in range(5)]
    assert files.list() == put[::-1]
    receipt = files.delete(put[0].id)
    assert (receipt.content, receipt.shared_with) == ("shared", 4)
    assert files.list() == put[:0:-1]
    with files.open(put[1].id) as opened:
        assert opened.read() == b"same"


def test_it_works_within_a_running_loop(files: LocalFiles) -> None:
    async def work() -> bytes:
        return files.open(files.put(b"within", "a.txt").id).read()

    assert asyncio.run(work()) == b"within"


def _read(id: str) -> bytes:
    return open_local().open(id).read()


def test_another_process_opens_a_file_by_its_id(files: LocalFiles) -> None:
    id = files.put(b"for all", "a.txt").id
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(_read, id).result() == b"for all"


def test_bytes_changed_on_the_disk_are_never_given_out(files: LocalFiles, tmp_path: Path) -> None:
    id = files.put(b"x" * (CHUNK + 10), "a.bin").id
    (blob,) = (path for path in (tmp_path / "home" / "files" / "blobs").rglob("*") if path.is_file())
    raw = bytearray(blob.read_bytes())
    raw[CHUNK + 20] ^= 1
    blob.write_bytes(raw)
    opened = files.open(id)
    assert opened.read(CHUNK) == b"x" * CHUNK
    with pytest.raises(DamagedContent):
        opened.read()


def test_an_expired_file_cannot_be_opened(files: LocalFiles) -> None:
    id = files.put(b"short-lived", "a.txt", expires_in=0).id
    assert files.show(id).expired
    with pytest.raises(FileExpired, match=id):
        files.open(id)


def test_a_registered_folder_dies_with_its_file(files: LocalFiles, tmp_path: Path) -> None:
    id = files.put(b"rows", "rows.txt").id
    folder, lone = tmp_path / "cache" / "made", tmp_path / "cache" / "lone.bin"
    files.register_path(id, "tokens", folder, lone, tmp_path / "never made")
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(b"made of rows")
    lone.write_bytes(b"made of rows")
    receipt = files.delete(id)
    assert receipt.derived == ("tokens",)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(NotFound):
        files.register_path(id, "tokens", folder)


def test_a_large_local_file_is_not_held_to_the_limit_of_the_server(tmp_path: Path) -> None:
    assert LocalFiles(Settings(data=tmp_path, max_file_bytes=3)).put(b"1234", "a.bin").size == 4


def test_ids_are_told_from_paths() -> None:
    assert is_id("file_hdldTspajIgzuEBUKZMKor9G")
    assert not is_id("file_rows.jsonl")
    assert not is_id("data/file_a")


def test_files_of_the_first_version_are_named_with_what_to_do(files: LocalFiles, tmp_path: Path) -> None:
    assert old_files(tmp_path / "home") is None
    records = tmp_path / "home" / "files" / "files"
    records.mkdir(parents=True)
    (records / "file_00.json").write_text("{}")
    assert "ropewalk files put" in str(old_files(tmp_path / "home"))
