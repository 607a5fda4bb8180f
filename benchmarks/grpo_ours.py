"""Ours in benchmarks/grpo.py, in a process of its own: grpo_ours.py ORDER; the order is JSON.

    run        `ropewalk train` by rewards: a line of JSON for every step, as the other contenders print, and then what must hold
    rollouts   the generator beside transformers' `generate`, and training with prompts shared beside training without, in turns
    decode     a full batch with LoRA on attention and experts beside the base alone, in turns; the same of PEFT

Completions are cut where `lengths` of peers/grpo_assets.py says, by changing the limits of requests that the engine has taken; for
`run` without a generator ("replayed") they are random ids of those lengths, so that what training alone costs is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import descendants
from peers.grpo_assets import Shape, prescribed, targets

HERE = Path(__file__).resolve().parent


def main(order: dict[str, Any]) -> None:
    shape = Shape(**order["shape"])
    if order["device"] == "cpu":
        torch.set_num_threads(1)
    if order["what"] == "run":
        run(order, shape)
    elif order["what"] == "decode":
        from grpo_decode import measure_decode

        print(json.dumps(measure_decode(order, shape)), flush=True)
    else:
        from grpo_rollouts import measure_rollouts

        print(json.dumps(measure_rollouts(order, shape)), flush=True)


def configured(order: dict[str, Any], shape: Shape, **more: Any) -> Any:
    """The run's configuration, JSON being YAML too."""
    from ropewalk.config.run import parse_run

    trl = {
        "reward_funcs": [f"{HERE / 'peers/grpo_assets.py'}:reward"],
        "num_generations": shape.samples,
        "generation_batch_size": shape.completions,
        "max_completion_length": shape.longest,
        "async_prefetch": order.get("async", False),
    }
    keys: dict[str, Any] = {
        "rl": "grpo",
        "trl": trl,
        "base_model": order["base"],
        "datasets": [{"path": f"{order['base']}/prompts.jsonl", "type": "completion"}],
        "output_dir": str(Path(order["folder"]) / "run"),
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": targets(shape),
        "lora_experts": order.get("experts", False),
        "sequence_len": shape.row,
        "micro_batch_size": 1,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": order.get("steps", 1),
        "logging_steps": 1,
        "bf16": shape.dtype == "bfloat16",
        "seed": 42,
        "save_strategy": "no",
    }
    if order["device"] == "cpu":
        keys["num_threads"] = 1
    return parse_run(json.dumps(keys | more))


# ---------------------------------------------------------------- one run


def run(order: dict[str, Any], shape: Shape) -> None:
    from ropewalk.train import policy_step, reinforcement
    from ropewalk.train.trainer import Fit, train

    loaded = resident()
    prescribe(shape)
    if not order.get("shared", True):
        policy_step.sharing_pays = lambda groups: False
    if order.get("replayed"):
        reinforcement.Generator = Replayed.of(shape)  # type: ignore[misc,assignment]
        policy_step.AGREE[getattr(torch, shape.dtype)] = float("inf")
    held: dict[str, Any] = {}
    step, start = Fit._step, Fit.run

    def told(self: Fit, number: int) -> None:
        step(self, number)
        measured = self.lessons.measured()
        told = {
            name: measured[name]
            for name in ("generate_seconds", "wait_rollouts_seconds", "wait_trainer_seconds")
            if name in measured
        }
        tokens = measured["length"] * shape.completions
        print(json.dumps({"step": spent(), "wall": now(order["device"]), "tokens": round(tokens), **told}), flush=True)

    def kept(self: Fit) -> Any:
        before = base_hash(self.pupil)
        try:
            return start(self)
        finally:
            dtypes = sorted({str(parameter.dtype) for _, parameter in self.pupil.trainable()})
            held.update(base_unchanged=base_hash(self.pupil) == before, trained_dtypes=dtypes, **storage(self))
            held["trainable"] = sum(parameter.numel() for _, parameter in self.pupil.trainable())

    Fit._step, Fit.run = told, kept  # type: ignore[method-assign]
    train(configured(order, shape), restart=True, quiet=True)
    cuda = order["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
    print(json.dumps({**held, "peak": peak, "loaded": 0 if cuda else loaded}), flush=True)


def prescribe(shape: Shape) -> None:
    """From now on every completion has the tokens that `lengths` says, and none ends by itself."""
    from ropewalk.train.generator import Generator

    known, submit = prescribed(shape), Generator.submit

    def submitted(self: Generator, key: str, ids: Any, **asked: Any) -> None:
        submit(self, key, ids, **(asked | {"stop_ids": ()}))
        for job, count in zip(self.engine._jobs[key], known.get(tuple(ids), ())):
            job.request = replace(job.request, max_tokens=count)

    Generator.submit = submitted  # type: ignore[method-assign,assignment]


class Replayed:
    """In the generator's place: random ids of the prescribed lengths, at once."""

    shape: Shape

    @classmethod
    def of(cls, shape: Shape) -> type[Replayed]:
        return type("ReplayedHere", (cls,), {"shape": shape})

    def __init__(self, *_: Any, **__: Any) -> None:
        from ropewalk.train.generator import Spent

        self.version, self.spent = 0, Spent()
        self.known, self.random = prescribed(self.shape), torch.Generator().manual_seed(0)
        self.waiting: list[tuple[str, int, int]] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def submit(self, key: str, ids: Any, **_: Any) -> None:
        self.waiting += [(key, sample, count) for sample, count in enumerate(self.known[tuple(ids)])]

    def step(self, wait: bool = True) -> list[Any]:
        from ropewalk.train.environment import Generated

        given, self.waiting = self.waiting, []
        found = []
        for key, sample, count in given:
            ids = torch.randint(3, self.shape.vocabulary, (count,), generator=self.random).tolist()
            guess = -float(torch.tensor(self.shape.vocabulary).log())
            found.append((key, sample, Generated(ids, [guess] * count, [self.version] * count, False)))
        return found

    def publish(self) -> None:
        self.version += 1

    def cancel(self, key: str) -> None:
        self.waiting = [waiting for waiting in self.waiting if waiting[0] != key]


def base_hash(pupil: Any) -> str:
    """Of every weight that is not trained."""
    trained = {id(parameter) for _, parameter in pupil.trainable()}
    found = hashlib.sha256()
    for name, tensor in sorted(pupil.model.state_dict(keep_vars=True).items()):
        if id(tensor) not in trained:
            found.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def storage(fit: Any) -> dict[str, Any]:
    """Bytes of all weights of both trees, each storage counted once, beside those of the trainer's."""
    generator = getattr(fit.lessons.writer, "generator", fit.lessons.writer)
    if not hasattr(generator, "model"):
        return {}
    trained = {id(parameter) for _, parameter in fit.pupil.trainable()}
    theirs = _storages(fit.pupil.model)
    both = theirs | _storages(generator.model)
    own = sum(p.numel() * p.element_size() for p in fit.pupil.model.parameters() if id(p) in trained)
    return {"weights_trainer": sum(theirs.values()), "weights_both": sum(both.values()), "adapter": own}


def _storages(model: Any) -> dict[int, int]:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


# ---------------------------------------------------------------- costs


def spent() -> float:
    """CPU seconds of this process and of those below it."""
    total = 0
    for pid in descendants(os.getpid())[1:]:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except OSError:
                continue  # it ended between the listing and the reading
    return time.process_time() + total / 1e9


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@contextmanager
def loaded_pupil(order: dict[str, Any], shape: Shape, **more: Any) -> Iterator[Any]:
    """A pupil as a run loads it, its factors no longer zero."""
    from ropewalk.train.prepare import prepare
    from ropewalk.train.pupil import Pupil

    prepared = prepare(configured(order, shape, **more), restart=True, quiet=True)
    try:
        pupil = Pupil.load(prepared, torch.device(order["device"]))
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in pupil.trainable():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
        yield pupil
    finally:
        prepared.folder.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
