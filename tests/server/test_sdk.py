"""The behaviours of tests/sdk through the SDK of our own environment; `make test-sdk` runs all of them, through every SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

pytest.register_assert_rewrite("sdk.behaviours")

from sdk import behaviours  # noqa: E402
from sdk.sdk_fixtures import client, connect, workspace  # noqa: E402, F401
from sdk.seeder import Rows  # noqa: E402

# What takes its time, or is of another version of the SDK.
ELSEWHERE = {
    "test_2500_files_are_walked_once_each",
    "test_2500_files_are_walked_in_small_pages_too",
    "test_500_mb_go_up_and_come_down_whole",
    "test_a_byte_more_than_500_mb_is_too_large",
    "test_the_old_list_has_ids_at_its_ends_and_no_expiry",
}
globals().update({name: test for name, test in vars(behaviours).items() if name.startswith("test_") and name not in ELSEWHERE})


class SeederHere:
    """The seeder without a process of its own: its verbs run in the loop of the server under test."""

    def __init__(self, running: Any) -> None:
        self.server, self._running = running.url, running
        self._rows = Rows(running.store, running.data, running.url)

    def ask(self, verb: str, **arguments: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self._running.run(getattr(self._rows, verb)(**arguments))
        return answer

    def workspace(self, **options: Any) -> Mapping[str, Any]:
        return self.ask("workspace", **options)


@pytest.fixture(scope="module")
def seeder(server: Any) -> SeederHere:
    return SeederHere(server)


def test_the_tests_that_run_elsewhere_are_there():
    assert set(vars(behaviours)) >= ELSEWHERE


def test_a_row_that_the_sdks_own_tests_take_for_granted_is_put_back(seeder, connect):  # noqa: F811
    from sdk.seeder import FILE, SECRET

    seeder.ask("rows")
    own = connect(SECRET)
    assert own.files.retrieve_metadata(FILE).id == FILE
    own.files.delete(FILE)
    seeder.ask("rows")
    assert own.files.retrieve_metadata(FILE).id == FILE
