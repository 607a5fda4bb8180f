"""`ropewalk train CONFIG --sweep FILE`: every combination of values trained one after another, and a table of what each came to.

The file names keys with the values they are to take; all combinations are made. Keys that belong together stand in `_`, as a list of
mappings, of which a combination has one. A combination is its own run in a folder of its own, so that a sweep goes on where it was
stopped. No torch: every run is a process of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ropewalk.config.document import Document, read_document
from ropewalk.config.run import load_run
from ropewalk.errors import ConfigError, OutputError, TrainingStopped

TOGETHER = "_"
LONGEST = 120  # characters of a folder's name
MOST = 1000  # combinations: more are a mistake

Start = Callable[[Sequence[str]], int]  # arguments of `ropewalk train` -> exit code


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    name: str
    overrides: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What a run came to; no loss where it failed."""

    name: str
    folder: str
    loss: float | None  # of the last evaluation's best, or of the last step where nothing is evaluated
    evaluated: bool
    seconds: float | None


def sweep(config: Path, overrides: Sequence[str], file: Path, options: Sequence[str] = (), start: Start | None = None) -> int:
    """Trains every combination, prints the table and writes `sweep.json`; 1 where a run failed."""
    made = combinations(config, overrides, file)
    folder = made[0].folder.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output_dir {folder} cannot be written: {error.strerror}; set another `output_dir`") from error
    for number, one in enumerate(made, 1):
        print(f"{number} of {len(made)}: {one.name}", file=sys.stderr)
        code = (start or _start)([str(config), *one.overrides, *options])
        if code < 0:
            raise TrainingStopped(f"the sweep was stopped in {one.name}; the same command goes on from there")
    outcomes = sorted(map(_outcome, made), key=lambda one: math.inf if one.loss is None else one.loss)
    (folder / "sweep.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1), encoding="utf-8")
    print(table(outcomes))
    return int(any(one.loss is None for one in outcomes))


def combinations(config: Path, overrides: Sequence[str], file: Path) -> list[Combination]:
    """Every combination of the file's values, each of which is a configuration without a fault."""
    base = load_run(config, overrides)
    found: list[Combination] = []
    for values in _products(read_document(file)):
        changes = tuple(f"{key}={_inline(value)}" for key, value in values.items())
        name = ",".join(changes).replace("/", "-")[:LONGEST]
        folder = Path(base.output_dir) / name
        if any(folder == other.folder for other in found):
            name = f"{name},{len(found)}"
            folder = Path(base.output_dir) / name
        mine = (*overrides, *changes, f"output_dir={json.dumps(str(folder))}")
        load_run(config, mine)
        found.append(Combination(name, mine, folder))
    return found


def _products(document: Document) -> Iterator[dict[str, Any]]:
    axes: list[list[dict[str, Any]]] = []
    for key, values in document.values.items():
        if key == "output_dir":
            raise ConfigError(
                "output_dir is each run's own in a sweep; remove it", path=document.path, line=document.line((key,))
            )
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"key '{key}': {values!r} is no list of values to take, such as [1, 2]",
                path=document.path,
                line=document.line((key,)),
            )
        if key == TOGETHER:
            if not all(isinstance(value, dict) and value for value in values):
                raise ConfigError(
                    "key '_': expected a list of mappings of keys to values", path=document.path, line=document.line((key,))
                )
            axes.append(values)
        else:
            axes.append([{key: value} for value in values])
    if not axes:
        raise ConfigError("a sweep names keys with the values they are to take, such as lora_r: [8, 16]", path=document.path)
    if (count := math.prod(map(len, axes))) > MOST:
        raise ConfigError(f"these are {count} combinations, more than {MOST}; leave some values out", path=document.path)
    for chosen in itertools.product(*axes):
        joined: dict[str, Any] = {}
        for part in chosen:
            joined |= part
        yield joined


def _inline(value: Any) -> str:
    """A value as an override's text: YAML in one line."""
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)


def _start(arguments: Sequence[str]) -> int:
    """The exit code; -1 where Ctrl-C has stopped it, which the run is told too and takes the time to save for."""
    run = subprocess.Popen([sys.executable, "-m", "ropewalk", "train", *arguments])
    interrupted = False
    while True:
        try:
            code = run.wait()
            return -1 if interrupted else code
        except KeyboardInterrupt:
            interrupted = True


def _outcome(one: Combination) -> Outcome:
    try:
        record = json.loads((one.folder / "run.json").read_text(encoding="utf-8"))
    except OSError:
        record = {}
    result = record.get("result") if record.get("state") == "finished" else None
    if result is None:
        return Outcome(one.name, str(one.folder), None, False, None)
    evaluated = result["evaluation_loss"] is not None
    return Outcome(
        one.name,
        str(one.folder),
        result["evaluation_loss"] if evaluated else result["last_loss"],
        evaluated,
        round(result["seconds"], 1),
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Plain lines, the best first."""
    widest = max(len(one.name) for one in outcomes)
    lines = [f"{'run':<{widest}}  {'loss':>10}  {'of':<10}  {'seconds':>8}"]
    for one in outcomes:
        loss = "failed" if one.loss is None else f"{one.loss:.4f}"
        of = "" if one.loss is None else "evaluation" if one.evaluated else "last step"
        lines.append(f"{one.name:<{widest}}  {loss:>10}  {of:<10}  {one.seconds or '':>8}")
    return "\n".join(lines)
