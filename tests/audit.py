"""Known vulnerabilities of what is installed, by pip-audit: exit code 1 if there are any, or if it did not do its work.

Where the advisory service cannot be reached, nothing can be said: that is told, and passes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

SECONDS = 120
# What pip-audit, and requests below it, call a service that cannot be reached or is not well.
AWAY = re.compile(
    r"Could not connect|not redirecting properly|service is temporarily unavailable|ServiceError"
    r"|ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|NewConnectionError|MaxRetryError"
)


def told(code: int, output: str, complaints: str = "") -> tuple[int, str]:
    """The exit code and the words for how pip-audit ended and what it wrote."""
    try:
        found: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        said = complaints.strip().splitlines() or ["it said nothing"]
        away = [line for line in said if AWAY.search(line)]
        if away:
            return 0, f"not audited: the advisory service did not answer: {away[-1]}"
        return 1, f"pip-audit did not work (exit code {code}): {said[-1]}; after `make clean` it is installed anew"
    asked = [each for each in found if "vulns" in each]
    if not asked:
        return 0, f"not audited: of {len(found)} packages the advisory service knows none"
    bad = [f"{each['name']} {each['version']}: {vuln['id']}" for each in asked for vuln in each["vulns"]]
    words = f"{len(asked)} of {len(found)} packages audited, {len(bad)} known vulnerabilities"
    return int(bool(bad)), "\n".join([words, *bad])


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run([*command, "--skip-editable"], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"not audited: the advisory service did not answer within {SECONDS} seconds")
        return 0
    code, words = told(done.returncode, done.stdout, done.stderr)
    print(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
