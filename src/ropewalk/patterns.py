"""The one door to RE2: patterns whose time grows with the text and not with its square, whoever wrote them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import re2

MEMORY_BYTES = 8 << 20  # for one pattern
KEPT = 256


@lru_cache(maxsize=KEPT)
def compiled(pattern: str, ignore_case: bool = False) -> Any:
    """The pattern, ready to search; re2.error where it is none."""
    options = re2.Options()
    options.log_errors, options.case_sensitive, options.max_mem = False, not ignore_case, MEMORY_BYTES
    return re2.compile(pattern, options)


def fault(pattern: str) -> str | None:
    """What is wrong with a pattern, and what to write instead; None where it can be used."""
    try:
        compiled(pattern)
    except re2.error as error:
        said = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        way = "the syntax is RE2's"
        if re.search(r"\(\?(?:[=!]|<[=!])", pattern):
            way = "there is no lookaround; write a second check, with absent: true for what must not be there"
        elif re.search(r"\\[1-9]", pattern):
            way = "there are no back-references; write out what may repeat"
        return f"the pattern {pattern[:200]!r} cannot be used: {said}; {way}"
    return None
