"""Outside trackers that a run can report to; each is an optional package and is imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ropewalk.errors import MissingExtra


class Tracker(Protocol):
    """Somewhere that numbers by step go."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = _load("wandb", "wandb")
        names = {
            "project": "wandb_project",
            "entity": "wandb_entity",
            "name": "wandb_name",
            "id": "wandb_run_id",
            "mode": "wandb_mode",
        }
        settings = {name: config[key] for name, key in names.items() if config.get(key)}
        self._run = wandb.init(dir=str(folder), config=dict(config), resume="allow" if "id" in settings else None, **settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files below the run's folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        _load("tensorboard", "tensorboard")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MlflowTracker:
    """An MLflow tracking server or folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._mlflow = _load("mlflow", "mlflow")
        if config.get("mlflow_tracking_uri"):
            self._mlflow.set_tracking_uri(config["mlflow_tracking_uri"])
        if config.get("mlflow_experiment_name"):
            self._mlflow.set_experiment(config["mlflow_experiment_name"])
        self._mlflow.start_run(run_name=config.get("mlflow_run_name"))
        self._mlflow.log_params({key: str(value)[:250] for key, value in config.items()})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, type[WandbTracker] | type[TensorboardTracker] | type[MlflowTracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
    "mlflow": MlflowTracker,
}


def start_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """One tracker per name of `report_to`; a missing package is an error that says what to install."""
    return [TRACKERS[name](folder, config) for name in names]


def _load(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtra(package, extra, f"report_to: {package}") from None
