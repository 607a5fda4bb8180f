"""What went wrong in the rewards and environments of a run: how often, with the first traceback, and which workers were replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ropewalk.train.distributed import World
from ropewalk.train.rollouts import Group
from ropewalk.train.worker_pool import WorkerPool

SHOWN = 2000  # characters of an error; the end of a traceback tells most
NAMED = 8  # of the workers that were replaced since the last time


class Troubles:
    """For the rewards of these names, an environment's own before them, and the processes that compute them."""

    def __init__(self, names: Sequence[str], pools: Sequence[WorkerPool], world: World) -> None:
        self.names, self.pools, self.world = names, pools, world
        self._told = [0] * len(pools)  # how many of the replaced have been named

    def of(self, groups: Sequence[Group], **more: Any) -> list[tuple[str, dict[str, Any]]]:
        """The event `failures`, where anything failed in any process or was replaced since the last time; asked by all together."""
        errors = [[row[at] for group in groups for row in group.errors if row[at]] for at in range(len(self.names))]
        replaced = self._replaced()
        *counts, samples, workers = self.world.sum(
            [*map(len, errors), sum(len(group.episodes) for group in groups), len(replaced)]
        )
        if not any(counts) and not workers:
            return []
        firsts = self.world.gather([(name, _cut(found[0])) for name, found in zip(self.names, errors) if found])
        return [
            (
                "failures",
                {
                    "failed": {name: int(count) for name, count in zip(self.names, counts) if count},
                    "samples": int(samples),
                    "errors": dict(reversed(firsts)),  # of the first process that has one
                    "replaced": self.world.gather(replaced[:NAMED])[:NAMED],
                    "workers_replaced": int(workers),
                    **more,
                },
            )
        ]

    def _replaced(self) -> list[str]:
        """What has become of workers since the last time."""
        found: list[str] = []
        for at, pool in enumerate(self.pools):
            new = pool.replaced[self._told[at] :]
            self._told[at] += len(new)
            found += new
        return found


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"…{text[-SHOWN:]}"
