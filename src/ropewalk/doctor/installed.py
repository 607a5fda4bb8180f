"""Python, the packages, and what each extra that is not installed would add."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from ropewalk.doctor.findings import Finding, Looking, State

CORE = ("torch", "transformers", "peft", "tokenizers", "safetensors", "sqlalchemy", "starlette", "pypdfium2")
FEATURES = {
    "harness": "training by rewards whose episodes code of your own drives (trl.harness)",
    "data": "training rows from Parquet and from data sets of the hub",
    "gpu": "optimizers with 8-bit state",
    "postgres": "the rows in PostgreSQL (--database-url)",
    "buckets": "the bytes in a bucket (--blobs)",
    "cluster": "trainings on a Ray cluster",
    "wandb": "a run's measures in Weights & Biases (report_to: wandb)",
    "tensorboard": "a run's measures in TensorBoard (report_to: tensorboard)",
    "mlflow": "a run's measures in MLflow (report_to: mlflow)",
    "otel": "traces and metrics by OpenTelemetry",
}


def installed(needed: Collection[str]) -> list[Finding]:
    """The packages of the core, each in a version that is asked for, and the extras; one that is needed and lacks is broken."""
    look = Looking("installed")
    look.say("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    asked = [Requirement(text) for text in requires("ropewalk") or ()]
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _core(look, requirement)
    for extra, feature in FEATURES.items():
        packages = [r for r in asked if r.marker is not None and re.search(rf"extra == ['\"]{extra}['\"]", str(r.marker))]
        if not packages:
            continue
        lacking = [r.name for r in packages if _version(r.name) is None]
        if lacking:
            way = f"pip install 'ropewalk[{extra}]'"
            state: State = "broken" if extra in needed else "note"
            look.say(f"extra {extra}", state, f"not installed ({', '.join(lacking)}): what lacks is {feature}", way)
        else:
            look.say(f"extra {extra}", "ok", ", ".join(f"{r.name} {_version(r.name)}" for r in packages))
    return look.found


def _core(look: Looking, requirement: Requirement) -> None:
    found = _version(requirement.name)
    if found is None:
        look.say(requirement.name, "broken", "not installed", "pip install ropewalk")
    elif not requirement.specifier.contains(found, prereleases=True):
        text = f"{found}; expected {requirement.specifier}"
        look.say(requirement.name, "broken", text, f"pip install '{requirement.name}{requirement.specifier}'")
    elif requirement.name in CORE:
        look.say(requirement.name, "ok", found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
