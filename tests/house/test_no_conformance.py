"""The server has no branch for the tests of an SDK: what they take for granted is put into the database by the tests alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
IDS = {"file_id", "model_id"}  # good names for arguments and routes, but nothing is ever compared with them


@pytest.mark.parametrize("word", ["my-anthropic-api-key", "wrkspc_011CZkZaBF1tNoB5wlCeusgy", "conformance"])
def test_nothing_in_the_source_speaks_of_the_sdks_tests(word):
    found = [path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert found
    assert [str(path) for path in found if re.search(re.escape(word).encode(), path.read_bytes(), re.IGNORECASE)] == []


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_is_compared_with_the_ids_of_the_sdks_tests(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Compare, ast.match_case)):
            parts = [part for child in ast.iter_child_nodes(node) for part in (child, *ast.iter_child_nodes(child))]
            words = {part.value for part in parts if isinstance(part, ast.Constant)}
            # `"file_id" in something` asks for the name of an argument, not for a file of that name.
            membership = isinstance(node, ast.Compare) and all(isinstance(op, (ast.In, ast.NotIn)) for op in node.ops)
            assert membership or not words & IDS, f"{path}:{node}"
