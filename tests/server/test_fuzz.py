"""The short form of benchmarks/fuzz_files.py: a few hundred hostile requests against a real server; and its forms, cut anywhere."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ropewalk.errors import BadInput
from ropewalk.server.multipart import Begin, Data, Multipart

FOLDER = Path(__file__).parents[2] / "benchmarks"
_spec = importlib.util.spec_from_file_location("hostile", FOLDER / "hostile.py")
assert _spec is not None
assert _spec.loader is not None
hostile = sys.modules.setdefault("hostile", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(hostile)


def test_hostile_requests_are_never_answered_in_the_500s(tmp_path):
    written = tmp_path / "fuzz.json"
    command = [sys.executable, str(FOLDER / "fuzz_files.py"), "--requests", "150", "--seed", "7", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(written.read_text(encoding="utf-8"))
    assert (result["requests"], result["server_errors"], result["hung"], result["untrue"]) == (150, 0, 0, 0)
    # Something of every kind was let in, so that what lies behind the first door was tried too.
    assert {"upload 200", "schema 200", "document 200", "preview 200"} <= set(result["statuses"])


def read(content_type: bytes, body: bytes, cuts: list[int]) -> list[tuple[Begin, bytes]] | None:
    """The parts of a body that comes in these pieces; None if it is refused."""
    parts: list[tuple[Begin, bytes]] = []
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    try:
        parser = Multipart(content_type.decode("latin-1"))
        for event in itertools.chain.from_iterable(parser.feed(body[a:b]) for a, b in itertools.pairwise(edges) if a < b):
            if isinstance(event, Begin):
                parts.append((event, b""))
            elif isinstance(event, Data):
                parts[-1] = (parts[-1][0], parts[-1][1] + event.data)
        parser.close()
    except BadInput:
        return None
    return parts


@given(hostile.SOME_FAULTS.flatmap(hostile.form), st.lists(st.integers(0, 3000), max_size=8))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_form_is_the_same_form_however_it_is_cut(form, cuts):
    content_type, body = form
    assert read(content_type, body, cuts) == read(content_type, body, [])
