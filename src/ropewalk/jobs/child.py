"""What the process of a training is told of its surroundings: nothing that opens more than its files, or has it tell others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

HIDDEN = ("ROPEWALK_ROOT_KEY", "ROPEWALK_DATABASE_URL", "WANDB_", "MLFLOW_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def child_environment(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """These variables without the hidden ones, with a home of its own and without the hub."""
    kept = {name: value for name, value in environment.items() if not name.startswith(HIDDEN)}
    return {**kept, "ROPEWALK_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
