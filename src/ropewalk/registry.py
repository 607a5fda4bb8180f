"""Bases, adapters and the aliases that point at them: publish, find, list, ship, roll back.

One JSON file, registry.json, replaced whole under a lock, so that readers never see half of it and two writers never lose each
other's work; shared_registry.py keeps the same in a database. An alias keeps the names it pointed at before; that history is what
rollback walks.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ropewalk.errors import BadInput, NotFound, OutputError

# Lineage says where weights came from: data files, run folder, whatever explains them. Strings only, so that it stays readable.
Lineage = Mapping[str, str]


@dataclass(frozen=True)
class Entry:
    """A base, or an adapter over a base, that can be served."""

    name: str
    kind: Literal["base", "adapter"]
    path: str
    base: str | None
    lineage: dict[str, str]
    created: str


class Registry:
    """A folder with registry.json."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "registry.json"

    def publish_base(self, name: str, path: Path | str, lineage: Lineage | None = None) -> Entry:
        """Make a base known by name; publishing it again replaces what is known of it."""
        return self._publish(Entry(name, "base", str(Path(path).resolve()), None, dict(lineage or {}), _now()))

    def publish_adapter(self, name: str, path: Path | str, base: str, lineage: Lineage | None = None) -> Entry:
        """Make an adapter over a published base known by name."""
        return self._publish(Entry(name, "adapter", str(Path(path).resolve()), base, dict(lineage or {}), _now()))

    def entries(self) -> list[Entry]:
        """Everything published, by name."""
        state = self._read()
        return [self._placed(_entry(state, name)) for name in sorted(state["entries"])]

    def trained_on(self, file_id: str) -> list[str]:
        """Names of what is published and has a file in its lineage."""
        return [entry.name for entry in self.entries() if file_id in " ".join(entry.lineage.values()).split()]

    def aliases(self) -> dict[str, str]:
        """Each alias and the name it points at now."""
        return {alias: history[-1] for alias, history in sorted(self._read()["aliases"].items())}

    def history(self, alias: str) -> list[str]:
        """The names an alias has pointed at and can be rolled back to, oldest first, the present one last."""
        return list(_history(self._read(), alias))

    def resolve(self, name: str) -> Entry:
        """The entry of that name, or the one that the alias of that name points at."""
        state = self._read()
        return self._placed(_entry(state, state["aliases"][name][-1] if name in state["aliases"] else name))

    def ship(self, alias: str, name: str, only_from: Sequence[str] | None = None) -> Entry:
        """Point the alias at a published entry; `only_from` is the history it must still have, [] for an alias that is new."""
        with self._change() as state:
            entry = _entry(state, name)
            if alias in state["entries"]:
                raise BadInput(f"'{alias}' is the name of a published {state['entries'][alias]['kind']}; choose another alias")
            history = state["aliases"].setdefault(alias, [])
            _unmoved(alias, history, only_from)
            if not history or history[-1] != name:
                history.append(name)
        return self._placed(entry)

    def rollback(self, alias: str, only_from: Sequence[str] | None = None) -> Entry:
        """Point the alias at what it pointed at before."""
        with self._change() as state:
            history = _history(state, alias)
            _unmoved(alias, history, only_from)
            before(alias, history)
            history.pop()
            return self._placed(_entry(state, history[-1]))

    def restore(self, alias: str, history: Sequence[str]) -> None:
        """Give the alias back a history that it had; with none, it is no alias any more."""
        with self._change() as state:
            if history:
                state["aliases"][alias] = list(history)
            else:
                state["aliases"].pop(alias, None)

    def withdraw(self, key: str, value: str) -> list[str]:
        """Forgets all whose lineage says this; an alias that points at one points at what it pointed at before, or is gone."""
        with self._change() as state:
            names = [name for name, entry in state["entries"].items() if entry["lineage"].get(key) == value]
            for name in names:
                del state["entries"][name]
            for alias, history in list(state["aliases"].items()):
                state["aliases"][alias] = [name for name in history if name not in names]
                if not state["aliases"][alias]:
                    del state["aliases"][alias]
        return sorted(names)

    def close(self) -> None:
        """Lets go of what it was read through."""

    def _publish(self, entry: Entry) -> Entry:
        if not Path(entry.path).is_dir():
            raise NotFound(f"no folder '{entry.path}' to publish as '{entry.name}'")
        with self._change() as state:
            if entry.base is not None and _entry(state, entry.base).kind != "base":
                raise BadInput(f"'{entry.base}' is an adapter; an adapter goes over a base, publish that first")
            if entry.name in state["aliases"]:
                raise BadInput(f"'{entry.name}' is an alias; choose another name")
            state["entries"][entry.name] = {**asdict(entry), "path": self._kept_as(Path(entry.path))}
        return entry

    def _placed(self, entry: Entry) -> Entry:
        return replace(entry, path=self._lies_at(entry.path))

    def _kept_as(self, path: Path) -> str:
        """How a folder is written down."""
        return str(path)

    def _lies_at(self, path: str) -> str:
        """The folder on this machine that was written down."""
        return path

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"entries": {}, "aliases": {}}
        state: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return state

    @contextmanager
    def _change(self) -> Iterator[dict[str, Any]]:
        """The state, under the lock; written back whole when the block ends without an error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "registry.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                state = self._read()
                yield state
                temporary = self.file.with_suffix(".new")
                with temporary.open("w", encoding="utf-8") as out:
                    json.dump(state, out, indent=2, ensure_ascii=False)
                    out.flush()
                    os.fsync(out.fileno())
                os.replace(temporary, self.file)
        except OSError as error:
            raise OutputError(f"cannot write {self.file}: {error.strerror or error}") from error


def _entry(state: dict[str, Any], name: str) -> Entry:
    if name not in state["entries"]:
        known = ", ".join(sorted([*state["entries"], *state["aliases"]])) or "nothing yet"
        raise NotFound(f"nothing is published as '{name}'; known: {known}")
    return Entry(**state["entries"][name])


def _history(state: dict[str, Any], alias: str) -> list[str]:
    if alias not in state["aliases"]:
        raise NotFound(f"no alias '{alias}'; known: {', '.join(sorted(state['aliases'])) or 'none yet'}")
    history: list[str] = state["aliases"][alias]
    return history


def before(alias: str, history: Sequence[str]) -> str:
    """The name that a rollback goes to; BadInput where there is none."""
    if len(history) < 2:
        raise BadInput(f"alias '{alias}' has pointed at nothing but '{history[-1]}'; ship another name instead")
    return history[-2]


def _unmoved(alias: str, history: Sequence[str], wanted: Sequence[str] | None) -> None:
    if wanted is not None and list(wanted) != list(history):
        now = f"now points at '{history[-1]}'" if history else "is gone"
        raise BadInput(f"alias '{alias}' was moved by somebody else meanwhile and {now}; look at it and ask again")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
