"""Known vulnerabilities of what is installed, by pip-audit: exit code 1 if there are any; where nothing can be asked, says so and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS = 120


def told(output: str) -> tuple[int, str]:
    """The exit code and the words for what pip-audit wrote."""
    try:
        found: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        return 0, "not audited: the advisory service did not answer"
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
        done = subprocess.CompletedProcess(command, 1, "", "")
    code, words = told(done.stdout)
    print(words)
    return code


if __name__ == "__main__":
    sys.exit(main())
