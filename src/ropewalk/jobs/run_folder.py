"""The folder of one job: what is handed to its child process, and what it leaves.

DATA/jobs/ID/
  run.yml      the configuration, with the places of this machine
  log.txt      what the child says
  prepared/    tokenised rows: gone when the job ends
  run/         the run's own folder: events.jsonl, checkpoints/, adapter/
  settled      there where what lies in run/ is what the store has kept of a job that has succeeded

What may hold words of a file (log, prepared, events) is registered with the file and dies with it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ropewalk.config.cluster import RayCluster
from ropewalk.files.store import Store
from ropewalk.folders import make_folder
from ropewalk.jobs.ledger import Job, Told

TAIL_BYTES = 8192
COUNTED = ("step", "epoch", "learning_rate", "gradient_norm", "tokens", "tokens_per_second")
TIMES = ("seconds", "memory", "loss")  # told otherwise, or of no interest to a client
KEPT = ("run.json", "events.jsonl", "adapter", "checkpoints", "plots", ".lock")  # of a run that has become a model
NUMBERS = ("start", "step", "eval", "checkpoint", "end")  # events that hold nothing else
SAID = "ropewalk: "  # begins the last line of a run that says why it failed


class JobFolder:
    """Where one job's run lies."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.log, self.config, self.prepared = folder / "log.txt", folder / "run.yml", folder / "prepared"
        self.run = folder / "run"
        self.events = self.run / "events.jsonl"
        self._mark = folder / "settled"

    @property
    def settled(self) -> bool:
        return self._mark.exists()

    def settle(self) -> None:
        """What lies in run/ will not change any more."""
        self._mark.touch()

    def adopt(self, base: Path) -> None:
        """A run that another machine has begun goes on here: the base lies where this one has it."""
        record = self.record()
        if "base_model" in record.get("config", {}):
            record["config"]["base_model"] = str(base)
            fresh = self.run / "run.json.new"
            fresh.write_text(json.dumps(record, indent=1), encoding="utf-8")
            fresh.replace(self.run / "run.json")

    async def prepare(self, store: Store, job: Job, base: Path, cluster: RayCluster | None = None) -> None:
        """Makes it, and registers what will hold words of the job's files; NotFound where one of them is gone."""
        make_folder(self.path)
        for id in dict.fromkeys(job.file_ids):
            for kind, path in (("job_tokens", self.prepared), ("job_log", self.log), ("job_events", self.events)):
                await store.register_path(id, kind, path)
        places = {"base_model": str(base), "output_dir": "run", "dataset_prepared_path": "prepared"}
        keys = {**places, **job.config}
        if cluster is not None:  # a run that has begun keeps the number of its workers
            keys |= cluster.keys(int(job.config["gradient_accumulation_steps"]), self._workers_told())
        self.config.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")

    def workers(self) -> int:
        """How many processes train it, each on a device of its own."""
        return self._workers_told() or 1

    def _workers_told(self) -> int | None:
        """Of a run that has begun on a cluster."""
        try:
            found: int | None = yaml.safe_load(self.config.read_text(encoding="utf-8")).get("ray_num_workers")
        except FileNotFoundError:
            return None
        return found

    def is_free(self) -> bool:
        """Whether no process trains into it: a child whose server was killed has ended."""
        lock = self.run / ".lock"
        if not lock.exists():
            return True
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def record(self) -> dict[str, Any]:
        """What the run says of itself."""
        try:
            found: dict[str, Any] = json.loads((self.run / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    @property
    def finished(self) -> bool:
        return self.record().get("state") == "finished" and (self.run / "adapter" / "adapter_config.json").is_file()

    def checkpoints(self) -> dict[int, Path]:
        """Its checkpoints, each an adapter, by their step."""
        found = (path for path in (self.run / "checkpoints").glob("step-*") if (path / "adapter_config.json").is_file())
        return {int(path.name.partition("-")[2]): path for path in sorted(found)}

    def last_words(self) -> str:
        """The end of what the child said."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""

    def why(self) -> str | None:
        """The sentence in which a run has said why it failed; None for one that has not."""
        line = self.last_words().rpartition("\n")[2]
        return line.removeprefix(SAID) if line.startswith(SAID) else None

    def set_aside(self) -> None:
        """Removes what the next try of the run makes again."""
        shutil.rmtree(self.prepared, ignore_errors=True)
        shutil.rmtree(self.path / "home", ignore_errors=True)

    def tidy(self, *, keep: bool) -> None:
        """Removes tokenised rows and what a run goes on from; with `keep`, adapter and checkpoints stay as models."""
        self.set_aside()
        if not keep:
            shutil.rmtree(self.run, ignore_errors=True)
            self._mark.unlink(missing_ok=True)
            return
        for path in self.run.iterdir():  # such as a page of samples, which are words of a file
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with suppress(FileNotFoundError):
            self._keep_numbers()
        for path in self.checkpoints().values():
            with suppress(OSError):
                (path / "optimizer.pt").unlink()
        self.settle()

    def _keep_numbers(self) -> None:
        """The run's events without those that hold words of a file."""
        lines = self.events.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["event"] in NUMBERS]
        fresh = self.events.with_suffix(".new")
        fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        fresh.replace(self.events)


class EventTail:
    """The events of a run, read as they are written: a resumed run writes its log anew, and is read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._at = path, 0, 0
        self.steps: int | None = None

    def read(self) -> tuple[list[Told], dict[str, Any]]:
        """What has happened since the last call, and what is new of the job itself."""
        told: list[Told] = []
        values: dict[str, Any] = {}
        for event in self._lines():
            found = _told(event, self)
            told += found
            if event["event"] == "start":
                values["steps"] = self.steps
            if event["event"] == "step":
                values |= {"step": event["step"], "trained_tokens": event.get("tokens")}
        return told, values

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                number = self._path.stat().st_ino
                if number != self._file:
                    self._file, self._at = number, 0
                file.seek(self._at)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not yet, or erased with a file that was deleted
            return
        self._at += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            if line:
                yield json.loads(line)


def _told(event: Mapping[str, Any], tail: EventTail) -> list[Told]:
    """An event of a run as an event of its job; texts that a run keeps are not among them."""
    step = event.get("step", 0)
    match event["event"]:
        case "start":
            tail.steps = event["steps"]
            return [Told("start", f"The files are valid: {event['rows']:,} rows, {event['steps']:,} steps")]
        case "step":
            numbers = {name: value for name, value in event.items() if _is_number(value) and name not in TIMES}
            data = {**numbers, "total_steps": tail.steps, "train_loss": event["loss"]}
            of = f"/{tail.steps}" if tail.steps else ""
            reward = f", reward={event['reward']:.4f}" if _is_number(event.get("reward")) else ""
            return [Told(f"step:{step}", f"Step {step}{of}: training loss={event['loss']:.4f}{reward}", "metrics", data=data)]
        case "eval":
            numbers = {
                f"valid_{name}": value for name, value in event.items() if _is_number(value) and name not in ("step", "trained")
            }
            said = f"validation loss={event['loss']:.4f}" if "loss" in event else "validation"
            return [Told(f"eval:{step}", f"Step {step}: {said}", "metrics", data={"step": step, **numbers})]
        case "checkpoint":
            data = {"step": step, "checkpoint": Path(event["path"]).name}
            return [Told(f"checkpoint:{step}", f"Checkpoint created at step {step}", data=data)]
        case "restart":
            return [Told(f"restart:{event['key']}", f"A worker was lost; the run goes on from step {step}", level="warn")]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
