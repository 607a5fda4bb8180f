"""The workers of one try of a run on Ray: all of them get a place on the cluster, or none does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ropewalk.errors import UpstreamFailed
from ropewalk.jobs.launch import Launch
from ropewalk.jobs.ray_worker import Errand, Place, Seen, Worker
from ropewalk.jobs.run_mirror import Mirror, say

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 60.0  # a worker that does not answer for so long is lost
EVENTS = "events.jsonl"  # which the leading worker alone has
WAIT_SECONDS = 10.0  # after which it is said that a run waits for room on the cluster


class Lost(Exception):
    """A worker is gone, or its process ended without a word."""


class Group:
    """The workers of one try, all at once or none."""

    def __init__(self, ray: Any, launch: Launch, asked: Callable[[], bool]) -> None:
        self.ray, self.launch, self.asked = ray, launch, asked
        self.actors: list[Any] = []
        self.marks = [(0, 0, 0)] * launch.workers
        self.needs = _needs(launch.resources, ray.cluster_resources())
        self.room = ray.util.placement_group([self.needs] * launch.workers, strategy="PACK")

    @property
    def ready(self) -> bool:
        return len(self.actors) == self.launch.workers

    def __enter__(self) -> Group:
        waiting = time.monotonic() + WAIT_SECONDS
        try:
            while not self.asked() and not self.room.wait(LOOK_SECONDS):
                waiting = self._waits(waiting, f"{self.launch.workers} workers with {self.needs}")
            while not self.asked() and not self._made():
                waiting = self._waits(waiting, "an earlier try of this run to end")
                time.sleep(LOOK_SECONDS)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _waits(self, until: float, what: str) -> float:
        if time.monotonic() < until:
            return until
        say(f"waiting for {what}; free now: {self.ray.available_resources()}")
        return float("inf")

    def _made(self) -> bool:
        """Makes the actors; not while another try has the name of the leading one."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        own = {name: amount for name, amount in self.needs.items() if name not in ("CPU", "GPU", "memory")}
        options = {
            "num_cpus": self.needs.get("CPU", 0),
            "num_gpus": self.needs.get("GPU", 0),
            "memory": self.needs.get("memory"),
            "resources": own,
        }
        for rank in range(self.launch.workers):
            place = PlacementGroupSchedulingStrategy(self.room, placement_group_bundle_index=rank)
            name = self.launch.name if rank == 0 else None
            try:
                actor = self.ray.remote(Worker).options(name=name, scheduling_strategy=place, **options).remote()
            except ValueError:
                return False
            self.actors.append(actor)
        return True

    def begin(self, mirror: Mirror) -> None:
        """Gives every worker what the run goes on from and its place among the others, and starts them."""
        places: list[Place] = self._all("place")
        for place in places:
            if place.versions != places[0].versions:
                raise UpstreamFailed(
                    f"the nodes of the cluster differ: {places[0].node} has {_shown(places[0])}, {place.node} has {_shown(place)}; "
                    "install the same on all"
                )
        say(f"{len(places)} workers: " + ", ".join(f"{rank} on {place.node}" for rank, place in enumerate(places)))
        for path, start, piece in mirror.pieces():
            shared = self.ray.put(piece)  # carried once, however many workers a node has
            readers = self.actors if path != EVENTS else self.actors[:1]
            self._answers([actor.put.remote(path, start, shared) for actor in readers])
        world = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": places[0].address, "MASTER_PORT": str(places[0].port)}

        def errand(rank: int) -> Errand:
            own = {"RANK": str(rank), "LOCAL_RANK": "0"}  # Ray shows each worker its own GPUs alone
            return Errand(self.launch.arguments, self.launch.granted, world | own, self.launch.config, os.getcwd())

        self._all("begin", errand)

    def look(self) -> list[Seen]:
        """What all have to tell since the last look."""
        found: list[Seen] = self._all("look", lambda rank: self.marks[rank])
        self.marks = [one.mark for one in found]
        return found

    def stop(self) -> None:
        """Has all finish their step and the leading one write a checkpoint."""
        self._all("stop")

    def files(self, folder: str) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = self._answers([self.actors[0].files.remote(folder)])[0]
        return found

    def get(self, path: str, start: int) -> bytes:
        piece: bytes = self._answers([self.actors[0].get.remote(path, start)])[0]
        return piece

    def _all(self, method: str, given: Callable[[int], Any] | None = None) -> list[Any]:
        asked = []
        for rank, actor in enumerate(self.actors):
            asked.append(getattr(actor, method).remote(*([given(rank)] if given else [])))
        return self._answers(asked)

    def _answers(self, asked: list[Any]) -> list[Any]:
        """What workers answer, in their order; Lost where one does not."""
        errors, late, answers = self.ray.exceptions, time.monotonic() + ANSWER_SECONDS, list[Any]()
        try:
            for one in asked:
                answers.append(self.ray.get(one, timeout=max(0.1, late - time.monotonic())))
        except errors.RayTaskError as error:  # of the worker's own
            raise Lost(f"worker {len(answers)} failed: {error.cause!r}"[:300]) from None
        except errors.RayError as error:
            raise Lost(f"worker {len(answers)} is gone: {_first_line(error)}") from None
        return answers

    def _close(self) -> None:
        closing = []
        with suppress(Exception):  # what is gone is gone
            closing = [actor.close.remote() for actor in self.actors]
            self.ray.wait(closing, num_returns=len(closing), timeout=10)
        for actor in self.actors:
            with suppress(Exception):
                self.ray.kill(actor)
        self.actors = []
        with suppress(Exception):
            self.ray.util.remove_placement_group(self.room)


def _needs(asked: Mapping[str, float] | None, there: Mapping[str, float]) -> dict[str, float]:
    """What is set aside for each worker."""
    wanted = {"CPU": 1.0, **({"GPU": float(there.get("GPU", 0) > 0)} if asked is None else asked)}
    return {name: float(amount) for name, amount in wanted.items() if amount}


def _shown(place: Place) -> str:
    return ", ".join(f"{name} {found}" for name, found in place.versions.items())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
