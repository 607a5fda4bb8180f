"""Who was refused, in the audit log: a wrong key, a missing right, an id that the key's workspace does not have.

Refusals cost those who cause them nothing, so only so many a minute are written down one by one; how many came beside them stands
in the next entry. An id that is another's and one that never was are the same here too: the log's `file_uploaded` tells which.
"""

from __future__ import annotations

from ropewalk.database import Database
from ropewalk.errors import RateLimited
from ropewalk.tenants.audit import append
from ropewalk.tenants.caller import Caller
from ropewalk.tenants.limits import Limits

PER_MINUTE = 60  # of each key, and of all requests together that show none


class Denials:
    """The refusals of one process."""

    def __init__(self, database: Database, per_minute: int = PER_MINUTE) -> None:
        self._database, self._limits = database, Limits(per_minute)
        self._beside: dict[str, int] = {}

    async def tell(self, caller: Caller | None, subject: str, outcome: str, request_id: str) -> None:
        """Writes a refusal down, or counts it."""
        who = caller.key_id or "" if caller else ""
        try:
            self._limits.take(who)
        except RateLimited:
            self._beside[who] = self._beside.get(who, 0) + 1
            return
        beside = self._beside.pop(who, 0)
        async with self._database.writing() as connection:
            detail = {"not_written_before": beside} if beside else {}
            await append(connection, caller, "denied", subject, outcome, request_id, detail)
