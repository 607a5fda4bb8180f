"""A quota is exact under concurrency: the short form of benchmarks/quota_race.py."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quota_race.py"


def test_uploads_at_once_fill_a_quota_to_the_edge_and_never_above(tmp_path, postgres_server):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--json", tmp_path / "result.json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["over"], result["lost"]) == (0, 0)
    races = result["races"]
    assert {(race["backend"], race["processes"]) for race in races} == {
        (backend, processes) for backend in ("local", "postgres-s3") for processes in (1, 4)
    }
    for race in races:
        assert race["acknowledged"] + race["refused"] == race["uploads"]
        assert race["refused"] > 0
        assert 0.9 < race["filled"] <= 1


def test_a_quota_that_is_not_kept_is_noticed(tmp_path):
    """The race itself is checked: reservations without their condition go above the limit."""
    code = (
        "import runpy, sys\nfrom sqlalchemy import true\nfrom ropewalk.tenants import quotas\n"
        "async def reserve(connection, caller, size, files=1):\n"
        "    for scope, id in quotas.scopes(caller):\n"
        "        await quotas._ensure(connection, scope, id)\n"
        "    await quotas._change(connection, caller, reserved_bytes=size, reserved_files=files)\n"
        "quotas.reserve = reserve\n"
        f"sys.argv = ['x', '--quick', '--backend', 'local']\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " 0 |    0 |" not in done.stdout
