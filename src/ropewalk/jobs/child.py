"""What the process of a training is told of its surroundings: nothing that opens more than its files, or has it tell others."""

from __future__ import annotations

import os
from pathlib import Path

HIDDEN = ("ROPEWALK_ROOT_KEY", "ROPEWALK_DATABASE_URL", "WANDB_", "MLFLOW_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def child_environment(home: Path) -> dict[str, str]:
    """The variables of this process without those, with a home of its own and without the hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
    return {**kept, "ROPEWALK_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
