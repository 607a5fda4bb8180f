"""Asks the seeder, which writes rows into the running server's database; the standard library only, as it runs beside every SDK."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any


class Seeder:
    """The seeder at an address; every verb answers a dictionary."""

    def __init__(self, url: str | None = None) -> None:
        self.url = url or os.environ["ROPEWALK_TEST_SEEDER"]
        self.server: str = self.ask("server")["url"]

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}/{verb}", json.dumps(arguments).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=900) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def workspace(self, **options: Any) -> dict[str, Any]:
        """A new workspace with a key: workspace_id, organization_id, key_id, secret."""
        return self.ask("workspace", **options)
