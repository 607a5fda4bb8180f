"""A run that several workers on a cluster are to train together, and what it needs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ropewalk.config.document import dump, read_document
from ropewalk.config.run import Run
from ropewalk.errors import ConfigError
from ropewalk.files.local import is_id

CONNECT_SECONDS = 300.0  # for a cluster that is being started anew, when nobody sits before the screen
NOTHING = b'{"blobs": "", "files": []}\n'  # no stored file is read; but when its input ends, the process does
TRAIN = ("-m", "ropewalk", "train")


@dataclass(frozen=True)
class Launch:
    """A run, and what it needs."""

    name: str  # of which there is one on a cluster
    workers: int
    resources: Mapping[str, float] | None
    arguments: tuple[str, ...]  # of Python
    run: Path  # the run's folder, on this machine
    config: str = (
        ""  # of a job, whose folder here is a copy of that of its leading worker; '': all nodes see this working folder
    )
    granted: bytes = field(default=NOTHING, repr=False)
    address: str = ""
    patience: float = 0.0  # seconds, for a cluster that does not answer


def job_launch(config: Path, granted: bytes, arguments: Sequence[str] = TRAIN) -> Launch:
    """The run of a job, as its server has written it into run.yml and onto the standard input."""
    values = dict(read_document(config).values)
    workers, resources = values.pop("ray_num_workers", 1), values.pop("resources_per_worker", None)
    del values["use_ray"]
    return Launch(
        _name(config.parent.name),  # the job's id
        workers,
        resources,
        (*arguments, "run.yml", "--granted"),
        config.parent / str(values["output_dir"]),
        config=dump(values),
        granted=granted,
        address=os.environ.get("RAY_ADDRESS", ""),
        patience=CONNECT_SECONDS,
    )


def shared_launch(run: Run, config: Path, overrides: Sequence[str], more: Sequence[str] = ()) -> Launch:
    """A run of the command line: all nodes see the files that it reads, and its output_dir, under the paths of this one."""
    for source in (*run.sources, *(run.test_datasets or ())):
        if is_id(source.path):
            raise ConfigError(
                f"use_ray: {source.path} is a stored file, which other nodes cannot read; train it as a job of a server with "
                "`jobs: ray`, or name a path that all nodes see"
            )
    folder = Path(run.output_dir).resolve()
    return Launch(
        _name(str(folder)),
        run.ray_num_workers,
        run.resources_per_worker,
        (*TRAIN, str(config), *overrides, *more, "--granted"),
        folder,
        address=os.environ.get("RAY_ADDRESS", ""),
    )


def _name(what: str) -> str:
    return f"run-{hashlib.sha256(what.encode()).hexdigest()[:32]}"
