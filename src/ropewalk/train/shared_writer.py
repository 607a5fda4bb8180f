"""A writer that others ask too, beside the run: environments that speak to the model under training over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ropewalk.chat.template import Template
from ropewalk.train.generator import Finished, Spent
from ropewalk.train.rollouts import Writer
from ropewalk.train.sessions import Sessions


class PublishingWriter(Writer, Protocol):
    """One that is given every step's adapter."""

    @property
    def version(self) -> int: ...

    @property
    def spent(self) -> Spent: ...

    def publish(self) -> None: ...

    def cancel(self, key: str) -> None: ...


class Asked(Protocol):
    """What others ask."""

    @property
    def waits(self) -> bool:
        """Whether `admit` would do anything."""

    def admit(self, generator: Any) -> None:
        """Submits what was asked for meanwhile."""

    def take(self, finished: Iterable[Finished]) -> list[Finished]:
        """Gives others what is theirs; the rest comes back."""


class Opened(Protocol):
    """Where they ask."""

    @property
    def asked(self) -> Asked: ...

    @property
    def url(self) -> str: ...

    def stop(self) -> None: ...


class Opens(Protocol):
    """Begins to listen at an address."""

    def __call__(
        self,
        address: str,
        *,
        name: str,
        template: Template,
        longest: int,
        version: Callable[[], int],
        sessions: Sessions | None = None,
    ) -> Opened:
        """`sessions`: whose keys alone open it, and what is learnt of what they ask."""


class SharedWriter:
    """The writer of the rollouts; what others ask is written beside them."""

    def __init__(self, writer: PublishingWriter, asked: Asked) -> None:
        self.writer, self.asked = writer, asked

    @property
    def version(self) -> int:
        return self.writer.version

    @property
    def spent(self) -> Spent:
        return self.writer.spent

    @property
    def busy(self) -> bool:
        """Whether anybody's completion is under way, or asked for."""
        return self.writer.busy or self.asked.waits

    def submit(self, key: str, ids: Sequence[int], **how: Any) -> None:
        """As the writer's."""
        self.writer.submit(key, ids, **how)

    def cancel(self, key: str) -> None:
        """As the writer's."""
        self.writer.cancel(key)

    def publish(self) -> None:
        self.writer.publish()

    def step(self, wait: bool = True) -> list[Finished]:
        """What of the rollouts' has come to its end."""
        self.asked.admit(self.writer)
        return self.asked.take(self.writer.step(wait)) if self.writer.busy else []
