"""The JSON of fine-tuning jobs, in the shapes of OpenAI's clients: a body -> what is asked for; jobs, events, checkpoints -> JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.database import now
from ropewalk.jobs.ledger import Event, Job
from ropewalk.jobs.recipe import METHODS, Asked, Method, reproducing
from ropewalk.server.node import Node

MAX_ID = 128
SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BODY = ("model", "training_file", "validation_file", "method", "hyperparameters", "suffix", "seed", "metadata", "integrations")
OWN = "ropewalk"  # what a client says beyond OpenAI's API: extra_body={"ropewalk": {...}}
HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
UNUSED = (
    "compute_multiplier",
    "eval_interval",
    "eval_samples",
    "reasoning_effort",
)  # of reinforcement; "auto" or "default" only
MOST_METADATA, MAX_NAME, MAX_VALUE = 16, 64, 512
ERASED = "The reason quoted a file that has been deleted since."


def read_new(body: Node) -> Asked:
    """A job as it is asked for; its base is a name yet to be looked up."""
    body.only({*BODY, OWN})
    if (integrations := body.get("integrations")) is not None and list(integrations.items()):
        raise integrations.fail("a job reports to nobody else; its events and metrics are fetched here")
    method, parameters = _method(body)
    validation = body.get("validation_file")
    suffix, seed = body.get("suffix"), body.get("seed")
    if suffix is not None and not SUFFIX.fullmatch(suffix.text()):
        raise suffix.fail(f"String should match pattern '^{SUFFIX.pattern}$'")
    own = body.get(OWN)
    keys = dict(own.mapping()) if own is not None else {}
    rows = Node(keys.pop("dataset", None) or {}, f"{OWN}.dataset").mapping()
    return Asked(
        base=body.need("model").text(1, 200),
        training_file=body.need("training_file").text(1, MAX_ID),
        validation_file=None if validation is None else validation.text(1, MAX_ID),
        method=method,
        epochs=_whole(parameters, "n_epochs", 50),
        batch_size=_whole(parameters, "batch_size", 1024),
        rate=_number(parameters, "learning_rate_multiplier", 1e-4, 1e4),
        beta=_number(parameters, "beta", 1e-6, 1e3) if method == "dpo" else None,
        suffix="" if suffix is None else suffix.text(),
        seed=None if seed is None else seed.integer(0, 2**31 - 1),
        metadata=_metadata(body),
        keys=keys,
        rows=rows,
    )


def _method(body: Node) -> tuple[Method, Node]:
    """The method and its hyperparameters; the older form gives those beside it."""
    older, method = body.get("hyperparameters"), body.get("method")
    if method is None:
        parameters = older or Node({}, "hyperparameters")
        parameters.only(HYPERPARAMETERS)
        return "supervised", parameters
    if older is not None and older.record():
        raise older.fail("method says the hyperparameters; give one of them")
    method.only({"type", *METHODS})
    kind: Method = method.need("type").choice(METHODS)  # type: ignore[assignment]
    for other in METHODS:
        if other != kind and (given := method.get(other)) is not None:
            raise given.fail(f"the method's type is {kind}")
    own = method.get(kind) or Node({}, method.at(kind))
    own.only({"hyperparameters", "grader"} if kind == "reinforcement" else {"hyperparameters"})
    if (grader := own.get("grader")) is not None:
        raise grader.fail(
            "rewards are those that are built in: name them in "
            'extra_body={"ropewalk": {"trl": {"reward_funcs": [{"kind": "numeric"}]}}}; code is never taken from a client'
        )
    parameters = own.get("hyperparameters") or Node({}, own.at("hyperparameters"))
    parameters.only({*HYPERPARAMETERS, *(("beta",) if kind == "dpo" else UNUSED if kind == "reinforcement" else ())})
    for name in UNUSED:
        if (given := parameters.get(name)) is not None and given.value not in ("auto", "default"):
            raise given.fail("this is not a hyperparameter of a job here; leave it out")
    return kind, parameters


def _whole(parameters: Node, name: str, most: int) -> int | None:
    found = parameters.get(name)
    return None if found is None or found.value == "auto" else found.integer(1, most)


def _number(parameters: Node, name: str, least: float, most: float) -> float | None:
    found = parameters.get(name)
    return None if found is None or found.value == "auto" else found.number(least, most)


def _metadata(body: Node) -> Mapping[str, str] | None:
    found = body.get("metadata")
    if found is None:
        return None
    values = found.record()
    if len(values) > MOST_METADATA:
        raise found.fail(f"expected {MOST_METADATA} pairs at most, not {len(values):,}")
    return {
        Node(name, found.at(name[:MAX_NAME])).text(1, MAX_NAME): Node(value, found.at(name[:MAX_NAME])).text(0, MAX_VALUE)
        for name, value in values.items()
    }


def job(found: Job, error: str | None = None) -> dict[str, Any]:
    """What is told about a job."""
    told = dict(found.hyperparameters)
    return {
        "id": found.id,
        "object": "fine_tuning.job",
        "created_at": _seconds(found.created_at),
        "finished_at": None if found.finished_at is None else _seconds(found.finished_at),
        "estimated_finish": _estimate(found),
        "model": found.base,
        "fine_tuned_model": found.model,
        "organization_id": found.organization_id,
        "status": found.status,
        "training_file": found.training_file,
        "validation_file": found.validation_file,
        "hyperparameters": {name: told[name] for name in HYPERPARAMETERS},
        "method": {"type": found.method, found.method: {"hyperparameters": told}},
        "trained_tokens": found.trained_tokens if found.state == "succeeded" else None,
        "result_files": [],
        "integrations": [],
        "seed": found.seed,
        "metadata": found.metadata,
        "error": _error(found, error) if found.error_code is not None else None,
        OWN: {
            "step": found.step,
            "steps": found.steps,
            "device_seconds": round(found.device_time / 1e6, 3),
            "data_generator": list(found.data_generator or ()),
            "resumable_until": None if found.kept_until is None else _seconds(found.kept_until),
            "config_digest": found.config_digest,
            "config": reproducing(found.method, found.config),
        },
    }


def event(found: Event) -> dict[str, Any]:
    """Something that happened."""
    return {
        "id": found.id,
        "object": "fine_tuning.job.event",
        "created_at": _seconds(found.created_at),
        "level": found.level,
        "message": found.message,
        "type": found.kind,
        "data": found.data or {},
    }


def checkpoint(of: Job, step: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """A state of the model that was kept, and is served by a name of its own once the job has succeeded."""
    metrics = {"step": step} | {name: measured[name] for name in ("train_loss", "valid_loss") if name in measured}
    if "valid_loss" in metrics:  # every evaluation is over all rows
        metrics["full_valid_loss"] = metrics["valid_loss"]
    return {
        "id": checkpoint_id(of, step),
        "object": "fine_tuning.job.checkpoint",
        "created_at": _seconds(measured["created_at"]),
        "fine_tuned_model_checkpoint": f"{of.name}:ckpt-step-{step}",
        "fine_tuning_job_id": of.id,
        "metrics": metrics,
        "step_number": step,
    }


def checkpoint_id(of: Job, step: int) -> str:
    return f"ftckpt_{of.id.partition('_')[2]}_{step}"


def page(data: Sequence[Mapping[str, Any]], more: bool) -> dict[str, Any]:
    """Part of a list."""
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": list(data), "has_more": more, **ends}


def _error(found: Job, error: str | None) -> dict[str, Any]:
    of_file = found.error_code == "invalid_training_file"
    return {"code": found.error_code, "message": error or ERASED, "param": "training_file" if of_file else None}


def _estimate(found: Job) -> int | None:
    if found.state != "running" or not found.step or not found.steps or found.started_at is None:
        return None
    moment = now()
    return _seconds(round(moment + (moment - found.started_at) / found.step * max(0, found.steps - found.step)))


def _seconds(microseconds: int) -> int:
    return microseconds // 1_000_000
