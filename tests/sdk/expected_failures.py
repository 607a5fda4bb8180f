"""The SDK's own tests that a server which keeps to the contract must fail, one by one, each with the contract's sentence.

`test_method_list_with_all_params` fills in every argument of `files.list` at once: ids[]=string, limit=1 and page=page.
Those of messages fill in a container, servers of MCP and a compaction, which are Anthropic's own and are refused here by name.
"""

from __future__ import annotations

ELSEWHERE = "container, mcp_servers and compaction run on Anthropic's machines; what cannot be done is refused, not ignored"
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

_MESSAGES = {
    "test_messages.py": ("create_with_all_params_overload_1", "create_with_all_params_overload_2"),
    "beta/test_messages.py": (
        "create_with_all_params_overload_1",
        "create_with_all_params_overload_2",
        "count_tokens_with_all_params",
    ),
}

EXPECTED_FAILURES |= {
    f"tests/api_resources/{module}::{client}::test_method_{case}[{way}]": ELSEWHERE
    for module, cases in _MESSAGES.items()
    for case in cases
    for client, ways in (("TestMessages", ("loose", "strict")), ("TestAsyncMessages", ("loose", "strict", "aiohttp")))
    for way in ways
}
