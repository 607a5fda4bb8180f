"""What is durable before an acknowledgement, read from the system calls of a process that uploads and deletes a file."""

import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace: apt-get install strace")

CALLS = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,openat"
SCRIPT = """
import asyncio, os, sys
from pathlib import Path
from ropewalk.files.settings import Settings
from ropewalk.files.store import Store

async def main():
    store = await Store.open(Settings(data=Path(sys.argv[1])))
    caller = await store.local_caller()
    os.write(1, b"BEGUN")
    file = await store.put(caller, os.urandom(3_000_000), "x.bin")
    os.write(1, b"UPLOADED")
    await store.delete(caller, file.id)
    os.write(1, b"DELETED")
    await store.close()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def every_call(tmp_path_factory):
    """Every traced call as one line, with descriptors shown as paths."""
    folder = tmp_path_factory.mktemp("strace")
    (folder / "script.py").write_text(SCRIPT)
    environment = {"ROPEWALK_ROOT_KEY": "A" * 43 + "=", "PATH": "/usr/bin:/bin"}
    traced = ["strace", "-f", "-y", "-s", "16", "-e", f"trace={CALLS}", "-o", folder / "trace"]
    done = subprocess.run(
        [*traced, sys.executable, folder / "script.py", folder / "data"], env=environment, capture_output=True
    )
    if b"Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr.decode()
    return joined((folder / "trace").read_text().splitlines())


@pytest.fixture(scope="module")
def calls(every_call):
    """Those from the start of the upload."""
    return every_call[next(i for i, line in enumerate(every_call) if "BEGUN" in line) :]


def joined(lines):
    """A call that another thread's interrupted counts when it has returned, and shows its arguments."""
    begun, whole = {}, []
    for line in lines:
        thread, _, call = line.partition(" ")
        if "<unfinished ...>" in call:
            begun[thread] = call.replace("<unfinished ...>", "")
        elif match := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", call):
            whole.append(begun.pop(thread).strip() + match[1])
        else:
            whole.append(call.strip())
    return whole


def positions(calls, pattern):
    return [i for i, call in enumerate(calls) if re.search(pattern, call)]


def test_an_upload_is_on_the_disk_before_its_row_and_its_row_before_the_answer(calls):
    written = positions(calls, r"^write\(\d+<[^>]*/incoming/\w+>")
    synced = positions(calls, r"^fsync\(\d+<[^>]*/incoming/\w+>")
    renamed = positions(calls, r"^rename\w*\(.*/incoming/\w+\", .*/blobs/\w\w/\w+\"")
    placed = positions(calls, r"^fsync\(\d+<[^>]*/blobs/\w\w>")
    recorded = [i for i in positions(calls, r"^pwrite64\(\d+<[^>]*ropewalk\.db-wal>") if i > placed[0]]
    durable = [i for i in positions(calls, r"^f(data)?sync\(\d+<[^>]*ropewalk\.db-wal>") if i > recorded[0]]
    answered = positions(calls, "UPLOADED")
    assert len(written) >= 3  # 3,000,000 bytes are three chunks
    assert [len(synced), len(renamed)] == [1, 1]
    order = [max(written), synced[0], renamed[0], placed[0], recorded[0], durable[0], answered[0]]
    assert order == sorted(order), [calls[i] for i in order]


def test_every_name_on_the_way_to_the_bytes_and_rows_is_on_the_disk_before_the_answer(every_call):
    """A synced file whose name, or whose folder's name, is lost with the power is lost as well."""
    answered = positions(every_call, "UPLOADED")[0]
    renamed = (re.search(r"^rename\w*\(.*\"([^\"]*/blobs/\w\w/\w+)\"", call) for call in every_call)
    placed = next(found[1] for found in renamed if found)
    data = placed.partition("/files/blobs/")[0]
    names = [data, f"{data}/ropewalk.db", f"{data}/ropewalk.db-wal", f"{data}/files", f"{data}/files/blobs"]
    for name in [*names, placed.rpartition("/")[0]]:
        created = positions(every_call, rf"^(mkdir\w*\(.*\"{name}\"|openat\(.*\"{name}\", .*O_CREAT)")
        parent = name.rpartition("/")[0]
        synced = [i for i in positions(every_call, rf"^fsync\(\d+<{parent}>") if created[0] < i < answered]
        assert synced, f"{name} is not on the disk before the answer"


def test_a_deletion_is_recorded_before_the_bytes_are_erased_and_both_before_the_answer(calls):
    uploaded, deleted = positions(calls, "UPLOADED")[0], positions(calls, "DELETED")[0]
    between = [i for i in positions(calls, r"^f(data)?sync\(\d+<[^>]*ropewalk\.db-wal>") if i > uploaded]
    unlinked = positions(calls, r"^unlink\w*\(.*/blobs/\w\w/\w+\"")
    erased = [i for i in positions(calls, r"^fsync\(\d+<[^>]*/blobs/\w\w>") if i > uploaded]
    assert uploaded < between[0] < unlinked[0] < erased[0] < deleted
