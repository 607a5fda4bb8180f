"""A run's folder: who may write it, what it holds, whether it goes on with an unfinished run. No torch.

output_dir/
  run.json         resolved config, versions, threads, state (training, finished), result
  events.jsonl     every step, evaluation and checkpoint
  plots/           loss, throughput, learning rate and, by rewards, what was reached, as SVG
  samples.html     by rewards: completions and what each was given
  checkpoints/     what a killed run goes on from
  adapter/         the result of a LoRA run, in PEFT's layout (model/ after full fine-tuning)
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from ropewalk.errors import ConfigError, NotFound, OutputError
from ropewalk.files.generators import generators
from ropewalk.files.local import LocalFiles, is_id

# Keys that may change between a kill and the next start: none of them changes a loss.
NEUTRAL = frozenset(
    "output_dir logging_steps save_steps saves_per_epoch save_strategy save_total_limit save_first_step save_only_model report_to "
    "use_tensorboard use_wandb wandb_project wandb_entity wandb_name wandb_run_id wandb_mode use_mlflow mlflow_tracking_uri "
    "mlflow_experiment_name mlflow_run_name hub_model_id hub_revision resume resume_from_checkpoint auto_resume_from_checkpoints "
    "dataset_prepared_path dataset_num_proc loss_watchdog_threshold loss_watchdog_patience ddp_timeout fsdp fsdp_version fsdp_config "
    "use_ray resources_per_worker "
    "deepspeed expert_parallel_size dp_shard_size dp_replicate_size".split()
)
NEEDED_BYTES = 64 << 20


class RunFolder:
    """One run's folder, locked while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = path / "events.jsonl"
        self.plots = path / "plots"
        self.checkpoints = path / "checkpoints"
        self.record: dict[str, Any] = {}
        self._lock: IO[str] | None = None

    def write_record(self, **values: Any) -> None:
        """Merges values into run.json, atomically."""
        self.record |= values
        fresh = self.path / "run.json.new"
        try:
            fresh.write_text(json.dumps(self.record, indent=1, default=str), encoding="utf-8")
            fresh.replace(self.path / "run.json")
        except OSError as error:
            raise OutputError(
                f"could not write {self.path}/run.json: {error}; free disk space or set another `output_dir`"
            ) from error

    @property
    def finished(self) -> bool:
        return self.record.get("state") == "finished"

    def close(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None


def open_folder(path: Path, config: Mapping[str, Any], *, restart: bool = False) -> RunFolder:
    """Opens `output_dir` for this config: new, or with the run it holds, which goes on where it is unfinished.

    Raises OutputError where it cannot be written or another process trains into it, ConfigError where it holds a run of another
    configuration. With `restart` a run that is there is moved aside, never deleted.
    """
    folder = RunFolder(path)
    _make_writable(path)
    folder._lock = _lock(path)
    if restart and (path / "run.json").exists():
        _move_aside(path)
    if (path / "run.json").exists():
        folder.record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        try:
            _same_config(path, folder.record["config"], config)
        except ConfigError:
            folder.close()
            raise
    else:
        folder.write_record(state="training", config=dict(config), versions=versions(), machine=machine())
    return folder


def join_folder(path: Path) -> RunFolder:
    """The folder as a process sees it that does not write there: what the writing one has recorded."""
    folder = RunFolder(path)
    if (path / "run.json").exists():
        folder.record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    return folder


def lineage(result: Path, files: LocalFiles) -> dict[str, str]:
    """What an adapter or model was made by and from: its run's folder, the ids of stored `files`, and the models that wrote these;
    nothing where no run made it."""
    run = result.resolve().parent
    if not (run / "run.json").is_file():
        return {}
    config = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
    sources = config.get("datasets") or config.get("pretraining_dataset") or []
    ids = [source["path"] for source in sources if is_id(source["path"])]
    told = {"run": str(run)} | ({"file": " ".join(ids)} if ids else {})
    return told | ({"data_generator": " ".join(names)} if (names := _generators(ids, files)) else {})


def _generators(ids: Sequence[str], files: LocalFiles) -> list[str]:
    """The models that wrote these files, as far as they are still there."""
    found: dict[str, None] = {}
    for id in ids:
        with suppress(NotFound):
            found |= dict.fromkeys(generators(files.show(id)))
    return list(found)


def versions() -> dict[str, str]:
    """The packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("ropewalk", "torch", "transformers", "tokenizers", "peft", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    return {"system": platform.platform(), "processor": _processor(), "cores": usable_cores()}


def usable_cores() -> int:
    """Cores this process may use: its affinity, less where a container's quota says so."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _make_writable(path: Path) -> None:
    advice = "set another `output_dir`, or make it writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise OutputError(f"output_dir {path} cannot be written: {error.strerror or error}; {advice}") from error
    if free < NEEDED_BYTES:
        raise OutputError(
            f"output_dir {path}: the disk is full ({free / 1e6:.0f} MB free, at least {NEEDED_BYTES / 1e6:.0f} MB needed); "
            "free disk space or set another `output_dir`"
        )


def _lock(path: Path) -> IO[str]:
    file = (path / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OutputError(
            f"output_dir {path}: another process is training into it; wait for it or set another `output_dir`"
        ) from error
    return file


def _move_aside(path: Path) -> None:
    number = next(n for n in range(1, 10**6) if not (path / f"before-{n}").exists())
    aside = path / f"before-{number}"
    aside.mkdir()
    for item in path.iterdir():
        if not item.name.startswith((".lock", "before-")):
            item.rename(aside / item.name)


def _same_config(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(new), default=str))
    # A key that an earlier version did not have, and that is switched off now, changes nothing.
    keys = sorted(k for k in {*old, *plain} - NEUTRAL if old.get(k) != plain.get(k) and (k in old or plain[k]))
    if keys:
        shown = ", ".join(f"{k} ({old.get(k)!r} there, {plain.get(k)!r} now)" for k in keys[:4]) + (
            ", ..." if len(keys) > 4 else ""
        )
        raise ConfigError(
            f"output_dir {path} holds a run of another configuration: {shown}. "
            "Set another `output_dir`, or pass --restart to move that run aside"
        )
