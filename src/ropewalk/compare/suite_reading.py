"""A suite's file on its way into rows: line by line, portion by portion, sealed; which groups are held back is decided here."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

from ropewalk.compare.sealing import keyed_hash, seal
from ropewalk.compare.suite_rows import Asked, read_line
from ropewalk.errors import BadInput, DataError
from ropewalk.ids import new_id

MOST = 1_000_000  # prompts
LONGEST = 8 << 20  # bytes of a line
PORTION, PORTION_BYTES = 500, 4 << 20  # of one transaction


def held_back(group: str, hold: float) -> bool:
    """Whether a group is of the half that is kept back."""
    place = int.from_bytes(hashlib.sha256(b"held\0" + group.encode()).digest()[:8], "big") / 2**64
    return place < hold


class Reading:
    """Lines on their way into rows."""

    def __init__(self, id: str, key: bytes, origin: str, group: str, must_pass: str | None, hold: float) -> None:
        self.id, self.key, self.origin, self.group, self.must_pass, self.hold = id, key, origin, group, must_pass, hold
        self.line = self.number = self.held = 0
        self.groups = set[bytes]()
        self._digest = hashlib.sha256()
        self._rest = b""

    async def portions(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[list[dict[str, Any]]]:
        """Rows of prompts, in portions of one transaction."""
        waiting: list[bytes] = []
        size = 0
        async for chunk in chunks:
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > LONGEST:
                raise self._too_long(self.line + len(waiting) + len(lines) + 1)
            for line in lines:
                waiting.append(line)
                size += len(line)
                if len(waiting) >= PORTION or size >= PORTION_BYTES:
                    if rows := await asyncio.to_thread(self._rows, waiting):
                        yield rows
                    waiting, size = [], 0
        if rows := await asyncio.to_thread(self._rows, [*waiting, self._rest]):
            yield rows

    def check(self) -> None:
        """Raises BadInput for a suite that nothing can be decided on."""
        if not self.number:
            raise DataError('has no prompt; expected a line such as {"prompt": "...", "reference": "..."}', path=self.origin)
        if self.held == self.number:
            raise BadInput(
                f"all {self.number} prompts fell into the half that is held back, since they are of only {len(self.groups)} groups; "
                "add prompts of other groups, or hold nothing back: hold=0"
            )

    def digest(self, margin: float) -> str:
        """Of all prompts and of what decides how they are used."""
        self._digest.update(json.dumps([self.hold, margin]).encode())
        return self._digest.hexdigest()

    def _rows(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        rows = []
        for line in lines:
            self.line += 1
            if self.line == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > LONGEST:
                raise self._too_long(self.line)
            if line.strip():
                rows.append(self._row(read_line(line, self.line, self.origin, self.group, self.must_pass)))
        return rows

    def _row(self, asked: Asked) -> dict[str, Any]:
        self.number += 1
        if self.number > MOST:
            raise DataError(f"a suite has at most {MOST:,} prompts", path=self.origin, line=self.line)
        id, held = new_id("prompt"), held_back(asked.group, self.hold)
        self.held += held
        self.groups.add(hashlib.sha256(asked.group.encode()).digest()[:12])
        content = {
            "messages": list(asked.messages),
            "system": asked.system,
            "reference": asked.reference,
            "checks": [spec.as_dict() for spec in asked.checks],
            "group": asked.group,
            "tags": list(asked.tags),
            "style": asked.style,
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        self._digest.update(f"{asked.must_pass} {text}\n".encode())
        return {
            "id": id,
            "suite_id": self.id,
            "number": self.number,
            "held": held,
            "must_pass": asked.must_pass,
            "text_hash": keyed_hash(self.key, asked.text()),
            "content": seal(self.key, text, f"prompt {id}"),
        }

    def _too_long(self, line: int) -> DataError:
        return DataError(f"is longer than {LONGEST:,} bytes; expected one JSON object per line", path=self.origin, line=line)
