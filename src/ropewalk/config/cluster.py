"""Runs on a Ray cluster: Axolotl's keys of a run, and `jobs: ray` of what a server is told.

jobs: ray                                                        the cluster at $RAY_ADDRESS, else the one this machine belongs to
jobs: {ray: {address: "head:6379", workers: 4, resources_per_worker: {CPU: 8, GPU: 1}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ropewalk.config.document import Document, Place
from ropewalk.config.keys import Group, Positive, key, not_a_switch
from ropewalk.config.section import mapping, only, wrong

Amount = Annotated[float, BeforeValidator(not_a_switch), Field(ge=0, allow_inf_nan=False)]


class ClusterKeys(Group):
    """Where the processes of a run are started."""

    use_ray: bool = key(
        "Train with workers on the Ray cluster at $RAY_ADDRESS, else the one that this machine belongs to; all nodes see the "
        "files of the run under the same paths.",
        False,
    )
    ray_num_workers: Positive = key("Processes that train together; each takes gradient_accumulation_steps batches a step.", 1)
    resources_per_worker: dict[str, Amount] | None = key(
        "What Ray sets aside for each: CPU, GPU, memory (bytes), or what the cluster's nodes were given names for; default: "
        "one CPU, and one GPU where the cluster has any."
    )


@dataclass(frozen=True)
class RayCluster:
    """Jobs are trained by workers on a Ray cluster that is there already."""

    address: str = ""  # host:6379 from a node of it, ray://host:10001 from elsewhere; '': $RAY_ADDRESS, else this machine's own
    workers: int = 1  # at most, of each job
    resources_per_worker: Mapping[str, float] | None = None

    def keys(self, steps: int, workers: int | None = None) -> dict[str, Any]:
        """The keys of a run that was asked for with so many accumulation steps: what a step learns from stays the same."""
        count = workers or max(n for n in range(1, self.workers + 1) if steps % n == 0)
        keys: dict[str, Any] = {"use_ray": True, "ray_num_workers": count, "gradient_accumulation_steps": steps // count}
        if self.resources_per_worker is not None:
            keys["resources_per_worker"] = dict(self.resources_per_worker)
        return keys


def read_cluster(document: Document, found: Any) -> RayCluster | None:
    """`jobs` of a serving file: where a server's trainings run; None: beside it on its machine."""
    if found in (None, "local"):
        return None
    if found == "ray":
        return RayCluster()
    place: Place = ("jobs", "ray")
    if not isinstance(found, dict) or list(found) != ["ray"]:
        raise wrong(document, ("jobs",), f"jobs is {found!r}; expected local, ray, or {{ray: {{address: ..., workers: ...}}}}")
    values = mapping(document, place, found["ray"] or {})
    only(document, place, values, ("address", "workers", "resources_per_worker"))
    address, workers = values.get("address", ""), values.get("workers", 1)
    if not isinstance(address, str):
        raise wrong(document, (*place, "address"), f"address is {address!r}; expected host:6379 or ray://host:10001")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise wrong(document, (*place, "workers"), f"workers is {workers!r}; expected 1 or more")
    asked = values.get("resources_per_worker")
    if asked is not None:
        for name, amount in mapping(document, (*place, "resources_per_worker"), asked).items():
            if not isinstance(amount, int | float) or isinstance(amount, bool) or amount < 0:
                where = (*place, "resources_per_worker", name)
                raise wrong(document, where, f"{name} is {amount!r}; expected how much of it each worker needs")
    return RayCluster(address, workers, asked)
