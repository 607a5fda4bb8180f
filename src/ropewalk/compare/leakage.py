"""Leakage: whether prompts of a suite stand in a candidate's training files.

A prompt of 13 words or more has leaked when any 13 words of a user's turn of it stand, in that order, in a training file. Words that
stand in prompts of many groups are the suite's own template, and tell nothing. A shorter prompt has leaked when a whole turn, value or
line of the file says just what its last turn says; one of fewer than 3 words is too little to tell. Case, punctuation and white space do
not count, and each character of a script without spaces is a word.

The suite's runs of 13 words are held as sorted hashes, so that a file of any size streams past them in the memory of one portion.
"""

from __future__ import annotations

import asyncio
import json
import re
import unicodedata
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, select

from ropewalk.compare.candidates import Candidate
from ropewalk.compare.evidence import Finding, Trouble
from ropewalk.compare.suites import Prompt, get_suite, stream_prompts
from ropewalk.compare.tables import leakages
from ropewalk.compare.tables import prompts as prompt_rows
from ropewalk.database import now
from ropewalk.errors import DamagedContent, NotFound
from ropewalk.files.local import is_id
from ropewalk.files.store import Store
from ropewalk.tenants.caller import Caller

RULE = "1"  # its edition: what was found by another is looked for again
N = 13  # words
LEAST = 3  # words of a prompt that is looked for at all
TEMPLATE = 5  # groups; what stands in prompts of more is the suite's own wording
MOST = 20_000_000  # hashes; of a larger suite each prompt keeps a part of its own
PORTION = 1 << 20  # bytes of a file that are looked through at once
LONGEST = 64 << 20  # bytes of a line that are kept together
NAMED = 10  # prompts in a sentence
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_]+")
Hashes = NDArray[np.uint64]


class NoText(Exception):
    """Bytes that are neither JSON nor text."""


async def leaks(store: Store, caller: Caller, suite_id: str, candidate: Candidate) -> list[Trouble]:
    """What keeps a candidate from being compared on a suite: each training file that has prompts of it, and each that cannot be read.

    A file is looked through once for a suite, and what was found stays when the file is gone.
    """
    suite = await get_suite(store, caller, suite_id)
    found, index = list[Trouble](), None
    for place, file in enumerate(candidate.lineage.train_data, 1):
        id = f"leak_{candidate.id}_{place}"
        stamp = await asyncio.to_thread(_stamp, file)
        numbers = await _known(store, suite_id, file, stamp)
        if numbers is None:
            try:
                chunks = await _opened(store, caller, file)
                index = index or await index_of(store, caller, suite_id)
                numbers = await look_through(index, chunks)
            except (NotFound, DamagedContent, OSError, NoText):
                why = f"the training file '{file}' of {candidate.name} cannot be read, so nobody looked for the suite's prompts in it"
                found.append(Trouble(id, Finding.LEAKAGE, why, blocks=False))
                continue
            await _keep(store, suite_id, file, stamp, numbers)
        if numbers:
            named = ", ".join(await _ids(store, suite_id, numbers[:NAMED])) + (", …" if len(numbers) > NAMED else "")
            count = f"{len(numbers)} of {suite.n_prompts} prompts"
            told = f"{count} stand in the training file '{file}' of {candidate.name}: {named}"
            found.append(Trouble(id, Finding.LEAKAGE, told))
    return found


async def index_of(store: Store, caller: Caller, suite_id: str) -> Index:
    """All prompts of a suite, ready to be looked for."""
    index = Index()
    async for portion in stream_prompts(store, caller, suite_id):
        await asyncio.to_thread(index.add, portion)
    await asyncio.to_thread(index.close)
    return index


async def look_through(index: Index, chunks: AsyncIterable[bytes]) -> list[int]:
    """The numbers of the prompts that stand in a file, JSON or text, that comes in pieces."""
    numbers, carried = set[int](), list[str]()
    async for lines in _lines(chunks):
        numbers |= await asyncio.to_thread(index.look, lines, carried)
    return sorted(numbers)


class Index:
    """The prompts of a suite by what they say."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._held = most, 0
        self._groups: dict[str, int] = {}
        self._parts: list[tuple[Hashes, NDArray[np.int32], NDArray[np.int32]]] = []  # hashes, their prompts, their groups
        self._short: dict[int, list[int]] = {}  # hash of all words -> prompts
        self._hashes: Hashes = np.empty(0, np.uint64)
        self._prompts: NDArray[np.int32] = np.empty(0, np.int32)

    def add(self, some: Sequence[Prompt]) -> None:
        for prompt in some:
            number, group = prompt.number, self._groups.setdefault(prompt.group, len(self._groups))
            turns = [words(text) for text in _user_texts(prompt)]
            if LEAST <= len(turns[-1]) < N:
                self._short.setdefault(hash(tuple(turns[-1])), []).append(number)
            grams = np.unique(np.concatenate([_grams(turn) for turn in turns]))
            if len(grams):
                each = np.full(len(grams), number, np.int32), np.full(len(grams), group, np.int32)
                self._parts.append((grams, *each))
                self._held += len(grams)
        if self._held > self._most:
            self._thin()

    def close(self) -> None:
        """Sorts the hashes, less those of the suite's own template."""
        if not self._parts:
            return
        hashes, prompts, groups = (np.concatenate(column) for column in zip(*self._parts))
        self._parts.clear()
        order = np.lexsort((groups, hashes))
        hashes, prompts, groups = hashes[order], prompts[order], groups[order]
        first = np.ones(len(hashes), bool)  # of its hash and group
        first[1:] = (hashes[1:] != hashes[:-1]) | (groups[1:] != groups[:-1])
        begins = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])
        lengths = np.diff(np.r_[begins, len(hashes)])
        own = np.repeat(np.add.reduceat(first, begins) <= TEMPLATE, lengths)
        self._hashes, self._prompts = hashes[own], prompts[own]

    def look(self, lines: Iterable[bytes], carried: list[str]) -> set[int]:
        """The numbers of prompts that stand in some lines; `carried` are the last words of the text before, and then of this."""
        found, parts = set[int](), list[Hashes]()
        for line in lines:
            texts = _texts(line)
            if texts is None:  # no JSON: a line of a text, whose words go on in the next
                some = words(line.decode(errors="replace"))
                self._look_short(some, found)
                carried.extend(some)
                parts.append(_grams(carried))
                del carried[: -(N - 1)]
                continue
            for text in texts:
                some = words(text)
                self._look_short(some, found)
                parts.append(_grams(some))
        seen = np.unique(np.concatenate(parts)) if parts else self._hashes[:0]
        left = np.searchsorted(self._hashes, seen, "left")
        right = np.searchsorted(self._hashes, seen, "right")
        for begin, end in zip(left[left < right], right[left < right]):
            found.update(self._prompts[begin:end].tolist())
        return found

    def _look_short(self, some: list[str], found: set[int]) -> None:
        if LEAST <= len(some) < N:
            found.update(self._short.get(hash(tuple(some)), ()))

    def _thin(self) -> None:
        """Leaves every prompt half of its hashes: the smallest, which are a matter of chance, and one at least."""
        halves = []
        for hashes, prompts, groups in self._parts:
            kept = (len(hashes) + 1) // 2
            halves.append((hashes[:kept], prompts[:kept], groups[:kept]))
        self._parts, self._held = halves, sum(len(hashes) for hashes, _, _ in halves)


def words(text: str) -> list[str]:
    """What counts of a text."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _grams(some: Sequence[str]) -> Hashes:
    """A hash of every N words that follow each other; good within one process."""
    count = len(some) - N + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    each = np.fromiter(map(hash, some), np.int64, len(some)).view(np.uint64)
    total = np.zeros(count, np.uint64)
    for place in range(N):
        total = total * FACTOR + each[place : place + count]
    return total


def _user_texts(prompt: Prompt) -> Iterator[str]:
    for turn in prompt.messages:
        if turn["role"] == "user":
            content = turn["content"]
            yield content if isinstance(content, str) else "\n".join(block.get("text", "") for block in content)


def _texts(line: bytes) -> list[str] | None:
    """Every text in a line of JSON, at any depth; None for a line that is none."""
    if line.lstrip()[:1] not in (b"{", b"["):
        return None
    try:
        left: list[Any] = [json.loads(line)]
    except (ValueError, RecursionError):
        return None
    texts = []
    while left:
        value = left.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (dict, list)):
            left.extend(value.values() if isinstance(value, dict) else value)
    return texts


async def _lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[list[bytes]]:
    """Whole lines, in portions."""
    waiting, size, rest = list[bytes](), 0, b""
    async for chunk in chunks:
        if b"\0" in chunk:
            raise NoText
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LONGEST:
            lines, rest = [*lines, rest], b""
        waiting += lines
        size += sum(map(len, lines))
        if size >= PORTION:
            yield waiting
            waiting, size = [], 0
    yield [*waiting, rest]


async def _opened(store: Store, caller: Caller, file: str) -> AsyncIterable[bytes]:
    if is_id(file):
        return (await store.open_content(caller, file)).chunks()
    if not Path(file).is_file():
        raise NotFound(f"there is no file '{file}'")
    return _read(Path(file))


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, PORTION):
            yield chunk


# -- what was found before


def _stamp(file: str) -> str:
    """Another whenever the rule or the file is; "" for a file that is not there."""
    if is_id(file):
        return RULE
    try:
        found = Path(file).stat()
    except (OSError, ValueError):
        return ""
    return f"{RULE} {found.st_size} {found.st_mtime_ns}"


async def _known(store: Store, suite_id: str, file: str, stamp: str) -> list[int] | None:
    mine = (leakages.c.suite_id == suite_id) & (leakages.c.file == file)
    async with store.database.reading() as connection:
        row = (await connection.execute(select(leakages).where(mine))).first()
    numbers: list[int] | None = json.loads(row.numbers) if row is not None and stamp in (row.stamp, "") else None
    return numbers


async def _keep(store: Store, suite_id: str, file: str, stamp: str, numbers: Sequence[int]) -> None:
    row = {"suite_id": suite_id, "file": file, "stamp": stamp, "numbers": json.dumps(numbers), "created_at": now()}
    mine = (leakages.c.suite_id == suite_id) & (leakages.c.file == file)
    async with store.database.writing() as connection:
        await connection.execute(delete(leakages).where(mine))
        await connection.execute(store.database.upsert(leakages).values(row).on_conflict_do_nothing())


async def _ids(store: Store, suite_id: str, numbers: Sequence[int]) -> Sequence[str]:
    query = (
        select(prompt_rows.c.id)
        .where(prompt_rows.c.suite_id == suite_id, prompt_rows.c.number.in_(numbers))
        .order_by(prompt_rows.c.number)
    )
    async with store.database.reading() as connection:
        return (await connection.execute(query)).scalars().all()
