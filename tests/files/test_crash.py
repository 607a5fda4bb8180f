"""What was acknowledged survives SIGKILL: a few of the kills of benchmarks/crash_files.py, over both kinds of storage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "crash_files.py"


@pytest.mark.parametrize(("backend", "kills"), [("local", 25), ("postgres-s3", 6)])
def test_every_kill_leaves_the_store_whole(backend, kills, tmp_path, request):
    if backend != "local":
        request.getfixturevalue("postgres_server")  # skips where there is none
    command = [sys.executable, SCRIPT, "--backend", backend, "--kills", str(kills), "--json", tmp_path / "result.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    found = {key: result[key] for key in ("lost", "ghosts", "quota_errors", "orphans")}
    assert found == {"lost": 0, "ghosts": 0, "quota_errors": 0, "orphans": 0}
    assert result["kills"] == kills
    assert result["acknowledged"] > 0
    assert result["audit_entries"] > 0  # and the log is whole


def test_bytes_that_vanish_are_noticed():
    """The check itself is checked: a store that acknowledges what it has not published loses files."""
    code = (
        "import runpy, sys\nfrom ropewalk.files import blobs\n"
        "blobs.LocalStaged.publish = lambda self, name: self.discard()\n"
        f"sys.argv = ['x', '--kills', '5']\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "lost: " in done.stdout or "stored bytes are missing" in done.stderr  # whoever looks first
