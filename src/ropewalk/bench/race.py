"""The referee of a race: contenders at work in processes of their own. No torch.

On a CPU they take turns, in another order each round, since the machine may be busy; a GPU holds one of them at a time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ropewalk.bench.contenders import ONCE, OURS, Entrant
from ropewalk.bench.shapes import Layer, Model
from ropewalk.errors import RopewalkError

Tell = Callable[[str], None]
Raced = tuple[Model, str, str]  # shape, dtype, format of the frozen weights
ENDED = "its process ended early; its error is above"


class Child:
    """A process of the race and what it tells."""

    def __init__(self, device: str, **task: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ropewalk.bench.child", json.dumps({"device": device, **task})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(device),
        )
        self.task = task

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *failed: Any) -> None:
        with suppress(BrokenPipeError):  # what was asked last was not read
            assert self._process.stdin is not None
            self._process.stdin.close()
        if failed[0] is not None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def read(self) -> dict[str, Any]:
        """The next line, which there must be."""
        found = next(self.lines(), None)
        if found is None:
            raise RopewalkError(
                f"the process of {self.task.get('entrant') or self.task['what']} ended early; its error is above"
            )
        return found

    def lines(self) -> Iterator[dict[str, Any]]:
        """Everything that it tells until it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield dict(json.loads(line))

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self.read()


def _environment(device: str) -> dict[str, str]:
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {}
    return {
        **os.environ,
        **one,
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }


def errors(shape: Model, names: list[str], device: str) -> tuple[dict[str, float], dict[str, str]]:
    """How far each contender's gradients of a small model are from the plain ones', in float32; and why a peer has none."""
    with Child(device, what="errors", shape=asdict(shape), names=names, dtype="float32") as child:
        found = child.read()
    return {name: float(value) for name, value in found["errors"].items()}, dict(found["failed"])


def layer_rows(
    shape: Layer, tokens: int, dtype: str, device: str, entrants: Sequence[Entrant], rounds: int, stored: str = ""
) -> list[dict[str, Any]]:
    """One expert layer by everybody, in one process."""
    task = {"tokens": tokens, "dtype": dtype, "rounds": rounds, "stored": stored, "entrants": [asdict(e) for e in entrants]}
    with Child(device, what="layer", shape=asdict(shape), **task) as child:
        rows = list(child.lines())
    told = {(row["contender"], row["policy"]) for row in rows}
    empty = dict.fromkeys(("max_error", "ms", "held_mb", "peak_mb", "share_of_ceiling"))
    of = {"shape": shape.name, "dtype": dtype, "stored": stored, "tokens": tokens, **empty, "note": ENDED}
    rows += [{**of, **_named(e)} for e in entrants if (e.name, e.policy) not in told]
    return [{"level": "layer", **row} for row in rows]


def _named(entrant: Entrant) -> dict[str, str]:
    """As a row names it."""
    return {"contender": entrant.name, "policy": entrant.policy}


def model_rows(
    shape: Model, dtype: str, device: str, entrants: Sequence[Entrant], rounds: int, tell: Tell, stored: str = ""
) -> list[dict[str, Any]]:
    """A step of a model by everybody, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tell(f"{shape.name}, {dtype}: the plain gradients")
        truth = write_truth((shape, dtype, stored), device, Path(folder) / "truth")
        return _in_turns(shape, dtype, device, entrants, rounds, tell, stored, str(truth))


def write_truth(raced: Raced, device: str, file: Path) -> Path:
    """The gradients that those of every contender are held beside."""
    shape, dtype, stored = raced
    with Child(device, what="truth", shape=asdict(shape), dtype=dtype, stored=stored, file=str(file)) as child:
        child.read()
    return file


def models_alone(
    races: Sequence[Raced], truths: Sequence[Path], entrants: Sequence[Entrant], device: str, seconds: float
) -> list[dict[str, Any]]:
    """A step of each model under each policy by one contender, which has the device to itself; one that fails is a row with its reason."""
    (name,) = {e.name for e in entrants}
    task = [(asdict(shape), dtype, stored, str(truth)) for (shape, dtype, stored), truth in zip(races, truths, strict=True)]
    with Child(device, what="models", races=task, entrants=[asdict(e) for e in entrants], seconds=seconds) as child:
        found = {(row["race"], row["policy"]): row for row in child.lines()}
    rows = []
    for number, (shape, dtype, stored) in enumerate(races):
        for entrant in entrants:
            row = found.get((number, entrant.policy), {"note": ENDED})
            floor = row.get("floor_ms") if name == OURS else None
            note = str(row.get("note", ""))
            rows.append(_row(shape, dtype, stored, entrant, row.get("ms") or [], row, floor, note, device))
    return rows


def left_out(raced: Raced, name: str, why: str) -> dict[str, Any]:
    """The row of who does not take part in a race."""
    shape, dtype, stored = raced
    return _row(shape, dtype, stored, Entrant(name), [], {}, None, why, "cuda")


def _in_turns(
    shape: Model, dtype: str, device: str, entrants: Sequence[Entrant], rounds: int, tell: Tell, stored: str, truth: str
) -> list[dict[str, Any]]:
    children: dict[Entrant, Child] = {}
    took: dict[Entrant, list[float]] = {e: [] for e in entrants}
    notes: dict[Entrant, str] = {}
    kept: dict[Entrant, dict[str, Any]] = {}
    try:
        for entrant in entrants:
            children[entrant] = Child(
                device, what="model", shape=asdict(shape), entrant=asdict(entrant), dtype=dtype, stored=stored, truth=truth
            )
        for entrant in list(children):
            _or_leave(entrant, children, notes, lambda child: child.read())
        for turn in range(rounds + 1):
            order = list(children)
            for entrant in order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]:
                once = device == "cpu" and entrant.name == ONCE
                if once and turn:
                    continue
                tell(f"{shape.name}, {dtype}: {entrant.title}, {'once' if once else f'round {turn} of {rounds}'}")
                found = _or_leave(entrant, children, notes, lambda child: child.ask("step"))
                if found and (turn or once):  # the first warms up
                    took[entrant] += found["ms"]
        for entrant in list(children):
            if found := _or_leave(entrant, children, notes, lambda child: child.ask("kept")):
                kept[entrant] = found
    finally:
        for child in children.values():
            child.__exit__(*sys.exc_info())
    floor = min((k["floor_ms"] for e, k in kept.items() if e.name == OURS), default=None)
    return [_row(shape, dtype, stored, e, took[e], kept.get(e, {}), floor, notes.get(e, ""), device) for e in entrants]


def _or_leave(
    entrant: Entrant, children: dict[Entrant, Child], notes: dict[Entrant, str], work: Callable[[Child], dict[str, Any]]
) -> dict[str, Any]:
    """A peer that fails leaves the race, and the others go on."""
    try:
        return work(children[entrant])
    except (RopewalkError, BrokenPipeError):
        if entrant.name == OURS:
            raise
        children.pop(entrant).__exit__(None)
        notes[entrant] = "failed"
        return {}


def _row(
    shape: Model,
    dtype: str,
    stored: str,
    entrant: Entrant,
    took: list[float],
    kept: dict[str, Any],
    floor: float | None,
    note: str,
    device: str,
) -> dict[str, Any]:
    ms = (min(took) if device == "cpu" else statistics.median(took)) if took else None
    return {
        "level": "model",
        "shape": shape.name,
        "dtype": dtype,
        "stored": stored,
        "tokens": shape.tokens,
        "layers": shape.layers,
        "contender": entrant.name,
        "policy": entrant.policy,
        "ms": ms,
        "held_mb": kept.get("held_mb"),
        "peak_mb": kept.get("peak_mb"),
        "max_error": kept.get("max_error"),
        "share_of_ceiling": floor / ms if floor and ms else None,
        "floor_ms": floor,
        "note": note or ("once" if device == "cpu" and entrant.name == ONCE else ""),
    }
