"""What whoever asks for tokens may count on, whichever engine writes them: this machine's own (client.py), or a vLLM server (vllm.py)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ropewalk.engine.request import Event, Request

Pixels = Callable[[Iterable[str]], Awaitable[dict[str, bytes]]]


@dataclass(frozen=True)
class Eyes:
    """How the model of an engine sees."""

    token: str  # what its chat template writes for a picture
    digest: str  # changes when it comes to look at pictures in another way


class TokenEngine(Protocol):
    """One base, and the adapters over it: ids in, ids out."""

    longest: int  # tokens of a text; 0 before it has started
    eyes: Eyes | None
    held: str  # why it may not start now

    @property
    def folder(self) -> Path:
        """The base's."""
        ...

    @property
    def busy(self) -> bool:
        """Whether anything is being answered."""
        ...

    @property
    def running(self) -> bool: ...

    async def start(self) -> None:
        """Makes it ready; raises what keeps it from that."""
        ...

    async def measured(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """What stands for pictures of these sizes in a prompt."""
        ...

    def generate(self, request: Request, pixels: Pixels | None = None, over: Iterable[int] = ()) -> AsyncGenerator[Event, None]:
        """What a request brings, as it comes; closing the iterator cancels it at once."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> str:
        """Makes an adapter known -> what names its content."""
        ...

    async def forget(self, paths: Iterable[str]) -> None:
        """Drops what was read from these paths, which are about to be erased."""
        ...

    async def flush(self) -> None:
        """Returns when all that was read is on disk."""
        ...

    async def stats(self) -> dict[str, Any]: ...

    async def stop(self) -> None: ...
