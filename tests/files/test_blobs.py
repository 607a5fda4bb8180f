"""Blobs: the same promises in a folder and in a bucket."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ropewalk.errors import MissingExtra, OutputError
from ropewalk.files import buckets
from ropewalk.files.blobs import LocalBlobs, open_blobs

PIECE = 5000  # stands in for the bucket's 8 MiB, so that a few kilobytes are several pieces


@pytest.fixture(params=["folder", "bucket"])
def blobs(request, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "PIECE", PIECE)
    return open_blobs(tmp_path / "data" if request.param == "folder" else request.getfixturevalue("bucket_url"))


def publish(blobs, name, data, step=1000):
    staged = blobs.stage(f"up-{name}")
    for start in range(0, len(data), step):
        staged.write(data[start : start + step])
    staged.publish(name)


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7])
def test_what_was_published_is_read_back(blobs, size):
    data = os.urandom(size)
    publish(blobs, "ab.up_1", data, step=1700)
    assert blobs.read("ab.up_1", 0, size) == data
    assert blobs.size("ab.up_1") == size
    assert list(blobs.names()) == ["ab.up_1"]
    assert list(blobs.staged()) == []


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 1), (0, 0), (4999, 1), (4999, 2), (5000, 5000), (1, 14_998), (2500, 10_000), (14_999, 2), (15_000, 1), (40_000, 5)],
)
def test_a_range_is_exact_and_short_only_at_the_end(blobs, start, length):
    data = os.urandom(3 * PIECE)
    publish(blobs, "ab", data)
    assert blobs.read("ab", start, length) == data[start : start + length]


def test_a_write_may_be_larger_than_several_pieces(blobs):
    data = os.urandom(4 * PIECE + 3)
    publish(blobs, "ab", data, step=len(data))
    assert blobs.read("ab", 0, len(data)) == data


def test_staged_bytes_cannot_be_read_and_leave_nothing_when_discarded(blobs):
    staged = blobs.stage("up_1")
    staged.write(b"x" * (2 * PIECE + 1))
    assert list(blobs.names()) == []
    staged.discard()
    staged.discard()
    assert list(blobs.staged()) == []
    assert list(blobs.names()) == []


def test_discarding_after_publishing_keeps_what_was_published(blobs):
    staged = blobs.stage("up_1")
    staged.write(b"kept")
    staged.publish("ab")
    staged.discard()
    assert blobs.read("ab", 0, 4) == b"kept"


def test_staged_bytes_of_a_crash_are_listed_and_can_be_discarded(blobs):
    staged = blobs.stage("up_1")
    staged.write(b"x" * (3 * PIECE))
    wait_for_sending(staged)
    assert list(blobs.staged()) == ["up_1"]
    blobs.discard("up_1")
    blobs.discard("up_1")
    assert list(blobs.staged()) == []


def wait_for_sending(staged):
    for sent in getattr(staged, "flying", []):
        sent.result()


def test_an_absent_name_is_file_not_found(blobs):
    with pytest.raises(FileNotFoundError):
        blobs.read("absent", 0, 1)
    with pytest.raises(FileNotFoundError):
        blobs.size("absent")


def test_an_erased_name_is_gone_and_erasing_again_does_nothing(blobs):
    publish(blobs, "ab", b"x" * (PIECE + 1))
    publish(blobs, "ab.kept", b"y")
    blobs.erase("ab")
    blobs.erase("ab")
    blobs.erase("never")
    assert list(blobs.names()) == ["ab.kept"]
    with pytest.raises(FileNotFoundError):
        blobs.read("ab", 0, 1)


def test_a_name_cannot_lead_out_of_the_place(blobs):
    for name in ("..", "../x", "a/b", "", ".hidden", "A"):
        with pytest.raises(AssertionError):
            blobs.read(name, 0, 1)
        with pytest.raises(AssertionError):
            blobs.erase(name)


def test_parallel_uploads_do_not_meet(blobs):
    contents = {f"{n:02x}.up": os.urandom(PIECE + 100 * n) for n in range(16)}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda item: publish(blobs, *item), contents.items()))
    assert {name: blobs.read(name, 0, 1 << 20) for name in blobs.names()} == contents


def test_a_writable_place_passes_the_check_and_shows_nothing_of_it(blobs):
    blobs.check()
    assert list(blobs.names()) == list(blobs.staged()) == []


def test_two_openings_of_a_place_see_the_same(blobs, tmp_path, request):
    publish(blobs, "ab", b"here")
    again = LocalBlobs(tmp_path / "data") if isinstance(blobs, LocalBlobs) else open_blobs(blobs.url)
    assert again.read("ab", 0, 9) == b"here"


def test_a_full_disk_is_an_error_that_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    blobs = LocalBlobs(tmp_path / "data")
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data) if len(data) < 100 else no_space())
    staged = blobs.stage("up_1")
    staged.write(b"small")
    with pytest.raises(OutputError, match="No space left on device; free space"):
        staged.write(b"x" * 1000)
    staged.discard()
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path, monkeypatch):
    blobs, real = LocalBlobs(tmp_path), os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    publish(blobs, "ab", bytes(range(100)))
    assert blobs.read("ab", 0, 100) == bytes(range(100))


def test_the_folders_are_for_their_owner_alone(tmp_path):
    publish(LocalBlobs(tmp_path / "data"), "ab", b"x")
    modes = {path: path.stat().st_mode & 0o077 for path in (tmp_path / "data").rglob("*")}
    assert set(modes.values()) == {0}


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write in"):
        LocalBlobs(tmp_path / "file" / "inner")


def test_a_bucket_that_does_not_exist_is_refused_by_its_address(bucket_url):
    blobs = open_blobs("s3://nowhere/x")
    with pytest.raises(OutputError, match="the bucket s3://nowhere/x refused"):
        blobs.check()
    with pytest.raises(OutputError, match="the bucket s3://nowhere/x refused"):
        list(blobs.names())
    staged = blobs.stage("up_1")
    staged.write(b"x")
    with pytest.raises(OutputError):
        staged.publish("ab")
    staged.discard()


def test_an_address_of_no_known_kind_is_refused():
    with pytest.raises(OutputError, match="ftp://host/x"):
        open_blobs("ftp://host/x")


def test_a_bucket_half_published_by_a_crash_is_listed_and_erased(bucket_url):
    code = f"""
import os
os.environ["ROPEWALK_FAILPOINT"] = "blob.copied:2"
from ropewalk.files import buckets
buckets.PIECE = {PIECE}
staged = buckets.BucketBlobs({bucket_url!r}).stage("up_1")
staged.write(bytes({4 * PIECE}))
staged.publish("ab.up_1")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    blobs = open_blobs(bucket_url)
    assert list(blobs.staged()) == ["up_1"]
    assert list(blobs.names()) == ["ab.up_1"]
    blobs.discard("up_1")
    blobs.erase("ab.up_1")
    assert list(blobs.staged()) == list(blobs.names()) == []


def test_one_piece_is_published_by_one_request(bucket_url, monkeypatch):
    blobs, asked = open_blobs(bucket_url), []
    for verb in ("put", "copy", "delete", "list", "get_range"):
        real = getattr(blobs.client, verb)
        monkeypatch.setattr(
            blobs.client, verb, lambda *args, real=real, verb=verb, **kw: asked.append(verb) or real(*args, **kw)
        )
    publish(blobs, "ab", b"small")
    assert asked == ["put"]


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtra, match=r"ropewalk\[buckets\]"):
        open_blobs("s3://bucket/x")
