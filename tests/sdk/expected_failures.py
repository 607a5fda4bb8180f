"""The SDK's own tests that a server which keeps to the contract must fail, one by one, each with the contract's sentence.

`test_method_list_with_all_params` fills in every argument of `files.list` at once: ids[]=string, limit=1 and page=page.
"""

from __future__ import annotations

IDS_ALONE = "`ids` returns a single page of the named files and cannot be combined with `page` or `limit`"

_CASES = (
    "TestFiles::test_method_list_with_all_params[loose]",
    "TestFiles::test_method_list_with_all_params[strict]",
    "TestAsyncFiles::test_method_list_with_all_params[loose]",
    "TestAsyncFiles::test_method_list_with_all_params[strict]",
    "TestAsyncFiles::test_method_list_with_all_params[aiohttp]",
)

EXPECTED_FAILURES = {
    f"tests/api_resources/{module}::{case}": IDS_ALONE for module in ("test_files.py", "beta/test_files.py") for case in _CASES
}
